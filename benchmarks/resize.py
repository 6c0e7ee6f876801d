"""Time to reduce a LoRA's rank, compared with the methods of other tools.

usage: .venv/bin/python benchmarks/resize.py [--rank 64] [--to 16] [--rounds 3] [--full]

One real block (12 attention and MLP modules, width 3072, bf16 factors), measured alternately in one
run: ours against the SVD of the whole product, as in kohya's resize and extraction scripts (thin
here, full there: this favours the peer), and against the float32 QR core of KJNodes' rank
reduction, which measures no loss. With --full, also ours on a whole file of 720 modules.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import torch
from inspect_adapter import make_state_dict, take
from safetensors.torch import save_file

from lora_core import Adapter, compute_delta, read_adapter, resize_adapter


def resize_by_full_svd(adapter: Adapter, rank: int) -> None:
    for weights in adapter.modules.values():
        u, values, vh = torch.linalg.svd(compute_delta(weights), full_matrices=False)
        (u[:, :rank] * values[:rank]).bfloat16(), vh[:rank].bfloat16()


def resize_by_float32_core(adapter: Adapter, rank: int) -> None:
    for weights in adapter.modules.values():
        q_up, r_up = torch.linalg.qr(weights.lora_B.float() * weights.scale)
        q_down, r_down = torch.linalg.qr(weights.lora_A.float().T)
        u, values, vh = torch.linalg.svd(r_up @ r_down.T)
        (q_up @ (u[:, :rank] * values[:rank])).bfloat16(), (vh[:rank] @ q_down.T).bfloat16()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--to", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--full", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "block.safetensors")
        save_file(make_state_dict(1, options.rank), path)
        adapter = read_adapter(path)
        ways = {
            "ours": lambda: resize_adapter(adapter, rank=options.to),
            "full SVD": lambda: resize_by_full_svd(adapter, options.to),
            "float32 core": lambda: resize_by_float32_core(adapter, options.to),
        }
        times = {name: [] for name in ways}
        ways["ours"]()
        for _ in range(options.rounds):
            for name, way in ways.items():
                times[name].append(take(way))
        medians = {name: statistics.median(values) for name, values in times.items()}
        ratios = {f"{name} / ours": medians[name] / medians["ours"] for name in ways}
        print(json.dumps({"one block, seconds": medians, **ratios}), flush=True)
        if options.full:
            path = Path(folder, "full.safetensors")
            save_file(make_state_dict(60, options.rank), path)
            adapter = read_adapter(path)
            print(
                json.dumps(
                    {"full file, seconds": take(lambda: resize_adapter(adapter, rank=options.to))}
                )
            )


if __name__ == "__main__":
    main()
