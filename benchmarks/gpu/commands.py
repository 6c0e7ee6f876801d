"""The project's command line inside this process, so that many runs share one import."""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .devices import Peak
from .extension import import_extension
from .settings import Context

import_extension()


@dataclass
class Outcome:
    """The result of one command line."""

    status: int
    stdout: str
    stderr: str
    seconds: float
    peak_bytes: int
    reserved_bytes: int
    """With what torch's allocator holds beside the tensors, which an estimate counts too."""
    num_ooms: int = 0
    """Times that the allocator found no memory."""
    reports: list[dict[str, Any]] = field(default_factory=list)
    """The JSON objects that it printed, one a line."""

    @property
    def step_s(self) -> float:
        """Median seconds of the steps after the first."""
        seconds = sorted(report["seconds"] for report in self.reports[1:] or self.reports)
        return seconds[len(seconds) // 2] if seconds else float("nan")

    def explain(self) -> str:
        return " | ".join(self.stderr.strip().splitlines()[-4:])


def run_command(
    context: Context, arguments: Sequence[str], prepare: Callable[[], None] = lambda: None
) -> Outcome:
    """Runs `python -m lora_core ARGUMENTS` here.

    Args:
        prepare: called first, with its output captured too.
    """
    from qwen_edit_lora.lora_core.__main__ import main

    out, err = io.StringIO(), io.StringIO()
    peak = Peak(context.device)
    before = count_ooms(context.device)
    started = time.perf_counter()
    with redirect_stdout(out), redirect_stderr(err):
        prepare()
        status = main([str(argument) for argument in arguments])
    seconds = time.perf_counter() - started
    print(err.getvalue(), file=sys.stderr, end="", flush=True)
    return Outcome(
        *(status, out.getvalue(), err.getvalue(), seconds, *peak.read()),
        num_ooms=count_ooms(context.device) - before,
        reports=read_json_lines(out.getvalue()),
    )


def count_ooms(device: str) -> int:
    return torch.cuda.memory_stats().get("num_ooms", 0) if device == "cuda" else 0


def read_json_lines(text: str) -> list[dict[str, Any]]:
    found = []
    for line in text.splitlines():
        if line.startswith("{") and line.endswith("}"):
            found.append(json.loads(line))
    return found


def write_config(context: Context, name: str, base: str = "bf16", **changes: Any) -> Path:
    """A configuration with defaults except `changes`, by dotted name with "__" for the dot."""
    folder = context.folder / name
    values: dict[str, Any] = {
        "name": "check",
        "output": str(folder),
        "steps": 3,
        "model": {"source": str(context.folder / f"{base}.safetensors")},
        "data": {"folder": str(context.folder / "data")},
    }
    for key, value in changes.items():
        *sections, last = key.split("__")
        table = values
        for section in sections:
            table = table.setdefault(section, {})
        table[last] = value
    path = context.folder / f"{name}.json"
    path.write_text(json.dumps(values))
    return path
