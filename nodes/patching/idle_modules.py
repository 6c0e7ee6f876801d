"""Modules of a LoRA that a model did not run, reported on the node that applied the LoRA.

The node has long run when sampling starts, so its page is told by an event. Its later samplings
take the finding back once all modules run.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict

from ...lora_core.findings import WARNING, Finding
from ...lora_core.messages import message
from ...lora_core.text import format_count
from .. import host

EVENT = "qwen_edit_lora.finding"

logger = logging.getLogger(__name__)

#: Nodes that show a finding of an earlier sampling.
_flagged: set[host.RunningNode] = set()


def describe_idle(idle: list[str], count: int) -> Finding | None:
    """What to say of the modules `idle` out of `count`; None if there are none."""
    if not idle:
        return None
    if len(idle) == count:
        text = message(
            "the model ran none of the {count} modules the LoRA acts on, so the image is "
            "that of the base; another extension runs modules of its own. Use mode 'merge'",
            count=count,
        )
    else:
        text = message(
            "the model did not run {num_idle} of the {num_modules} the LoRA acts on, such "
            "as {idle}, so their part is missing from the image; ComfyUI or another "
            "extension computes them in another way. Use mode 'merge'",
            num_idle=len(idle),
            num_modules=format_count(count, "module"),
            idle=idle[0],
        )
    return Finding("modules_not_run", WARNING, text, len(idle))


def report_idle(
    ran: Mapping[str, bool], paths_by_node: Iterable[tuple[host.RunningNode | None, list[str]]]
) -> tuple[Finding, ...]:
    """Logs and sends one finding per node that applied modules which did not run.

    Args:
        ran: module path -> whether the model ran it.
        paths_by_node: each node with the modules it applied.
    """
    found = []
    for node, paths in paths_by_node:
        finding = describe_idle([path for path in paths if not ran[path]], len(paths))
        if finding is not None:
            found.append(finding)
            logger.warning("Apply Qwen Edit LoRA: %s", finding.text)
        if node is None:
            continue
        if finding is not None or node in _flagged:
            (_flagged.discard if finding is None else _flagged.add)(node)
            shown = None if finding is None else asdict(finding)
            host.send_event(EVENT, {"node": node.shown, "source": node.id, "finding": shown})
    return tuple(found)
