"""Estimate compared with an actual run: memory and seconds per step.

usage: .venv/bin/python benchmarks/estimate.py [--blocks 4] [--heads 24] [--rounds 3]
                                               [--cases plain,int8]
       .venv/bin/python benchmarks/estimate.py --device cuda --blocks 8

Random weights in a file laid out like ComfyUI's; each case is estimated, then trained, in this
process. Cases alternate round by round, since a machine's speed changes from minute to minute;
medians of the rounds are printed, and the lowest, median and highest ratio. Memory is that of
torch's allocator on a GPU; on a CPU that of the process, minus the use before by Python and its
libraries. `--cpu-time` counts CPU seconds, for a shared machine. `--quick` is only a smoke test.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from apply import import_extension

import_extension()

import torch  # noqa: E402
from qwen_edit_lora.lora_core.training.config.config_files import config_from_dict  # noqa: E402
from qwen_edit_lora.lora_core.training.data.dataset import (  # noqa: E402
    CachedItem,
    DatasetWriter,
    read_dataset,
)
from qwen_edit_lora.lora_core.training.estimate.estimate import estimate_run  # noqa: E402
from qwen_edit_lora.lora_core.training.machine.memory import MemoryMeter  # noqa: E402
from qwen_edit_lora.lora_core.training.model.architecture import Architecture  # noqa: E402
from qwen_edit_lora.lora_core.training.run.session import open_session  # noqa: E402
from qwen_edit_lora.lora_core.training.run.trainer import train  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

TEXT_WIDTH = 256
KINDS = ("estimated", "measured")
#: Case -> number of references, and settings of [model].
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "plain": (1, {}),
    "no checkpointing": (1, {"gradient_checkpointing": False}),
    "selective": (1, {"gradient_checkpointing": "selective"}),
    "auto": (1, {"gradient_checkpointing": "auto"}),
    "three references": (3, {}),
    "int8": (1, {"storage": "int8"}),
    "fp8": (1, {"storage": "fp8"}),
    "half offloaded": (1, {"offload_blocks": -2}),
    "all offloaded": (1, {"offload_blocks": -1}),
}


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--heads", type=int, default=24, help="of 128; 24 is full width")
    parser.add_argument("--side", type=int, default=32, help="of the latents; an image's / 8")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="0: all cores")
    parser.add_argument("--cases", default="", help="some of them, by comma")
    parser.add_argument("--cpu-time", action="store_true", help="not wall time")
    parser.add_argument("--quick", action="store_true", help="narrow blocks, few tokens")
    options = parser.parse_args()
    if options.quick:
        options.blocks, options.heads, options.side, options.steps = 3, 1, 8, 2
        options.rounds = 1
    return options


def write_base(path: Path, options: argparse.Namespace) -> None:
    sizes = {"num_attention_heads": options.heads, "joint_attention_dim": TEXT_WIDTH}
    model = Architecture(num_layers=options.blocks, **sizes).build_empty()
    torch.manual_seed(0)
    state_dict = {
        name: torch.empty(p.shape, dtype=torch.bfloat16).normal_(std=0.02)
        for name, p in model.named_parameters()
    }
    save_file(state_dict, path)


def write_dataset(folder: Path, side: int, num_references: int):
    item = CachedItem(
        target=torch.randn(16, side, side),
        references=tuple(torch.randn(16, side, side) for _ in range(num_references)),
        text=torch.randn(64, TEXT_WIDTH),
    )
    writer = DatasetWriter(folder)
    writer.add("item", item)
    return read_dataset(writer.finish())


def compare(name: str, folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Estimates and trains one case: seconds and bytes of each."""
    num_references, changes = CASES[name]
    dataset = write_dataset(folder / name / "data", options.side, num_references)
    offloaded = changes.get("offload_blocks", 0)
    if offloaded:  # a share of the blocks
        changes = {"offload_blocks": options.blocks // -offloaded}
    model = {"source": str(folder.parent / "base.safetensors"), "storage": options.dtype}
    model |= {"compute_dtype": options.dtype, "device": options.device}
    model |= {"gradient_checkpointing": True, **changes}
    values = {
        "name": "estimate",
        "output": str(folder / name / "run"),
        "steps": options.steps,
        "model": model,
        "data": {"folder": str(dataset.folder)},
        "saving": {"checkpoint_every": 10**6, "adapter_every": 0, "health_every": 0},
    }
    config = config_from_dict(values)
    found = estimate_run(config, dataset)
    meter = MemoryMeter(torch.device(options.device))
    before = meter.reset()
    session = open_session(config)
    if meter.on_gpu:
        torch.cuda.reset_peak_memory_stats()  # peak memory of loading is separate
    reports = train(config, session.model, session.injection, session.dataset)
    seconds = []
    for _ in range(options.steps):
        started = time.perf_counter()
        next(reports)
        seconds.append(time.perf_counter() - started)
    peak = meter.read_peak() - before
    # On a CPU the estimate covers the whole process.
    estimated = found.memory_bytes - (0 if meter.on_gpu else before)
    return {
        "estimated_s": found.seconds_per_step,
        "measured_s": statistics.median(seconds[1:]),
        "estimated_bytes": estimated,
        "measured_bytes": peak,
    }


def summarise(name: str, rounds: list[dict[str, float]]) -> dict[str, object]:
    """Medians of the rounds, and their ratios: lowest, median, highest."""
    row: dict[str, object] = {"case": name}
    for unit, scale, digits in (("s", 1, 3), ("bytes", 1e6, 0)):
        estimated, measured = ([one[f"{what}_{unit}"] for one in rounds] for what in KINDS)
        ratios = sorted(a / b for a, b in zip(estimated, measured, strict=True))
        shown = "mb" if unit == "bytes" else unit
        row[f"estimated_{shown}"] = round(statistics.median(estimated) / scale, digits)
        row[f"measured_{shown}"] = round(statistics.median(measured) / scale, digits)
        chosen = ratios[0], statistics.median(ratios), ratios[-1]
        row[f"estimated / measured {shown}"] = [round(ratio, 2) for ratio in chosen]
    return row


def main() -> None:
    options = parse_options()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.cpu_time:
        time.perf_counter = time.process_time
    print(json.dumps(vars(options)), flush=True)
    names = [name.strip() for name in options.cases.split(",") if name.strip()] or list(CASES)
    with tempfile.TemporaryDirectory() as folder:
        write_base(Path(folder) / "base.safetensors", options)
        rounds: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for number in range(options.rounds):
            for name in names:
                rounds[name].append(compare(name, Path(folder) / str(number), options))
        for name in names:
            print(json.dumps(summarise(name, rounds[name])), flush=True)


if __name__ == "__main__":
    main()
