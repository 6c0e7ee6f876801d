"""A run's metrics: one JSON line per step, and reports for observers."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...disk.json_reader import parse_json
from ...disk.own_folders import is_link
from ...disk.regular_files import open_regular
from ...disk.writing import explain, write_then_rename
from ...errors import FileError
from ...messages import message
from ...text import format_bytes, format_duration
from ..machine.memory import read_resident_size

METRICS_FILE = "metrics.jsonl"
#: The numbers of a line that are drawn as curves.
METRIC_NAMES = (
    *("loss", "smoothed_loss", "learning_rate", "grad_norm"),
    *("tokens_per_s", "seconds", "memory_bytes"),
)
#: No run has so many; a line with a later step is not ours.
MAX_STEPS = 2**53
#: Weight of the past in the smoothed loss, of about 50 steps' memory.
SMOOTHING = 0.98


@dataclass(frozen=True)
class StepReport:
    """One optimizer step."""

    step: int
    """Counted from 1."""
    num_steps: int
    epoch: int
    loss: float
    """Mean over the step's samples, the prior's and auxiliary losses included."""
    smoothed_loss: float
    """Exponential average of the losses, without the bias of its start."""
    learning_rate: float
    grad_norm: float
    """Before clipping."""
    tokens_per_s: float
    seconds: float
    memory_bytes: int
    """Peak allocation of the device so far; the process's memory on a CPU."""
    parts: Mapping[str, float] | None = None
    """The loss by its parts, where there is more than the velocity's."""
    health: Mapping[str, float] | None = None
    """Statistics of some modules' deltas; see `health.measure_health`."""
    checkpoint: str | None = None
    """Name of the checkpoint written after this step."""
    adapters: tuple[str, ...] = ()
    """Names of the adapter files written after this step."""

    def to_dict(self) -> dict[str, Any]:
        """Without empty fields."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {name: value for name, value in values.items() if value not in (None, ())}


@dataclass
class SmoothedLoss:
    """An exponential average whose first values count fully (Adam's bias correction)."""

    total: float = 0.0
    weight: float = 0.0

    def update(self, loss: float) -> float:
        self.total = SMOOTHING * self.total + (1 - SMOOTHING) * loss
        self.weight = SMOOTHING * self.weight + (1 - SMOOTHING)
        return self.total / self.weight


def describe_report(report: StepReport) -> str:
    """A line for a terminal or a log."""
    parts = ", ".join(f"{name} {loss:.4f}" for name, loss in (report.parts or {}).items())
    remaining_s = round(report.seconds * (report.num_steps - report.step))
    return (
        f"step {report.step}/{report.num_steps}  loss {report.loss:.4f} "
        f"({report.smoothed_loss:.4f}){f' = {parts}' if parts else ''}  "
        f"lr {report.learning_rate:.2e}  grad {report.grad_norm:.3g}  "
        f"{format_duration(report.seconds)}  {report.tokens_per_s:.0f} tokens/s  "
        f"{format_bytes(report.memory_bytes, 1024)}  {format_duration(remaining_s)} left"
    )


class MetricsFile:
    """metrics.jsonl, to which each step adds one line."""

    def __init__(self, folder: Path):
        self.path = folder / METRICS_FILE

    def append(self, report: StepReport) -> None:
        """Adds a line.

        Raises:
            FileError: the disk is full, the folder read-only, or the file a link.
        """
        line = json.dumps(report.to_dict()) + "\n"
        try:
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
            flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
            with os.fdopen(os.open(self.path, flags, 0o666), "a", encoding="utf-8") as file:
                file.write(line)
        except OSError as e:
            reason = message("it is a link; remove it") if is_link(self.path) else explain(e)
            raise FileError(
                "{path} cannot be written: {reason}.", path=self.path.name, reason=reason
            ) from None

    def synchronize(self) -> None:
        """Flushes the lines to disk, so that no checkpoint is newer than they are.

        Raises:
            FileError: the disk does not take them.
        """
        try:
            if self.path.exists():
                with self.path.open("rb+") as file:
                    os.fsync(file.fileno())
        except OSError as e:
            raise FileError(
                "{path} cannot be written: {reason}.", path=self.path.name, reason=explain(e)
            ) from None

    def cut(self, step: int) -> int:
        """Drops what a killed run wrote after its last checkpoint, of `step`, or half wrote.

        Returns:
            How many lines cannot be read and are dropped too; metrics never stop a run.

        Raises:
            FileError: the file cannot be read or written.
        """
        if not self.path.exists():
            if is_link(self.path):  # to nothing: the lines to come would be written there
                self.path.unlink()
            return 0
        try:
            with open_regular(self.path) as file:
                lines = file.read().split(b"\n")[:-1]
            rows = [row for line in lines if (row := parse_row(line)) is not None]
            kept = "".join(json.dumps(row) + "\n" for row in rows if row["step"] <= step)
            write_then_rename(self.path, lambda new: new.write_text(kept, encoding="utf-8"))
        except OSError as e:
            raise FileError(
                "{path} cannot be written: {reason}.", path=self.path.name, reason=explain(e)
            ) from None
        return len(lines) - len(rows)


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a metrics file, except unreadable ones and a truncated last one."""
    with open_regular(path) as file:
        for line in file:
            if line.endswith(b"\n") and (row := parse_row(line)) is not None:
                yield row


def parse_row(line: bytes) -> dict[str, Any] | None:
    """One step's metrics; None for an invalid line, such as one that a crash truncated."""
    try:
        row = parse_json(line, METRICS_FILE)
    except FileError:
        return None
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        return None
    if not 0 <= row["step"] < MAX_STEPS:
        return None
    health = row.get("health", {})
    numbers = [row.get(name) for name in METRIC_NAMES]
    numbers += health.values() if isinstance(health, dict) else ["no statistics"]
    is_whole = all(x is None or (type(x) in (int, float)) for x in numbers)
    return row if is_whole else None


def measure_memory(device: torch.device) -> int:
    """Bytes: peak allocation of a GPU, or this process's resident set on a CPU (0 if unknown)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return read_resident_size() or 0
