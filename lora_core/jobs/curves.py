"""A job's metrics as curves to draw: read once, thinned without losing their extremes."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import FileError, MissingFileError, get_reason
from ..training.run.metrics import METRIC_NAMES, parse_row
from .folder import open_inside

#: One value for each step.
CURVES = ("step", *METRIC_NAMES)
#: Taken every `saving.health_every` steps; see `training.run.health`.
HEALTH = ("std", "spectral", "effective_rank")

Row = Mapping[str, Any]


class MetricsReader:
    """Follows metrics files that grow: a second read parses only the new lines.

    Keeps the rows of the last `capacity` files. May be used by several threads.
    """

    def __init__(self, capacity: int = 8):
        self.capacity = capacity
        self._lock = threading.Lock()
        self._known: dict[Path, tuple[int, int, list[Row]]] = {}

    def read(self, path: Path) -> list[Row]:
        """One dictionary per step; [] where there is no file yet.

        A half-written last line waits; lines that cannot be read are left out.

        Raises:
            FileError: the file cannot be read.
        """
        with self._lock:
            try:
                with open_inside(path) as file:
                    return list(self._read_on(path, file))
            except MissingFileError:
                return []
            except FileError:
                self._known.pop(path, None)
                raise
            except OSError as e:
                self._known.pop(path, None)
                raise FileError(
                    "{path} cannot be read: {reason}", path=path.name, reason=get_reason(e)
                ) from None

    def _read_on(self, path: Path, file: Any) -> list[Row]:
        found = os.fstat(file.fileno())
        # A run that resumes after a kill replaces the file by a shorter one (MetricsFile.cut).
        inode, offset, rows = self._known.pop(path, (found.st_ino, 0, []))
        if inode != found.st_ino or offset > found.st_size:
            offset, rows = 0, []
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                break
            row = parse_row(line)
            if row is not None:
                rows.append(row)
            offset += len(line)
        self._known[path] = (found.st_ino, offset, rows)  # the newest last
        while len(self._known) > self.capacity:
            del self._known[next(iter(self._known))]
        return rows


def thin_out(rows: Sequence[Row], max_points: int) -> list[Row]:
    """At most `max_points` rows, in order: of each stretch those of its smallest and largest loss.

    The first and the last row are always among them.
    """
    if len(rows) <= max_points:
        return list(rows)
    num_stretches = max(1, (max_points - 2) // 2)
    inner = rows[1:-1]
    kept: list[Row] = [rows[0]]
    for i in range(num_stretches):
        stretch = inner[len(inner) * i // num_stretches : len(inner) * (i + 1) // num_stretches]
        if not stretch:
            continue
        extremes = {
            id(row): row for row in (min(stretch, key=get_loss), max(stretch, key=get_loss))
        }
        kept += sorted(extremes.values(), key=lambda row: row["step"])
    return [*kept, rows[-1]]


def get_loss(row: Row) -> float:
    return row.get("loss") or 0.0


def build_curves(rows: Sequence[Row], max_points: int) -> dict[str, list[Any]]:
    """Name of a curve -> its values, None where a step has none; all of one length."""
    points = thin_out(rows, max_points)
    return {name: [point.get(name) for point in points] for name in CURVES}


def build_health(rows: Sequence[Row], max_points: int) -> dict[str, list[Any]]:
    """As `build_curves`, with "step", for the steps at which the deltas were measured."""
    checks = [row for row in rows if row.get("health")]
    every = -(-len(checks) // max_points) or 1
    checks = checks[::-every][::-1]  # always with the last one
    values = {name: [check["health"].get(name) for check in checks] for name in HEALTH}
    return {"step": [check["step"] for check in checks], **values}
