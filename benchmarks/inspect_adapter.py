"""Time of an inspection, compared with materialising every delta.

usage: .venv/bin/python benchmarks/inspect_adapter.py [--rank 64] [--rounds 3] [--full]
           [--family qwen-image-2.1]

One real block (all attention and MLP modules at full width, bf16 factors), measured alternately in
one run: default and exact inspection against materialise + svdvals + moments. With --full, a whole
file (at rank 64 720 modules and 849 MB, of 2.1 224 and 335 MB) made on the fly. Ratios of medians.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # for lora_core; our own folder would shadow the standard inspect module

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from lora_core import FAMILIES, Adapter, Family, LoraWeights, compute_delta, read_adapter  # noqa: E402  # noqa: E402
from lora_core.inspection.inspection import inspect_adapter  # noqa: E402


def make_state_dict(family: Family, num_blocks: int, rank: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    state_dict = {}
    for block in range(num_blocks):
        for name in family.presets["full"]:
            out, in_ = family.compute_shape(name)
            stem = f"diffusion_model.transformer_blocks.{block}.{name}"
            lora_A = torch.randn(rank, in_, generator=generator) * 0.02
            lora_B = torch.randn(out, rank, generator=generator) * 0.002
            state_dict[f"{stem}.lora_A.weight"] = lora_A.bfloat16()
            state_dict[f"{stem}.lora_B.weight"] = lora_B.bfloat16()
    return state_dict


def materialise(adapter: Adapter) -> None:
    """The usual way: the whole delta, its singular values, and passes over its entries."""
    for weights in adapter.modules.values():
        assert isinstance(weights, LoraWeights)
        delta = compute_delta(weights)
        torch.linalg.svdvals(delta)
        delta.mean(), delta.std(), delta.abs().max(), (delta.abs() < 1e-6).float().mean()


def take(action, clock=time.perf_counter) -> float:
    start = clock()
    action()
    return clock() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3, help="0: no baseline, which takes minutes")
    parser.add_argument("--full", action="store_true")
    names = [family.name for family in FAMILIES]
    parser.add_argument("--family", choices=names, default=names[0])
    options = parser.parse_args()
    family = FAMILIES[names.index(options.family)]
    with tempfile.TemporaryDirectory() as folder:
        if options.rounds:
            path = Path(folder, "block.safetensors")
            save_file(make_state_dict(family, 1, options.rank), path)
            print(json.dumps(measure_block(path, options.rounds)), flush=True)
        if options.full:
            path = Path(folder, "full.safetensors")
            save_file(make_state_dict(family, family.num_blocks, options.rank), path)
            print(json.dumps({"full file": measure_file(path)}))


def measure_block(path: Path, rounds: int) -> dict[str, object]:
    adapter = read_adapter(path)
    inspect_adapter(adapter)
    times = {"default": [], "exact": [], "materialised": []}
    for _ in range(rounds):
        times["default"].append(take(lambda: inspect_adapter(adapter)))
        times["exact"].append(take(lambda: inspect_adapter(adapter, exact=True)))
        times["materialised"].append(take(lambda: materialise(adapter)))
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "one block, seconds": medians,
        "materialised / default": medians["materialised"] / medians["default"],
        "materialised / exact": medians["materialised"] / medians["exact"],
    }


def measure_file(path: Path) -> dict[str, float]:
    adapter = read_adapter(path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "default, seconds": take(lambda: inspect_adapter(adapter)),
        "default, CPU seconds": take(lambda: inspect_adapter(adapter), time.process_time),
        "exact, seconds": take(lambda: inspect_adapter(adapter, exact=True)),
        "exact, CPU seconds": take(lambda: inspect_adapter(adapter, exact=True), time.process_time),
        "file, MB": path.stat().st_size / 1e6,
        "peak memory grew by, MB": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        / 1e3,
    }


if __name__ == "__main__":
    main()
