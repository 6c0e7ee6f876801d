"""The check's results: one JSON line per value, written immediately, and a table at the end."""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

FIGURE, MUST, GOAL, SKIPPED, FAILED = KINDS = ("figure", "must", "goal", "skipped", "failed")
#: Number of traceback lines in a record.
TAIL_LINES = 6


@dataclass(frozen=True)
class Record:
    """One line of results.jsonl."""

    part: str
    name: str
    value: float | str | None
    unit: str
    kind: str
    """"must" has to hold; "goal" is aimed at, and told when missed; "failed" is an item that did
    not run to its end."""
    limit: str
    """Such as "<= 68"; empty where there is none."""
    passed: bool | None
    """None where nothing is asked of the value."""
    note: str
    card: str
    command: str
    date: str


class Recorder:
    """Writes the records of one part.

    Args:
        deadline: a `time.time`; what would not finish before it is skipped.
        is_dry: limits of time and memory, meaningful on a GPU only, are not judged.
    """

    def __init__(
        self, part: str, path: Path, card: str, command: str, deadline: float, is_dry: bool
    ):
        self.part, self.path, self.card, self.command = part, path, card, command
        self.deadline, self.is_dry = deadline, is_dry

    def figure(self, name: str, value: float | str | None, unit: str = "", note: str = "") -> None:
        """A value without a requirement."""
        self.write(name, value, unit, FIGURE, note=note)

    def must(self, name: str, passed: bool, value: float | str = "", note: str = "") -> None:
        """A requirement on every machine, including in a dry run."""
        self.write(name, value, "", MUST, "", bool(passed), note)

    def limit(self, name: str, value: float, unit: str, limit: str, note: str = "") -> None:
        """A value that must be within its limit on a GPU."""
        self.judge(name, value, unit, MUST, limit, note)

    def goal(self, name: str, value: float, unit: str, limit: str, note: str = "") -> None:
        """A value that should be within its limit on a GPU."""
        self.judge(name, value, unit, GOAL, limit, note)

    def skip(self, name: str, reason: str) -> None:
        self.write(name, None, "", SKIPPED, note=reason)

    def judge(
        self, name: str, value: float, unit: str, kind: str, limit: str, note: str = ""
    ) -> None:
        passed = None if self.is_dry else is_within(value, limit)
        self.write(name, value, unit, kind, limit, passed, note)

    @contextmanager
    def item(self, name: str) -> Iterator[None]:
        """A block whose failure becomes a record and does not stop the rest.

        Use it as `with recorder.item("name"): ...`; if the remaining time may not suffice, check
        `has_time` first.
        """
        started = time.monotonic()
        try:
            yield
        except Exception as e:  # noqa: BLE001  the rest must go on
            self.fail(name, e)
        finally:
            spent = time.monotonic() - started
            print(f"{self.part} ({name}: {spent:.1f} s)", file=sys.stderr, flush=True)

    def has_time(self, name: str, seconds: float) -> bool:
        """Whether this many seconds are left; if not, records `name` as skipped."""
        left = self.deadline - time.time()
        if left >= seconds:
            return True
        self.skip(name, f"needs about {seconds:.0f} s, and {max(0.0, left):.0f} s are left")
        return False

    def fail(self, name: str, error: BaseException) -> None:
        lines = "".join(traceback.format_exception(error)).splitlines()
        print("\n".join(lines), file=sys.stderr, flush=True)
        lines = [line for line in lines if line.strip(" ^~")]
        self.write(name, None, "", FAILED, "", False, " | ".join(lines[-TAIL_LINES:]))

    def write(
        self,
        name: str,
        value: float | str | None,
        unit: str,
        kind: str,
        limit: str = "",
        passed: bool | None = None,
        note: str = "",
    ) -> None:
        date = datetime.now(timezone.utc).isoformat(timespec="seconds")
        record = Record(
            *(self.part, name, value, unit, kind, limit, passed, note),
            *(self.card, self.command, date),
        )
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(record)) + "\n")
        print(describe(record), flush=True)


def is_within(value: float, limit: str) -> bool:
    """Whether a value satisfies "<= 5", ">= 5", "< 5" or "== 5"; NaN satisfies none."""
    sign, _, number = limit.partition(" ")
    bound = float(number)
    compared = {
        "<=": value <= bound,
        ">=": value >= bound,
        "<": value < bound,
        "==": value == bound,
    }
    return compared[sign]


def read_records(path: Path) -> list[Record]:
    """All complete lines; a killed process may have left a partial line."""
    records = []
    if not path.is_file():
        return records
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(Record(**json.loads(line)))
        except (ValueError, TypeError):
            continue
    return records


def show(value: float | str | None) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "" if value is None else str(value)
    return f"{value:.4g}" if abs(value) < 1e5 else f"{value:.3e}"


def format_verdict(record: Record) -> str:
    if record.kind in (SKIPPED, FAILED):
        return record.kind
    if record.passed is None:
        return ""
    if record.passed:
        return "ok" if record.kind == MUST else "reached"
    return "BROKEN" if record.kind == MUST else "missed"


def describe(record: Record) -> str:
    """One line for a terminal."""
    parts = [record.part, record.name, show(record.value), record.unit]
    parts += [f"({record.limit})" if record.limit else "", format_verdict(record)]
    text = " ".join(part for part in parts if part)
    return f"{text}: {record.note}" if record.note else text


def print_table(records: list[Record], columns: int = 100) -> None:
    """Prints the requirements and their results, failures last: a terminal shows the end."""
    judged = [r for r in records if r.passed or (r.kind == SKIPPED)]
    bad = [r for r in records if r.passed is False]
    for record in (*judged, *bad):
        value = " ".join(part for part in (show(record.value), record.unit) if part)
        line = f"{record.part}  {record.name:52.52} {value:>16} {record.limit:>8}  "
        line += format_verdict(record)
        print(line[: columns + 20], flush=True)
        if record.note and record.kind in (SKIPPED, FAILED):
            print(f"     {record.note[-400:]}", flush=True)
    counts = {
        "must hold": [r for r in records if r.kind == MUST and r.passed is not None],
        "goals": [r for r in records if r.kind == GOAL and r.passed is not None],
    }
    for name, some in counts.items():
        print(f"{name}: {sum(bool(r.passed) for r in some)} of {len(some)}", flush=True)
    skipped, failed = (sum(r.kind == kind for r in records) for kind in (SKIPPED, FAILED))
    print(f"skipped: {skipped}, failed: {failed}, figures: {len(records)}", flush=True)


def has_failed(records: list[Record]) -> bool:
    """Whether a requirement is violated, or something did not run; goals do not count."""
    return any(r.kind == FAILED or (r.kind == MUST and r.passed is False) for r in records)
