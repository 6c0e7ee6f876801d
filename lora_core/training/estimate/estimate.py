"""Memory and time of a run before it starts, from steps of a model of very few blocks.

All blocks are alike, so everything is linear in their number: the full model's numbers are
extrapolated from those of one and of three blocks (`probe`), which run the real weights of the
first blocks in their storage, with LoRAs, checkpointing, optimizer and the training set's own
sizes. Persistent memory is counted; transient memory is measured. Offloaded blocks are measured
separately, two and three of them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch

from ...base_model.base_files import BaseFile, open_base_file
from ...injection.plan import plan_injection
from ...messages import join_messages, message
from ...text import format_bytes, format_duration, format_number
from ..config.advice import advise
from ..config.config import TrainConfig
from ..data.dataset import CachedDataset, ItemInfo, check_text_width, read_dataset
from ..machine.memory import MemoryMeter, find_free_host_memory
from ..machine.memory_limit import limit_memory
from ..model.architecture import read_architecture
from ..model.loading import check_keys
from ..model.offload import choose_offloaded
from ..run.session import choose_device
from ..sampling.image_decoder import DECODING_BYTES
from .probe import Measurement, measure_blocks

#: Reserve of a device's free memory: samples' sizes change from step to step and leave gaps.
MARGIN = 2**29
#: Reserve of free main memory besides offloaded blocks: for the process itself.
HOST_MARGIN = 2 * 2**30


@dataclass(frozen=True)
class Estimate:
    """What a run will need."""

    device: str
    memory_bytes: int | None
    """Peak in use, on a CPU of the whole process; None where the system does not report it."""
    available_bytes: int | None
    """Free for the run, with ComfyUI's models off the device."""
    seconds_per_step: float
    """Mean over the training set."""
    longest_step_s: float
    """Of the largest item."""
    total_s: float
    """Of all steps, and of compiling."""
    num_parameters: int
    num_tokens: int
    """Of the largest item: target, references and text."""
    advice: tuple[str, ...] = ()
    """What to lower, the cheapest first; empty where it fits."""
    compile_s: float = 0.0
    """Compiling the blocks, in the first steps."""
    gradient_checkpointing: bool | str = True
    """Chosen for what memory is free now, where the configuration leaves it open."""
    offloaded_bytes: int = 0
    """Of the offloaded blocks, page-locked in host memory; on a CPU part of the memory above."""
    host_available_bytes: int | None = None
    """Free main memory for them; None on a CPU, or where the system does not report it."""

    @property
    def fits_device(self) -> bool:
        if self.memory_bytes is None or self.available_bytes is None:
            return True
        return self.memory_bytes + MARGIN <= self.available_bytes

    @property
    def fits_host(self) -> bool:
        if not self.offloaded_bytes or self.host_available_bytes is None:
            return True
        return self.offloaded_bytes + HOST_MARGIN <= self.host_available_bytes

    @property
    def fits(self) -> bool:
        return self.fits_device and self.fits_host

    def to_dict(self) -> dict[str, object]:
        return asdict(self) | {"fits": self.fits}

    def to_text(self) -> str:
        def show(size: int | None) -> str:
            return message("unknown") if size is None else format_bytes(size, 1024)

        lines = [
            message(
                "{num_parameters} M trainable parameters, up to {num_tokens} tokens per sample",
                num_parameters=format_number(self.num_parameters / 1000000.0),
                num_tokens=self.num_tokens,
            ),
            message(
                "memory: {memory_bytes} of {available_bytes} free on {device}",
                memory_bytes=show(self.memory_bytes),
                available_bytes=show(self.available_bytes),
                device=self.device,
            ),
            message(
                "time: {seconds_per_step} per step (the longest {longest_step_s}), {total_s} in "
                "total",
                seconds_per_step=format_duration(self.seconds_per_step),
                longest_step_s=format_duration(self.longest_step_s),
                total_s=format_duration(self.total_s),
            ),
        ]
        if self.gradient_checkpointing is not True:
            kept = json.dumps(self.gradient_checkpointing)
            lines.append(message("measured with gradient_checkpointing = {kept}", kept=kept))
        if self.offloaded_bytes:
            free = self.host_available_bytes
            of = "" if free is None else message(" of {free} free", free=show(free))
            lines.insert(
                2,
                message(
                    "offloaded to main memory: {offloaded_bytes}{of}",
                    offloaded_bytes=show(self.offloaded_bytes),
                    of=of,
                ),
            )
        if self.compile_s:
            lines.append(
                message(
                    "compiling: {compile_s} once, part of the total time",
                    compile_s=format_duration(self.compile_s),
                )
            )
        lines += [
            message("does not fit: {sentence}", sentence=sentence) for sentence in self.advice
        ]
        return join_messages("\n", lines)


def estimate_run(
    config: TrainConfig,
    dataset: CachedDataset,
    *,
    is_shared: bool = False,
    with_samples: bool = False,
) -> Estimate:
    """Loads three blocks, takes some steps with them, and extrapolates to the full model.

    Auxiliary losses are not included; with several processes the numbers are per process.

    Args:
        is_shared: whether ComfyUI computes on the same GPU.
        with_samples: whether sample images are decoded during training, in tiles if necessary.

    Raises:
        FileError, KeyFormatError, ConfigError: as opening the model does.
    """
    device = choose_device(config.model)
    limit_memory(device)
    host_free = None if device.type == "cpu" else find_free_host_memory()
    meter = MemoryMeter(device)
    largest = dataset.find_largest()
    whole, width = open_and_measure(config, dataset, largest, device, is_shared=is_shared)
    passes = 1.0
    costs = [compute_cost(info, width) for info in dataset.items]
    mean_cost = sum(costs) / len(costs)
    if config.data.prior and config.data.prior_weight:
        prior = [compute_cost(info, width) for info in read_dataset(config.data.prior).items]
        passes += sum(prior) / len(prior) / mean_cost
    micro_s = whole.micro_step_s * config.optimizer.accumulation * passes
    mean_s = micro_s * mean_cost / costs[largest] + whole.optimizer_s
    estimate = Estimate(
        device=str(device),
        memory_bytes=whole.count_bytes(
            DECODING_BYTES if with_samples and device.type != "cpu" else 0
        ),
        available_bytes=meter.find_available(),
        seconds_per_step=mean_s,
        longest_step_s=micro_s + whole.optimizer_s,
        total_s=mean_s * config.steps + whole.compile_s,
        num_parameters=whole.num_parameters,
        num_tokens=dataset.items[largest].num_tokens,
        compile_s=whole.compile_s,
        gradient_checkpointing=whole.gradient_checkpointing,
        offloaded_bytes=config.model.offload_blocks * whole.block_bytes,
        host_available_bytes=host_free,
    )
    advice: tuple[str, ...] = ()
    if not estimate.fits_device:
        advice = advise(config)
    if not estimate.fits_host:
        advice = (*advice, FREE_HOST_MEMORY)
    return replace(estimate, advice=advice)


@dataclass(frozen=True)
class FullModelCost:
    """What training on all blocks needs."""

    micro_step_s: float
    optimizer_s: float
    compile_s: float
    transient_bytes: float | None
    """Peak of transient memory, with the allocator's gaps."""
    loading_bytes: int
    frozen_bytes: int
    """Frozen, on the device."""
    process_bytes: int
    trained_bytes: float
    block_bytes: int
    gradient_checkpointing: bool | str
    num_parameters: int
    """That are trained."""

    def count_bytes(self, decoding_bytes: int = 0) -> int | None:
        """Peak of the run's memory; None where transient memory is unknown.

        Args:
            decoding_bytes: that sample images take, which are decoded between two steps.
        """
        if self.transient_bytes is None:
            return None
        kept = self.frozen_bytes + self.num_parameters * self.trained_bytes
        in_step = kept + max(self.transient_bytes, decoding_bytes)
        return self.process_bytes + round(max(in_step, self.frozen_bytes + self.loading_bytes))


def open_and_measure(
    config: TrainConfig,
    dataset: CachedDataset,
    index: int,
    device: torch.device,
    *,
    is_shared: bool,
) -> tuple[FullModelCost, int]:
    """What training on the configured base needs, and the width of that model.

    Raises:
        FileError, KeyFormatError, ConfigError: as opening the model does.
    """
    base = open_base_file(config.model.source)
    try:
        architecture = read_architecture(base.shapes, base.name, base.axes)
        check_keys(architecture, base)
        check_text_width(dataset, architecture.joint_attention_dim)
        num_blocks = architecture.num_layers
        num_parameters = count_parameters(config, base)
        choose_offloaded(num_blocks, config.model.offload_blocks)
        whole = measure_full_model(
            config,
            dataset,
            index,
            base,
            device,
            num_blocks=num_blocks,
            num_parameters=num_parameters,
            is_shared=is_shared,
        )
        return whole, base.shapes["img_in.weight"][0]
    finally:
        base.release()


def measure_full_model(
    config: TrainConfig,
    dataset: CachedDataset,
    index: int,
    base: BaseFile,
    device: torch.device,
    *,
    num_blocks: int,
    num_parameters: int,
    is_shared: bool,
) -> FullModelCost:
    num_offloaded = config.model.offload_blocks
    num_resident = num_blocks - num_offloaded
    measure = partial(
        measure_blocks,
        config,
        dataset,
        index,
        base,
        device,
        num_parameters=num_parameters,
        is_shared=is_shared,
    )
    found = []
    if num_resident:
        counts: Sequence[int] = sorted({1, min(3, num_blocks)})
        found.append(measure(counts, offloaded=False))
    if num_offloaded:
        counts = (2, 3) if num_blocks > 2 else (1, 2) if num_blocks > 1 else (1,)
        found.append(measure(counts, offloaded=True))
    first, last = found[0], found[-1]
    transient = estimate_transient_bytes(first, last, num_blocks, num_offloaded)
    if transient is not None:
        transient += first.gap_bytes(num_resident)
    return FullModelCost(
        micro_step_s=estimate_micro_step_s(first, last, num_blocks, num_offloaded, device),
        optimizer_s=first.optimizer_s(num_blocks),
        compile_s=max(one.compile_s for one in found),
        transient_bytes=transient,
        loading_bytes=first.loading_bytes or 0,
        frozen_bytes=count_frozen_bytes(first, num_blocks, num_offloaded, device),
        process_bytes=first.process_bytes,
        trained_bytes=first.trained_bytes,
        block_bytes=first.block_bytes,
        gradient_checkpointing=first.gradient_checkpointing,
        num_parameters=num_parameters,
    )


def count_frozen_bytes(
    found: Measurement, num_blocks: int, num_offloaded: int, device: torch.device
) -> int:
    """Bytes of frozen weights; on a CPU offloaded blocks stay in the same memory."""
    if device.type != "cpu":
        num_blocks -= num_offloaded
    return found.other_bytes + num_blocks * found.block_bytes


def estimate_micro_step_s(
    resident: Measurement,
    offloaded: Measurement,
    num_blocks: int,
    num_offloaded: int,
    device: torch.device,
) -> float:
    """Seconds of a micro-step; both are the same where all blocks are of one kind."""
    if resident is offloaded:
        return resident.micro_step_s(num_blocks)
    time = resident.micro_step_s
    if device.type == "cpu":  # copies and products alternate
        return time(num_blocks - num_offloaded) + num_offloaded * offloaded.micro_step_s.per_block
    # A block's weights are copied while those before it compute: the slower of both counts.
    return max(time(num_blocks), time.fixed + num_offloaded * offloaded.micro_step_s.per_block)


def estimate_transient_bytes(
    resident: Measurement, offloaded: Measurement, num_blocks: int, num_offloaded: int
) -> float | None:
    """Peak of transient memory: activations of all blocks and copies of a few, or an update."""
    if resident.transient_bytes is None or offloaded.transient_bytes is None:
        return None
    transient = resident.transient_bytes(num_blocks)
    if resident is not offloaded:
        copies = offloaded.transient_bytes(num_blocks) - transient
        transient += min(max(0.0, copies), num_offloaded * resident.block_bytes)
    update = resident.update_bytes
    return transient if update is None else max(transient, update(num_blocks))


def compute_cost(info: ItemInfo, width: int) -> float:
    """Proportional to a sample's time: products by 24 w^2 per token, attention by 4 w per pair."""
    return info.num_tokens * (24 * width + 4 * info.num_tokens)


def count_parameters(config: TrainConfig, base: BaseFile) -> int:
    """Of the LoRA on the whole model."""
    transformer = read_architecture(base.shapes, base.name, base.axes).build_empty()
    return plan_injection(transformer, config.lora).num_parameters


FREE_HOST_MEMORY = message(
    "free main memory, or lower model.offload_blocks with a smaller model.storage"
)
