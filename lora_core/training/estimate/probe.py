"""A few blocks of a base, trained for some steps as `trainer` would, with time and memory measured.

All blocks are alike, so what a step takes is linear in their number. One load serves models of
different numbers of blocks: the last n of those loaded. Their steps are interleaved, so that other
load on the machine affects all of them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from ...base_model.base_files import BaseFile
from ...injection.inject import inject
from ...injection.plan import LoraSettings
from ..config.config import TrainConfig
from ..data.batches import load_repeated
from ..data.dataset import CachedDataset
from ..machine.memory import MemoryMeter, count_bytes
from ..model.architecture import read_architecture
from ..model.gradient_checkpointing import adapt_to_memory, get_first_kind, is_free_to_choose
from ..model.host_blocks import HostBlocks
from ..model.loading import find_block, list_leaves, load_leaf
from ..model.offload import BlockOffload
from ..model.transformer import EditTransformer
from ..model.weight_reader import WeightReader
from ..objective.objective import VELOCITY, Objective
from ..optimizer.ema import Ema
from ..optimizer.gradients import are_finite, clip_gradients, compute_grad_norm
from ..optimizer.optimization import build_optimizer
from ..run.session import COMPUTE_DTYPES

#: Steps timed after those that only warm up: at least, and at most within TIMED_S seconds.
MIN_STEPS = 3
MAX_STEPS = 15
TIMED_S = 4.0
#: Times that a CPU's peak is measured: its heap leaves varying gaps.
CPU_PEAKS = 3


@dataclass(frozen=True)
class LinearFit:
    """A quantity as a linear function of the number of blocks."""

    fixed: float
    per_block: float

    def __call__(self, num_blocks: int) -> float:
        return self.fixed + num_blocks * self.per_block


@dataclass(frozen=True)
class Measurement:
    """What training on n blocks needs."""

    micro_step_s: LinearFit
    """Forward and backward of one batch."""
    optimizer_s: LinearFit
    """The rest of a step."""
    compile_s: float
    """Once, in the first steps."""
    transient_bytes: LinearFit | None
    """Peak of a micro-step above persistent memory: activations, gradients, copies."""
    update_bytes: LinearFit | None
    """The same of an optimizer's update: gradients, and copies of its state."""
    gap_bytes: LinearFit
    """What a GPU's allocator holds and cannot use: between weights, and in a step's peak."""
    loading_bytes: int | None
    """Peak of loading above the model itself."""
    block_bytes: int
    """Frozen, of one block."""
    other_bytes: int
    """Frozen, of what is not in blocks."""
    process_bytes: int
    """What the process takes without a run; 0 on a GPU, where only this run's tensors count."""
    gradient_checkpointing: bool | str
    """Chosen here, where the configuration leaves it open."""
    trained_bytes: float
    """For each trainable parameter: itself, its average and what the optimizer keeps."""


def measure_blocks(
    config: TrainConfig,
    dataset: CachedDataset,
    index: int,
    base: BaseFile,
    device: torch.device,
    counts: Sequence[int],
    *,
    offloaded: bool,
    num_parameters: int,
    is_shared: bool = False,
) -> Measurement:
    """Takes steps with one item of the training set on the last blocks of `max(counts)`.

    Args:
        index: of the item; a batch repeats it.
        counts: one or two numbers of blocks; with one, no growth per block is known.
        offloaded: whether all blocks are offloaded to host memory.
        num_parameters: trainable ones of the whole model.
        is_shared: whether ComfyUI computes on the same GPU.
    """
    meter = MemoryMeter(device)
    meter.reset()
    model = load_blocks(config, base, device, max(counts), offloaded=offloaded)
    peak, after = meter.read_peak(), meter.reset()
    loading = None if peak is None or after is None else max(0, peak - after)
    probe = Probe(config, model, dataset, index, device, counts, offloaded=offloaded)
    if is_free_to_choose(config.model):
        num_blocks = read_architecture(base.shapes, base.name, base.axes).num_layers
        probe.adapt_to_memory(num_blocks, meter.find_free(), num_parameters, is_shared)
    if config.model.compile:
        for block in model.blocks:
            block.compile()
    first_s = {n: probe.take_step(n) for n in counts}  # compiles, and makes the optimizer's state
    for n in counts:
        probe.take_step(n)
    at_rest, resting_gap = meter.reset(), meter.read_gap()
    peaks = measure_all_peaks(probe, meter, counts)
    all_peaks = [one for found in peaks.values() for one in found]
    gap = max(0, max(one.gap for one in all_peaks) - resting_gap)
    micro_s, optimizer_s = time_steps(probe, counts)
    compile_s = 0.0
    if config.model.compile:
        compile_s = sum(first_s[n][0] - statistics.median(micro_s[n]) for n in counts)
    known = all(one.transient is not None for one in all_peaks)
    return Measurement(
        micro_step_s=fit_line(micro_s),
        optimizer_s=fit_line(optimizer_s),
        compile_s=max(0.0, compile_s),
        transient_bytes=fit_peaks(peaks, "transient") if known else None,
        update_bytes=fit_peaks(peaks, "update") if known else None,
        gap_bytes=LinearFit(gap, resting_gap / max(counts)),
        loading_bytes=loading,
        block_bytes=probe.block_bytes,
        other_bytes=probe.other_bytes,
        process_bytes=0 if meter.on_gpu else max(0, (at_rest or 0) - probe.count_resident_bytes()),
        gradient_checkpointing=model.gradient_checkpointing,
        trained_bytes=probe.count_trained_bytes() / sum(p.numel() for p in probe.parameters),
    )


def time_steps(
    probe: Probe, counts: Sequence[int]
) -> tuple[dict[int, list[float]], dict[int, list[float]]]:
    """Seconds of micro-steps, and of the rest of their steps, by the number of blocks."""
    micro_s: dict[int, list[float]] = {n: [] for n in counts}
    optimizer_s: dict[int, list[float]] = {n: [] for n in counts}
    started = time.perf_counter()
    for number in range(MAX_STEPS):
        if number >= MIN_STEPS and time.perf_counter() - started > TIMED_S:
            break
        for n in counts:
            micro, rest = probe.take_step(n)
            micro_s[n].append(micro)
            optimizer_s[n].append(rest)
    return micro_s, optimizer_s


def fit_line(values: Mapping[int, Sequence[float]]) -> LinearFit:
    """Fits a line through one or two numbers of blocks; values of one round are paired."""
    few, many = min(values), max(values)
    middle = statistics.median(values[few])
    if few == many:
        return LinearFit(middle, 0.0)
    rises = [b - a for a, b in zip(values[few], values[many], strict=True)]
    per_block = max(0.0, statistics.median(rises) / (many - few))
    if middle < few * per_block:  # no fixed part; few blocks profited from caches or the heap
        return LinearFit(0.0, statistics.median(values[many]) / many)
    return LinearFit(middle - few * per_block, per_block)


def fit_peaks(peaks: Mapping[int, Sequence[Peaks]], name: str) -> LinearFit:
    return fit_line({n: [getattr(one, name) for one in found] for n, found in peaks.items()})


@dataclass(frozen=True)
class Peaks:
    """Bytes that one step took above persistent memory; None where unknown."""

    transient: int | None
    update: int | None
    gap: int


def measure_peaks(probe: Probe, meter: MemoryMeter, num_blocks: int) -> Peaks:
    before = meter.reset()
    probe.take_micro_step(num_blocks)
    transient, gap = meter.read_peak(), meter.read_gap()
    meter.reset()  # begins the update's peak
    probe.update()
    update, gap = meter.read_peak(), max(gap, meter.read_gap())
    if before is None or transient is None or update is None:
        return Peaks(None, None, gap)
    return Peaks(max(0, transient - before), max(0, update - before), gap)


def measure_all_peaks(
    probe: Probe, meter: MemoryMeter, counts: Sequence[int]
) -> dict[int, list[Peaks]]:
    """By the number of blocks; on a CPU several of each, since its heap also holds other data."""
    peaks: dict[int, list[Peaks]] = {n: [] for n in counts}
    for _ in range(1 if meter.on_gpu else CPU_PEAKS):
        for n in counts:
            peaks[n].append(measure_peaks(probe, meter, n))
    return peaks


class Probe:
    """A model of a few blocks and everything a step on it needs."""

    def __init__(
        self,
        config: TrainConfig,
        model: EditTransformer,
        dataset: CachedDataset,
        index: int,
        device: torch.device,
        counts: Sequence[int],
        *,
        offloaded: bool,
    ):
        blocks = list(model.blocks)
        self.block_bytes = count_bytes((*blocks[0].parameters(), *blocks[0].buffers()))
        self.frozen_bytes = count_bytes((*model.parameters(), *model.buffers()))
        self.other_bytes = self.frozen_bytes - len(blocks) * self.block_bytes
        self.config, self.model, self.device = config, model, device
        self.blocks = {n: nn.ModuleList(blocks[-n:]) for n in counts}
        host = HostBlocks(device)
        for block in blocks if offloaded else ():
            host.add(block)
        self.offloads = {
            n: BlockOffload(self.blocks[n], range(n), device, host) if offloaded else None
            for n in counts
        }
        self.injection = inject(
            model.transformer, choose_settings(config.lora), seed=config.seed, device=device
        )
        options = config.optimizer
        self.parameters = self.injection.parameters()
        self.optimizer = build_optimizer(
            options.name, self.parameters, options.learning_rate, **options.options
        )
        named = self.injection.named_parameters()
        self.ema = Ema(named, options.ema_decay) if options.ema_decay else None
        self.objective = Objective(replace(config.objective, auxiliary={}))
        size = config.data.batch_size
        self.batch = load_repeated(dataset, index, size, config.seed).to(device)

    def adapt_to_memory(
        self, num_blocks: int, free: int | None, num_parameters: int, is_shared: bool
    ) -> None:
        """Chooses what the whole model would keep for its backward pass in `free` bytes."""
        if free is not None:
            free -= (num_blocks - max(self.blocks)) * self.block_bytes
        adapt_to_memory(
            self.model,
            self.batch,
            num_blocks=num_blocks,
            num_parameters=num_parameters,
            free_bytes=free,
            is_shared=is_shared,
        )

    def take_step(self, num_blocks: int) -> tuple[float, float]:
        """Seconds of one micro-step, and of the rest of the step."""
        started = self.read_clock()
        self.take_micro_step(num_blocks)
        middle = self.read_clock()
        self.update()
        return middle - started, self.read_clock() - middle

    def take_micro_step(self, num_blocks: int) -> None:
        self.model.transformer.transformer_blocks = self.blocks[num_blocks]
        self.model.offload = self.offloads[num_blocks]
        loss = self.compute_loss()
        loss.backward()
        loss.item()

    def compute_loss(self) -> torch.Tensor:
        return self.objective.compute_losses(self.model, self.batch)[VELOCITY].mean()

    def update(self) -> None:
        # Those of other blocks have no gradient.
        active = [p for p in self.parameters if p.grad is not None]
        grad_norm = compute_grad_norm(active).item()
        clip_gradients(active, grad_norm, self.config.optimizer.max_grad_norm)
        self.optimizer.step()
        are_finite(active)
        if self.ema is not None:
            self.ema.update()
        self.optimizer.zero_grad(set_to_none=True)

    def read_clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def count_resident_bytes(self) -> int:
        return self.frozen_bytes + self.count_trained_bytes()

    def count_trained_bytes(self) -> int:
        """Parameters, their averages, and what the optimizer keeps."""
        kept: list[torch.Tensor] = [*self.parameters]
        for layer in self.injection.layers.values():
            kept += [b for b in layer.buffers(recurse=False) if b is not None]
        if self.ema is not None:
            kept += list(self.ema.averages.values())
        for state in self.optimizer.state.values():
            kept += [value for value in state.values() if isinstance(value, torch.Tensor)]
        return count_bytes(kept)


def load_blocks(
    config: TrainConfig, base: BaseFile, device: torch.device, num_blocks: int, *, offloaded: bool
) -> EditTransformer:
    """The model's first blocks, and the modules before and after the blocks."""
    model, dtype = config.model, COMPUTE_DTYPES[config.model.compute_dtype]
    marked = base.zero_cond_t if model.variant == "auto" else model.variant == "2511"
    architecture = read_architecture(base.shapes, base.name, base.axes, marked)
    transformer = replace(architecture, num_layers=num_blocks).build_empty()
    reader = WeightReader(base, device)
    for path in list_leaves(transformer):
        place = torch.device("cpu") if offloaded and find_block(path) >= 0 else device
        load_leaf(transformer, path, reader, model.storage, dtype, place)
    reader.finish()
    transformer.requires_grad_(False)
    loaded = EditTransformer(transformer.eval(), dtype)
    loaded.enable_gradient_checkpointing(get_first_kind(model))
    return loaded


def choose_settings(lora: LoraSettings) -> LoraSettings:
    """The same on a few blocks; patterns that name blocks by number become the full preset."""
    if any("transformer_blocks" in p for p in (*lora.targets, *lora.exclude, *lora.rank_pattern)):
        return replace(lora, targets=("full",), exclude=(), rank_pattern={})
    return lora
