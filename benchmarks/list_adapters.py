"""CPU time of listing, loading and inspecting LoRAs, compared with plain JSON and older code.

usage: .venv/bin/python benchmarks/list_adapters.py [--files 500] [--rounds 15] [--against 1dd73ba]

The library's cache of facts and health, read as after a restart, alternates in one run with a plain
peer that checks nothing: json.loads, then the dataclasses. With --against, a revision of this
repository is checked out to a temporary folder, and both do the same work in alternating processes:
the first list after a restart and the next one, what the Load node does with a file, its check for
NaN and Inf, and an inspection. Ratios of medians; threads off.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BLOCKS = 60
RANK = 16
NAMES = ("to_q", "to_k", "to_v", "to_out.0")


def measure(action: Callable[[], Any]) -> float:
    """Milliseconds of CPU."""
    gc.collect()
    start = time.process_time()
    action()
    return (time.process_time() - start) * 1e3


def alternate(actions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    for action in actions.values():
        action()
    times: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(rounds):
        for name, action in actions.items():
            times[name].append(measure(action))
    return {name: statistics.median(found) for name, found in times.items()}


def make_adapter(path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    state_dict = {}
    for block in range(BLOCKS):
        for name in NAMES:
            stem = f"transformer.transformer_blocks.{block}.attn.{name}"
            for end in "AB":
                shape = (RANK, 512) if end == "A" else (512, RANK)
                values = torch.randn(shape, generator=generator) * 0.02
                state_dict[f"{stem}.lora_{end}.weight"] = values.bfloat16()
    metadata = {"modelspec.title": "a title", "trigger_words": "one, two"}
    save_file(state_dict, path, metadata)


def fill(folder: Path, cache: Path, num_files: int) -> dict[str, Path]:
    """Writes the cache that a library of so many files like the one in the folder would have."""
    module = importlib.import_module("lora_core.library.cache")
    health = importlib.import_module("lora_core.library.health")
    library = importlib.import_module("lora_core.library.library")
    entry = getattr(module, "CacheEntry", None) or module.Known
    read_fingerprint = getattr(library, "read_fingerprint", None) or library.read_stamp
    facts = library.read_facts(folder / "0.safetensors")
    modules = tuple({"name": f"attn.{n}", "std": 1.234567e-4, "effective_rank": 7.5} for n in NAMES)
    judged = health.Health("healthy", "s" * 200, ("s" * 200,) * 3, modules * 3)
    files = {path.name: path for path in folder.iterdir()}
    for number in range(len(files), num_files):
        path = folder / f"{number}.safetensors"
        path.hardlink_to(folder / "0.safetensors")
        files[path.name] = path
    known = {n: entry(read_fingerprint(path, ()), facts, judged) for n, path in files.items()}
    module.write_cache(cache, known)
    return files


def restore_unchecked(cache: Path) -> dict[str, Any]:
    """The peer: the same objects, whatever the file holds."""
    from lora_core.library.cache import CacheEntry
    from lora_core.library.facts import AdapterFacts
    from lora_core.library.health import Health

    def with_tuples(values: dict[str, Any]) -> dict[str, Any]:
        return {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}

    saved = json.loads(cache.read_text(encoding="utf-8"))
    return {
        name: CacheEntry(
            tuple(values["stamp"]),
            AdapterFacts(**with_tuples(values["facts"])),
            Health(**with_tuples(values["health"])),
            messages=values["messages"],
        )
        for name, values in saved["adapters"].items()
    }


def compare_with_peer(num_files: int, rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder, cache = Path(name, "loras"), Path(name, "adapters.json")
        folder.mkdir()
        make_adapter(folder / "0.safetensors")
        sys.path[0] = str(ROOT)
        fill(folder, cache, num_files)
        from lora_core.library.cache import read_cache

        assert read_cache(cache) == restore_unchecked(cache)
        assert len(read_cache(cache)) == num_files
        ways = {"ours": lambda: read_cache(cache), "plain": lambda: restore_unchecked(cache)}
        times = alternate(ways, rounds)
    return {"read the cache, ms of CPU": times, "ours / plain": times["ours"] / times["plain"]}


def run_child(root: Path, folder: Path, num_files: int) -> None:
    """All the work of one process, with the code in `root`; prints milliseconds by name."""
    sys.path[0] = str(root)
    import torch

    torch.set_num_threads(1)
    core = importlib.import_module("lora_core")
    inspection = importlib.import_module("lora_core.inspection")
    if not hasattr(inspection, "inspect_adapter"):  # a package since
        inspection = importlib.import_module("lora_core.inspection.inspection")
    library = importlib.import_module("lora_core.library.library")
    path = folder / "0.safetensors"
    with tempfile.TemporaryDirectory() as name:
        cache = Path(name, "adapters.json")
        files = fill(folder, cache, num_files)

        def list_anew() -> Any:
            made = library.AdapterLibrary(lambda: files, cache)
            answer = made.list()
            assert answer["pending"] == 0
            return made

        def load() -> None:
            adapter = core.read_adapter(path)
            adapter.report.to_text()
            core.build_state_dict(adapter)

        opened, adapter = list_anew(), core.read_adapter(path)
        actions = {
            "first list": list_anew,
            "list again": opened.list,
            "load": load,
            "check for NaN": lambda: core.read_adapter(path).check_finite(),
            "inspect": lambda: inspection.inspect_adapter(adapter),
        }
        print(json.dumps(alternate(actions, 7)))


def compare_with(revision: str, num_files: int, rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        old, folder = Path(name, "old"), Path(name, "loras")
        folder.mkdir()
        make_adapter(folder / "0.safetensors")
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--detach", str(old), revision], check=True, stdout=2)
        try:
            times: dict[str, dict[str, list[float]]] = {"ours": {}, revision: {}}
            for _ in range(rounds):
                for which, root in (("ours", ROOT), (revision, old)):
                    command = [sys.executable, __file__, "--child", str(root), str(folder)]
                    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
                    found = subprocess.run(
                        [*command, "--files", str(num_files)],
                        **{"env": environment, "check": True, "stdout": subprocess.PIPE},
                    )
                    for task, value in json.loads(found.stdout).items():
                        times[which].setdefault(task, []).append(value)
        finally:
            subprocess.run([*git, "remove", "--force", str(old)], check=True)
    medians = {w: {t: statistics.median(v) for t, v in by.items()} for w, by in times.items()}
    ratios = {task: medians["ours"][task] / medians[revision][task] for task in medians["ours"]}
    return {"ms of CPU": medians, f"ours / {revision}": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--against", metavar="REVISION")
    parser.add_argument("--child", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        run_child(*options.child, options.files)
        return
    print(json.dumps(compare_with_peer(options.files, options.rounds)), flush=True)
    if options.against:
        print(json.dumps(compare_with(options.against, options.files, max(3, options.rounds // 3))))


if __name__ == "__main__":
    main()
