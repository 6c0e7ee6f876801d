"""Whether an adapter is usable: a level and the sentences behind it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from ..base_model import module_paths
from ..findings import ERROR, NOTE, WARNING, Finding
from ..inspection.inspection import Inspection, ModuleInspection
from ..inspection.verdict import NOTHING
from ..messages import message

#: Worst first. "unknown": nothing to judge, such as an OFT without its base.
LEVELS = ("broken", "warning", "unknown", "healthy")

_LEVELS_BY_SEVERITY = {ERROR: "broken", WARNING: "warning", NOTE: "healthy"}

#: Not kept: the next session tries again.
UNEXPECTED = message("it could not be inspected; ComfyUI's log says why")


@dataclass(frozen=True)
class Health:
    level: str
    """One of LEVELS."""
    sentence: str
    """The one that decided the level."""
    sentences: tuple[str, ...]
    modules: tuple[dict[str, str | float | None], ...] = ()
    """Name inside a block, the std of its deltas over all blocks, their mean effective rank."""


def judge_health(inspection: Inspection, warnings: Iterable[str] = ()) -> Health:
    """
    Args:
        warnings: of the load report; each is at least a warning.
    """
    graded = [(get_level(finding), finding.text) for finding in inspection.findings]
    graded += [("warning", sentence) for sentence in warnings]
    graded.sort(key=lambda pair: LEVELS.index(pair[0]))  # stable: the most severe keep their order
    level = graded[0][0]
    # Of a healthy one the last sentence describes it.
    sentence = graded[-1][1] if level == "healthy" else graded[0][1]
    return Health(level, sentence, tuple(text for _, text in graded), summarise(inspection))


def get_level(finding: Finding) -> str:
    return "unknown" if finding.kind == NOTHING else _LEVELS_BY_SEVERITY[finding.severity]


def summarise(inspection: Inspection) -> tuple[dict[str, str | float | None], ...]:
    groups: dict[str, list[ModuleInspection]] = defaultdict(list)
    for path, module in inspection.modules.items():
        groups[module_paths.split_path(path)[1]].append(module)
    return tuple(
        {
            "name": name,
            "std": finite_or_none(math.sqrt(sum(m.std**2 for m in modules) / len(modules))),
            "effective_rank": finite_or_none(sum(m.effective_rank for m in modules) / len(modules)),
        }
        for name, modules in groups.items()
    )


def finite_or_none(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else None
