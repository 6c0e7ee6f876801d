"""Seconds and memory of one training step: ours, a plain diffusers + PEFT loop, ComfyUI's node.

usage: .venv/bin/python benchmarks/train_step.py [--blocks 2] [--dtype fp32] [--rounds 5]
       .venv/bin/python benchmarks/train_step.py --text-only          (with ComfyUI's TrainLoraNode)
       python benchmarks/train_step.py --device cuda --full           (60 blocks)

One process, random weights at full layer width (3072), batch of one, AdamW, clipping, LoRA on
attention and MLP of both streams. The variants share the weights and step alternately, so that each
round gives ratios; medians are reported.

    ours, true        a complete step of `lora_core.training.run.trainer.train` that keeps as little
                      for the backward pass as the plain loops do
    ours, selective   the same with gradient_checkpointing = "selective", which keeps more
    ours, false       the same, keeping everything: what "auto", the default, does for few blocks
    plain, script     diffusers' model and PEFT as diffusers' own scripts train (LoRA in the base's
                      dtype, under autocast in bf16)
    plain, fp32 LoRA  the same with a LoRA in float32, like ours, and without autocast
    plain, false      the latter (in fp32 the former) without gradient checkpointing
    comfyui           TrainLoraNode: --text-only, since it fails with references

Memory is a step's peak above the memory in use before it: on a GPU by torch's allocator, on a CPU
by the process's resident size. `--full` also gives the model FLOP utilisation (forward and backward
of the products and of attention, nothing counted twice for checkpointing) relative to the bf16
matrix product measured in the same run, and the peak memory of fp8 and nf4 at rank 16. `--quick` is
only a smoke test. `--cpu-time` counts the process's CPU seconds instead of wall-clock seconds: with
`--threads 1`, other load on the machine matters little.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import train_loops as loops
from apply import import_host


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--side", type=int, default=32, help="of the latents; an image's / 8")
    parser.add_argument("--references", type=int, default=1)
    parser.add_argument("--text-tokens", type=int, default=64)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--variant", default="2509", choices=["2509", "2511"])
    parser.add_argument("--threads", type=int, default=0, help="0: all cores")
    parser.add_argument("--cpu-time", action="store_true", help="not wall time")
    parser.add_argument("--compile", action="store_true", help="ours only: regional torch.compile")
    parser.add_argument("--text-only", action="store_true", help="beside ComfyUI's TrainLoraNode")
    parser.add_argument("--full", action="store_true", help="60 blocks, 1024 x 1024, a reference")
    parser.add_argument("--quick", action="store_true", help="narrow blocks, few tokens")
    options = parser.parse_args()
    if options.full:
        options.blocks, options.side, options.references = 60, 128, 1
        options.rank, options.dtype, options.text_tokens = 64, "bf16", 256
    if options.text_only:
        options.references = 0
    if options.quick:
        options.side, options.text_tokens, options.rounds = 8, 8, 2
    return options


OPTIONS = parse_options()
if OPTIONS.text_only:
    import_host(OPTIONS.device)

import torch  # noqa: E402

PLAIN = ("script", "fp32 LoRA")
OURS = {"ours, true": True, "ours, selective": "selective", "ours, false": False}
if OPTIONS.full:
    del OURS["ours, false"]


def read_status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def synchronize() -> None:
    if OPTIONS.device == "cuda":
        torch.cuda.synchronize()


def read_clock() -> float:
    return time.process_time() if OPTIONS.cpu_time else time.perf_counter()


def measure(step: Callable[[], object]) -> tuple[float, int]:
    """Seconds, and bytes above what was in use before."""
    synchronize()
    if OPTIONS.device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before = read_status("VmRSS")
    started = read_clock()
    step()
    synchronize()
    seconds = read_clock() - started
    if OPTIONS.device == "cuda":
        return seconds, torch.cuda.max_memory_allocated() - before
    return seconds, read_status("VmHWM") - before


class Table:
    """Measurements by variant, round by round."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}
        self.peaks: dict[str, list[int]] = {}

    def add(self, name: str, seconds: float, peak: int) -> None:
        self.seconds.setdefault(name, []).append(seconds)
        self.peaks.setdefault(name, []).append(peak)

    def compare(self, name: str, other: str) -> float:
        """Median of the rounds' ratios."""
        pairs = zip(self.seconds[name], self.seconds[other], strict=False)
        return statistics.median(a / b for a, b in pairs)

    def print(self) -> None:
        for name, seconds in self.seconds.items():
            ours = [other for other in self.seconds if other.startswith("ours")]
            row = {
                "variant": name,
                "seconds": round(statistics.median(seconds), 4),
                **{f"time / {other}": round(self.compare(name, other), 3) for other in ours},
                "step's memory_mb": round(statistics.median(self.peaks[name]) / 1e6, 1),
            }
            print(json.dumps(row), flush=True)


def compare_with_plain(folder: Path) -> None:
    """Alternates steps of ours and the plain loops."""
    model = loops.build_transformer(OPTIONS, OPTIONS.dtype)
    steps = {
        name: loops.build_ours(model, OPTIONS, OPTIONS.rank, folder, checkpointing)
        for name, checkpointing in OURS.items()
    }
    for kind in PLAIN:
        if kind == "script" or OPTIONS.dtype == "bf16":
            steps[f"plain, {kind}"] = loops.build_plain(model, OPTIONS, OPTIONS.rank, kind)
    if not OPTIONS.full:  # which would need far more memory than available
        kind = PLAIN[OPTIONS.dtype == "bf16"]
        steps["plain, false"] = loops.build_plain(model, OPTIONS, OPTIONS.rank, kind, False)
    for step in steps.values():
        for _ in range(3 if OPTIONS.compile else 1):
            step()
    table = Table()
    for round_ in range(OPTIONS.rounds):
        names = list(steps)
        for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
            table.add(name, *measure(steps[name]))
    table.print()


def compare_with_comfyui(folder: Path) -> None:
    """Alternates ComfyUI's steps and ours: ours run inside its loop, after each of its own."""
    model = loops.build_transformer(OPTIONS, OPTIONS.dtype)
    ours = loops.build_ours(model, OPTIONS, OPTIONS.rank, folder)
    ours()
    table = Table()
    started: list[float] = []

    def between() -> None:
        synchronize()
        if started:  # the node's first step also prepared its model
            table.add("comfyui", time.perf_counter() - started[-1], read_peak() - before[-1])
            with torch.inference_mode(False), torch.enable_grad():
                table.add("ours", *measure(ours))
        reset()

    before: list[int] = []

    def reset() -> None:
        if OPTIONS.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before.append(torch.cuda.memory_allocated())
        else:
            Path("/proc/self/clear_refs").write_text("5")
            before.append(read_status("VmRSS"))
        started.append(time.perf_counter())

    loops.run_comfyui(model, OPTIONS, OPTIONS.rank, folder, between, OPTIONS.rounds + 1)
    table.print()


def read_peak() -> int:
    if OPTIONS.device == "cuda":
        return torch.cuda.max_memory_allocated()
    return read_status("VmHWM")


def measure_matrix_rate() -> float:
    """FLOP per second of a bf16 product of the model's own size, the best of several."""
    device = OPTIONS.device
    a = torch.randn(8192, 3072, device=device, dtype=torch.bfloat16)
    b = torch.randn(12288, 3072, device=device, dtype=torch.bfloat16)
    seconds = []
    for _ in range(20):
        synchronize()
        started = time.perf_counter()
        for _ in range(10):
            torch.nn.functional.linear(a, b)
        synchronize()
        seconds.append((time.perf_counter() - started) / 10)
    return 2 * 8192 * 3072 * 12288 / min(seconds)


def measure_full(folder: Path) -> None:
    """Utilisation and memory of the whole model, then memory of quantised bases."""
    rate = measure_matrix_rate()
    tokens = (OPTIONS.side // 2) ** 2 * (1 + OPTIONS.references)
    for storage, rank in (("bf16", OPTIONS.rank), ("fp8", 16), ("nf4", 16)):
        loops.free(OPTIONS.device)
        torch.cuda.reset_peak_memory_stats()
        model = loops.build_transformer(OPTIONS, storage)
        weights = sum(loops.count_frozen(model))
        place = folder / storage
        place.mkdir()
        step = loops.build_ours(model, OPTIONS, rank, place)
        step()
        torch.cuda.reset_peak_memory_stats()
        seconds = [measure(step)[0] for _ in range(OPTIONS.rounds)]
        flops = loops.count_flops(tokens, OPTIONS.text_tokens, 3072, OPTIONS.blocks, rank)
        median = statistics.median(seconds)
        row = {
            "storage": storage,
            "rank": rank,
            "seconds": round(median, 3),
            "model_tflops_per_step": round(flops / 1e12, 1),
            "bf16_matrix_tflops_per_s": round(rate / 1e12, 1),
            "utilisation": round(flops / median / rate, 3),
            "weights_gb": round(weights / 1e9, 2),
            "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2),
        }
        print(json.dumps(row), flush=True)
        del model, step


def main() -> None:
    if OPTIONS.threads:
        torch.set_num_threads(OPTIONS.threads)
    print(json.dumps(vars(OPTIONS)), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        if OPTIONS.text_only:
            compare_with_comfyui(Path(folder))
        elif OPTIONS.full:
            measure_full(Path(folder))
            # bf16 again, beside the plain loops over the same weights
            compare_with_plain(Path(folder))
        else:
            compare_with_plain(Path(folder))


if __name__ == "__main__":
    main()
