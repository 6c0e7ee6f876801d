"""Time of an inspection, compared with materialising every delta.

usage: .venv/bin/python benchmarks/inspect_adapter.py [--rank 64] [--rounds 3] [--full]

One real block (12 attention and MLP modules, width 3072, bf16 factors), measured alternately in one
run: default and exact inspection against materialise + svdvals + moments. With --full, a whole file
(720 modules, 849 MB at rank 64) generated on the fly. Ratios of medians.
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

from lora_core import Adapter, LoraWeights, compute_delta, read_adapter  # noqa: E402
from lora_core.base_model.qwen_image import QWEN_IMAGE  # noqa: E402
from lora_core.inspection.inspection import inspect_adapter  # noqa: E402


def make_state_dict(num_blocks: int, rank: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    state_dict = {}
    for block in range(num_blocks):
        for name in QWEN_IMAGE.presets["full"]:
            out, in_ = QWEN_IMAGE.compute_shape(name)
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


def take(action) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--full", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "block.safetensors")
        save_file(make_state_dict(1, options.rank), path)
        adapter = read_adapter(path)
        inspect_adapter(adapter)
        times = {"default": [], "exact": [], "materialised": []}
        for _ in range(options.rounds):
            times["default"].append(take(lambda: inspect_adapter(adapter)))
            times["exact"].append(take(lambda: inspect_adapter(adapter, exact=True)))
            times["materialised"].append(take(lambda: materialise(adapter)))
        medians = {name: statistics.median(values) for name, values in times.items()}
        print(
            json.dumps(
                {
                    "one block, seconds": medians,
                    "materialised / default": medians["materialised"] / medians["default"],
                    "materialised / exact": medians["materialised"] / medians["exact"],
                }
            ),
            flush=True,
        )
        if not options.full:
            return
        path = Path(folder, "full.safetensors")
        save_file(make_state_dict(60, options.rank), path)
        adapter = read_adapter(path)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        full = {
            "default, seconds": take(lambda: inspect_adapter(adapter)),
            "exact, seconds": take(lambda: inspect_adapter(adapter, exact=True)),
            "file, MB": path.stat().st_size / 1e6,
            "peak memory grew by, MB": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
            / 1e3,
        }
        print(json.dumps({"full file": full}))


if __name__ == "__main__":
    main()
