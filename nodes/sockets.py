"""Socket types and schema parts that several nodes share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from comfy_api.latest import io

from ..lora_core import Adapter, ConfigError, read_state_dict
from ..lora_core.findings import NOTE, Finding
from ..lora_core.messages import message
from . import host

if TYPE_CHECKING:
    from ..lora_core.jobs.job import Job

CATEGORY = "Qwen Edit LoRA"

AdapterSocket = io.Custom("QWEN_EDIT_LORA")
#: An `EditDataset` of lora_core/pairs/cache.py.
DatasetSocket = io.Custom("QWEN_EDIT_DATASET")


def adapter_input(id: str = "adapter", **kwargs: Any) -> io.MultiType.Input:
    """A socket that takes both our adapters and ComfyUI's LORA_MODEL."""
    kwargs.setdefault(
        "tooltip",
        "The adapter: from Load Qwen Edit LoRA, or a LORA_MODEL from ComfyUI's own training node.",
    )
    return io.MultiType.Input(id, types=[AdapterSocket, io.LoraModel], **kwargs)


def strength_input(id: str = "strength", **kwargs: Any) -> io.Float.Input:
    return io.Float.Input(id, default=1.0, min=-100.0, max=100.0, step=0.05, round=0.001, **kwargs)


def report_output() -> io.String.Output:
    return io.String.Output("report", display_name="report")


def take_adapter(value: Any) -> Adapter:
    """The adapter behind a socket value; a LORA_MODEL is a plain state dict."""
    if isinstance(value, Adapter):
        return value
    if isinstance(value, dict):
        return read_state_dict(value, name=message("the connected LORA_MODEL"))
    raise ConfigError(
        "the adapter input got a {name}; expected the output of Load Qwen Edit LoRA or a "
        "LORA_MODEL",
        name=type(value).__name__,
    )


def build_image(pixels: np.ndarray) -> torch.Tensor:
    """uint8 (height, width, 3) -> an IMAGE with a batch of one."""
    return torch.from_numpy(pixels).float().div(255)[None]


class Report(str):
    """A report's text, in the user's language, for any STRING input; with its findings as data."""

    findings: tuple[Finding, ...]

    def __new__(cls, text: str, findings: Iterable[Finding] = ()) -> Report:
        report = super().__new__(cls, host.translate(text))
        report.findings = tuple(findings)
        return report


def get_findings(report: str) -> tuple[Finding, ...]:
    """() for a text from other nodes."""
    return report.findings if isinstance(report, Report) else ()


def show_report(
    report: str, node_id: str = "", *, warning: bool = False, num_shown: int | None = None
) -> dict[str, list]:
    """The `ui` part of a NodeOutput; web/report.js draws it on the node.

    Args:
        node_id: of a node that also runs inside others, so that they do not show its report as
            their own.
        warning: colors the node amber even if no finding does.
        num_shown: lines before the figures, which the page folds; the first says what to do.
    """
    findings = get_findings(report)
    shown: dict[str, list] = {
        "qwen_edit_lora_report": [str(report)],
        "qwen_edit_lora_warning": [warning or any(f.severity != NOTE for f in findings)],
        "qwen_edit_lora_findings": host.translate([asdict(finding) for finding in findings]),
    }
    if num_shown is not None:
        shown["qwen_edit_lora_num_shown"] = [num_shown]
    return {**shown, "qwen_edit_lora_node": [node_id]} if node_id else shown


def show_job(job: Job, aging: Sequence[str]) -> dict[str, list]:
    """The `ui` part that makes web/job_view.js show a training live on the node.

    Args:
        aging: lines of the report that are true of the job's present status and step only; the page
            hides them as soon as the live view shows another.
    """
    return {
        "qwen_edit_lora_job": [job.id],
        "qwen_edit_lora_reported": [job.status.value, job.state.step],
        "qwen_edit_lora_aging": host.translate(list(aging)),
    }
