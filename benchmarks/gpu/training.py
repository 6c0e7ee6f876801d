"""Part F: training the whole model on random weights: speed, memory, and where the time goes."""

from __future__ import annotations

import math
import os
import statistics
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from .children import start_piece
from .devices import Peak, free, take_time
from .extension import import_extension
from .facts import PRODUCT_RATE, find_rate
from .settings import Context
from .traces import Trace, trace

import_extension()

import train_loops as loops  # noqa: E402

SELECTIVE = "selective"
UTILISATION = ">= 0.5"  # of the GPU's own rate
RATIO = ">= 1.5"  # times as fast as the plain loop
IDLE = "< 0.05"
#: Storage, rank and blocks in host memory -> GB allocated at most.
PEAKS = {("bf16", 64, 0): 68, ("fp8", 16, 0): 32, ("nf4", 16, 0): 22, ("nf4", 16, 1): 12}
#: GPU memory on which the whole model trains without recomputing anything.
LARGE_BYTES = 120e9
KERNELS = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
#: Number of kernels listed, longest first.
NUM_NAMED = 12
#: Seconds that fp8, nf4 and offloading take.
FEW_BITS_S = 50


def run(context: Context) -> None:
    loading = None if context.is_dry else start_piece(context, "F:run_loading")
    try:
        with context.record.item("bf16"):
            Training(context).measure_bf16()
        free(context.device)
        with context.record.item("few bits"):
            measure_few_bits(context)
        free(context.device)
        (context.folder / "card is free").touch()
        if loading is None:
            run_loading(context)
        else:
            loading.wait()
        with context.record.item("compile"):
            measure_compiled(context)
    finally:
        if loading is not None:
            loading.kill()


def run_loading(context: Context) -> None:
    from .loading_rate import run as run_alone

    run_alone(context)


def build_options(context: Context, **changes: Any) -> Namespace:
    """Options for `train_loops`."""
    sizes = context.sizes
    options = Namespace(
        device=context.device,
        dtype="bf16",
        blocks=sizes.blocks,
        side=sizes.side,
        references=1,
        text_tokens=sizes.text_tokens[-1],
        variant="2509",
        compile=False,
        quick=context.is_dry,
        text_only=False,
    )
    return Namespace(**{**vars(options), **changes})


class Training:
    """Consecutive runs over one model's weights."""

    def __init__(self, context: Context, storage: str = "bf16", **changes: Any):
        self.context, self.storage = context, storage
        self.options = build_options(context, **changes)
        self.rate = find_rate(context, PRODUCT_RATE)
        self.low, self.high = context.sizes.ranks
        seconds = take_time(self.build, context.device)
        context.record.figure(f"{storage}, drawing the weights", seconds, "s")
        weights = sum(loops.count_frozen(self.model))
        context.record.figure(f"{storage}, weights", weights / 1e9, "GB")

    def build(self) -> None:
        self.model = loops.build_transformer(self.options, self.storage)

    def measure_bf16(self) -> None:
        record = self.context.record
        times: dict[int, float] = {}
        for rank, kind in ((self.low, "auto"), (self.high, SELECTIVE)):
            with record.item(f"r{rank} {kind}"):
                times[rank] = self.measure(rank, kind, profile=rank == self.low, aim=True)
        for rank in (self.low,) if self.context.is_dry else (self.low, self.high):
            if record.has_time(f"plain loop, r{rank}", 14):
                with record.item(f"plain loop, r{rank}"):
                    self.measure_plain(rank, times.get(rank))
        chosen = ((SELECTIVE, ""), (True, ""), *((SELECTIVE, name) for name in KERNELS))
        for kind, name in chosen[-1:] if self.context.is_dry else chosen:
            label = f"r{self.low} {json_name(kind)} {name}".strip()
            # The actual goals come later, and need the time more.
            if record.has_time(label, FEW_BITS_S + 10):
                with record.item(label):
                    self.measure(self.low, kind, kernel=name)
        with record.item("false"):
            if is_large(self.context):
                self.measure(self.low, False)
            else:
                record.skip("r16, false", "keeps more than this card has")

    def measure(
        self,
        rank: int,
        kind: bool | str,
        num_offloaded: int = 0,
        kernel: str = "",
        profile: bool = False,
        aim: bool = False,
    ) -> float:
        """Returns seconds per step; everything else becomes records."""
        context, record = self.context, self.context.record
        backend = KERNELS.get(kernel)
        label = f"{self.storage} r{rank} {json_name(kind)}{f' {kernel}' if kernel else ''}"
        label += f", {num_offloaded} blocks in host memory" if num_offloaded else ""
        folder = context.folder / f"run {len(list(context.folder.iterdir()))}"
        folder.mkdir()
        step = loops.build_ours(self.model, self.options, rank, folder, kind, num_offloaded)
        if kind == "auto":
            chosen = json_name(step.model.gradient_checkpointing)
            record.figure(f"{label}, chooses", chosen)
        reports: list[Any] = []
        seconds: list[float] = []
        with forced(backend) as seen:
            try:
                warm = take_time(step, context.device)
            except RuntimeError as e:
                if backend is None or "kernel" not in str(e):
                    raise
                record.skip(label, f"{kernel} does not take these inputs")
                return math.nan
            if backend is not None and not seen.is_obeyed:
                record.skip(label, "the model chooses its kernel itself")
                return math.nan
            peak = Peak(context.device)
            for _ in range(context.sizes.steps):
                seconds.append(take_time(lambda: reports.append(step()), context.device))
        allocated, reserved = peak.read()
        record.figure(f"{label}, first step", warm, "s")
        median = statistics.median(seconds)
        record.figure(f"{label}, a step", median, "s", note=", ".join(f"{s:.3f}" for s in seconds))
        losses = [report.loss for report in reports]
        record.must(f"{label}, losses are finite", all(map(math.isfinite, losses)), str(losses))
        self.note_utilisation(label, rank, median, aim)
        self.note_peak(label, rank, num_offloaded, kind, allocated, reserved)
        if profile:
            note_trace(context, label, trace(step, context.device), median)
        step = reports = None  # nothing may reference the run when the next one is built
        free(context.device)
        return median

    def note_utilisation(self, label: str, rank: int, seconds: float, aim: bool) -> None:
        sizes, record = self.context.sizes, self.context.record
        text = sizes.text_tokens[-1]
        flops = loops.count_flops(sizes.num_tokens - text, text, sizes.width, sizes.blocks, rank)
        record.figure(f"{label}, model", flops / seconds / 1e12, "TFLOP/s")
        if self.rate is None:
            record.skip(f"{label}, utilisation", "part A measured no rate")
            return
        utilisation = flops / seconds / (self.rate * 1e12)
        if aim:
            record.goal(f"{label}, utilisation", utilisation, "", UTILISATION)
        else:
            record.figure(f"{label}, utilisation", utilisation)

    def note_peak(
        self,
        label: str,
        rank: int,
        num_offloaded: int,
        kind: bool | str,
        allocated: int,
        reserved: int,
    ) -> None:
        record = self.context.record
        name = f"{label}, peak"
        limit = PEAKS.get((self.storage, rank, int(num_offloaded > 0)))
        if limit is not None and kind in (SELECTIVE, True) and not self.context.is_dry:
            record.goal(name, allocated / 1e9, "GB", f"<= {limit}")
        else:
            record.figure(name, allocated / 1e9, "GB")
        record.figure(f"{name}, reserved", reserved / 1e9, "GB")

    def measure_plain(self, rank: int, ours_s: float | None) -> None:
        """diffusers and PEFT over the same weights, with gradient checkpointing."""
        context, record = self.context, self.context.record
        step = loops.build_plain(self.model, self.options, rank, "script")
        step()
        peak = Peak(context.device)
        seconds = [take_time(step, context.device) for _ in range(2)]
        record.figure(f"plain loop, r{rank}, a step", min(seconds), "s")
        record.figure(f"plain loop, r{rank}, peak", peak.read()[0] / 1e9, "GB")
        if ours_s:
            record.goal(f"plain loop / ours, r{rank}", min(seconds) / ours_s, "", RATIO)
        del step
        free(context.device)


def json_name(kind: bool | str) -> str:
    return kind if isinstance(kind, str) else str(kind).lower()


def is_large(context: Context) -> bool:
    if context.is_dry:
        return False
    return torch.cuda.get_device_properties(0).total_memory > LARGE_BYTES


class Seen:
    """Whether an externally forced choice of kernels reached the model's attention."""

    is_obeyed = True


@contextmanager
def forced(backend: SDPBackend | None) -> Iterator[Seen]:
    """Forces one attention kernel, in the forward pass and in recomputation."""
    seen = Seen()
    if backend is None:
        yield seen
        return
    functional = torch.nn.functional
    original: Callable[..., torch.Tensor] = functional.scaled_dot_product_attention
    is_flash = backend is SDPBackend.FLASH_ATTENTION

    def watched(*arguments: Any, **options: Any) -> torch.Tensor:
        flash, cudnn = torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.cudnn_sdp_enabled
        if (flash(), cudnn()) != (is_flash, not is_flash):
            seen.is_obeyed = False
        return original(*arguments, **options)

    functional.scaled_dot_product_attention = watched
    try:
        with sdpa_kernel(backend):
            yield seen
    finally:
        functional.scaled_dot_product_attention = original


def note_trace(context: Context, label: str, found: Trace, step_s: float) -> None:
    """Where a step's time goes; the profiler slows the host, so idle is relative to `step_s`."""
    record = context.record
    for kind, seconds in found.kinds_s.most_common():
        record.figure(f"{label}, {kind}", seconds, "s")
    record.figure(f"{label}, kernels", found.num_kernels)
    record.figure(f"{label}, copies", str(dict(found.copies)))
    record.figure(f"{label}, host", max(0.0, found.wall_s - found.waiting_s), "s")
    record.goal(f"{label}, idle", 1 - found.busy_s / step_s, "", IDLE)
    for name, seconds in found.kernels_s.most_common(NUM_NAMED):
        record.figure(f"{label}, a kernel", seconds, "s", name[:160])


def measure_few_bits(context: Context) -> None:
    record, low = context.record, context.sizes.ranks[0]
    for storage in ("nf4",) if context.is_dry else ("fp8", "nf4"):
        if not record.has_time(f"{storage}, true", 14):
            continue
        with record.item(storage):
            training = Training(context, storage)
            training.measure(low, True, profile=storage == "fp8")
            if storage == "nf4" and record.has_time("nf4, offloading", 12):
                with record.item("nf4, offloading"):
                    training.measure(low, True, context.sizes.blocks // 2)
            del training
        free(context.device)


def measure_compiled(context: Context) -> None:
    record, name = context.record, "bf16 selective, compiled"
    if context.is_dry:
        record.skip(name, "takes minutes on a CPU")
    elif record.has_time(name, 50):
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "8")
        training = Training(context, compile=True)
        training.measure(training.low, SELECTIVE, kernel="compiled", profile=True)
