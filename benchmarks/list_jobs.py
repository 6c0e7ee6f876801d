"""Time to list training jobs, with the SQLite index over their folders and without it.

usage: .venv/bin/python benchmarks/list_jobs.py [--jobs 500] [--rounds 7]

Real job folders, as `JobStore.submit` writes them. First: the list of a fresh store, as after a
restart. Next: the one after it. Changed: after another process wrote one job's state. Without the
index the same code reads the folders, and remembers what it read. Wall time and CPU time, medians,
alternating; files in the system's cache. With nothing in it, see --drop (needs root).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from lora_core.jobs.store import JobStore  # noqa: E402
from lora_core.training.config.config_files import config_from_dict  # noqa: E402


class NoIndex:
    """What the list calls of `JobIndex`, with nothing in it."""

    def is_open(self) -> bool:
        return True

    def read(self) -> dict[str, Any]:
        return {}

    def update(self, changed: Any, gone: Any = ()) -> None:
        pass


def open_store(root: Path, has_index: bool) -> JobStore:
    store = JobStore(root)
    if not has_index:
        store.catalog.index = NoIndex()
    return store


def make_jobs(root: Path, count: int) -> None:
    store = JobStore(root)
    (root / "base.safetensors").touch()
    (root / "set").mkdir()
    places = {"source": str(root / "base.safetensors")}, {"folder": str(root / "set")}
    for number in range(count):
        values = {"name": f"edit {number}", "output": "run", "steps": 2000}
        values |= dict(zip(("model", "data"), places, strict=True))
        store.submit(config_from_dict(values), key=f"key {number}")
    store.list()


def measure(action: Callable[[], Any], times: dict[str, list[float]]) -> Any:
    wall, cpu = time.perf_counter(), time.process_time()
    result = action()
    times.setdefault("ms", []).append((time.perf_counter() - wall) * 1e3)
    times.setdefault("ms of CPU", []).append((time.process_time() - cpu) * 1e3)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--drop", action="store_true", help="empty the system's file cache first")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        make_jobs(root, options.jobs)
        times: dict[str, dict[str, list[float]]] = {}
        for number in range(options.rounds):
            for which, has_index in (("index", True), ("folders", False)):
                store = open_store(root, has_index)
                if options.drop:
                    Path("/proc/sys/vm/drop_caches").write_text("3")
                jobs = measure(store.list, times.setdefault(f"first, {which}", {}))
                assert len(jobs) == options.jobs
                measure(store.list, times.setdefault(f"next, {which}", {}))
                folder = store.open_folder(jobs[number].id)
                folder.write_state(dataclasses.replace(jobs[number].state, step=number))
                measure(store.list, times.setdefault(f"changed, {which}", {}))
                JobStore(root).list()  # the index of both is up to date again
        print(
            json.dumps(
                {
                    task: {unit: round(statistics.median(found), 1) for unit, found in by.items()}
                    for task, by in times.items()
                },
                indent=1,
            )
        )


if __name__ == "__main__":
    main()
