"""Memory and time of a run before it starts, from one step of a model of one and of two blocks.

All blocks are alike, so everything is linear in their number: the full model's figures follow from
the difference of the two small ones, which run the true weights of the first blocks in their
storage, with LoRAs, checkpointing, optimizer and the training set's own sizes.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch

from ..errors import ConfigError
from ..injection import inject
from ..injection_plan import LoraSettings, plan_injection
from .architecture import read_architecture
from .base_files import BaseFile, open_base_file
from .batches import Slot, load_batch
from .config import TrainConfig
from .dataset import CachedDataset, ItemInfo
from .loading import list_leaves, load_leaf
from .objective import VELOCITY, Objective
from .optimization import build_optimizer
from .session import COMPUTE_DTYPES, choose_device
from .transformer import EditTransformer

#: Steps timed after one that only warms up.
TIMED_STEPS = 2
#: Share of a device that a run should fill at most; allocators leave gaps.
USABLE = 0.95


@dataclass(frozen=True)
class Estimate:
    """What a run will need."""

    device: str
    memory_bytes: int | None
    """Most that will be in use at once; None where the system does not tell."""
    available_bytes: int | None
    """Of the whole device."""
    seconds_per_step: float
    """Mean over the training set."""
    longest_step_s: float
    """Of the largest item."""
    total_s: float
    num_parameters: int
    num_tokens: int
    """Of the largest item: target, references and text."""
    advice: tuple[str, ...] = ()
    """What to lower, in the order of what costs least; empty where it fits."""

    @property
    def fits(self) -> bool:
        known = self.memory_bytes is not None and self.available_bytes is not None
        return not known or self.memory_bytes <= USABLE * self.available_bytes

    def to_dict(self) -> dict[str, object]:
        return asdict(self) | {"fits": self.fits}

    def to_text(self) -> str:
        def show(size: int | None) -> str:
            return "unknown" if size is None else f"{size / 2**30:.1f} GiB"

        lines = [
            f"{self.num_parameters / 1e6:.1f} M trainable parameters, up to {self.num_tokens} "
            "tokens a sample",
            f"memory: {show(self.memory_bytes)} of {show(self.available_bytes)} on {self.device}",
            f"time: {self.seconds_per_step:.2f} s a step ({self.longest_step_s:.2f} s the "
            f"longest), {self.total_s / 3600:.2f} h in all",
            *(f"does not fit: {sentence}" for sentence in self.advice),
        ]
        return "\n".join(lines)


@dataclass(frozen=True)
class Measurement:
    seconds: float
    memory_bytes: int | None


def estimate_run(config: TrainConfig, dataset: CachedDataset) -> Estimate:
    """Loads two blocks, takes a few steps with each number, and reckons for all.

    Raises:
        FileError, KeyFormatError, ConfigError: as opening the model does; or `offload_blocks` or
            `compile` is set, which are not reckoned with.
    """
    if config.model.offload_blocks or config.model.compile:
        raise ConfigError(
            "the estimate does not know offload_blocks and compile; set them to 0 and false, "
            "and take its memory as the most and its time without either"
        )
    device = choose_device(config.model)
    largest = max(range(len(dataset)), key=lambda i: dataset.items[i].num_tokens)
    base = open_base_file(config.model.source)
    try:
        num_blocks = read_architecture(base.shapes, base.name, base.axes).num_layers
        width = base.shapes["img_in.weight"][0]
        one, two = (measure(config, dataset, largest, base, device, n) for n in (1, 2))
    finally:
        base.release()
    per_step = config.optimizer.accumulation
    step_s = (one.seconds + (num_blocks - 1) * (two.seconds - one.seconds)) * per_step
    memory = None
    if one.memory_bytes is not None and two.memory_bytes is not None:
        memory = one.memory_bytes + (num_blocks - 1) * (two.memory_bytes - one.memory_bytes)
    costs = [compute_cost(info, width) for info in dataset.items]
    mean_s = step_s * (sum(costs) / len(costs)) / costs[largest]
    estimate = Estimate(
        device=str(device),
        memory_bytes=memory,
        available_bytes=find_available(device),
        seconds_per_step=mean_s,
        longest_step_s=step_s,
        total_s=mean_s * config.steps,
        num_parameters=count_parameters(config, base),
        num_tokens=dataset.items[largest].num_tokens,
    )
    return estimate if estimate.fits else replace(estimate, advice=advise(config))


def compute_cost(info: ItemInfo, width: int) -> float:
    """Proportional to a sample's time: products by 24 w^2 per token, attention by 4 w per pair."""
    return info.num_tokens * (24 * width + 4 * info.num_tokens)


def load_blocks(
    config: TrainConfig, base: BaseFile, device: torch.device, num_blocks: int
) -> EditTransformer:
    """The model's first blocks and both its ends."""
    model, dtype = config.model, COMPUTE_DTYPES[config.model.compute_dtype]
    marked = base.zero_cond_t if model.variant == "auto" else model.variant == "2511"
    architecture = read_architecture(base.shapes, base.name, base.axes, marked)
    transformer = replace(architecture, num_layers=num_blocks).build_empty()
    for path in list_leaves(transformer):
        load_leaf(transformer, path, base, model.storage, dtype, device, device)
    transformer.requires_grad_(False)
    loaded = EditTransformer(transformer.eval(), dtype)
    loaded.enable_gradient_checkpointing(model.gradient_checkpointing)
    return loaded


def measure(
    config: TrainConfig,
    dataset: CachedDataset,
    index: int,
    base: BaseFile,
    device: torch.device,
    num_blocks: int,
) -> Measurement:
    """One micro-step and one optimizer step on so many blocks."""
    before = count_allocated(device)
    model = load_blocks(config, base, device, num_blocks)
    injection = inject(model.transformer, choose_settings(config.lora), seed=config.seed)
    options = config.optimizer
    parameters = injection.parameters()
    optimizer = build_optimizer(options.name, parameters, options.learning_rate, **options.options)
    averages = [p.detach().clone() for p in parameters] if options.ema_decay else []
    slots = [Slot(index, 0, place) for place in range(config.data.batch_size)]
    batch = load_batch(dataset, slots, config.seed).to(device)
    objective = Objective(replace(config.objective, auxiliary={}))
    seconds = []
    if device.type == "cuda":  # what loading needed does not count
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(1 + TIMED_STEPS):
        synchronize(device)
        started = time.perf_counter()
        objective.compute_losses(model, batch)[VELOCITY].mean().backward()
        synchronize(device)
        seconds.append(time.perf_counter() - started)
        optimizer.step()
        optimizer.zero_grad()
    del averages  # alive until here, as in training
    memory = None
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(device) - before
    return Measurement(min(seconds[1:]), memory)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def count_allocated(device: torch.device) -> int:
    """Bytes of tensors that are alive; 0 on a CPU, where nobody counts them."""
    gc.collect()
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated(device)


def choose_settings(lora: LoraSettings) -> LoraSettings:
    """The same on two blocks; patterns that name blocks by number become the full preset."""
    if any("transformer_blocks" in p for p in (*lora.targets, *lora.exclude, *lora.rank_pattern)):
        return replace(lora, targets=("full",), exclude=(), rank_pattern={})
    return lora


def find_available(device: torch.device) -> int | None:
    return torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else None


def count_parameters(config: TrainConfig, base: BaseFile) -> int:
    """Of the LoRA on the whole model."""
    transformer = read_architecture(base.shapes, base.name, base.axes).build_empty()
    return plan_injection(transformer, config.lora).num_parameters


def advise(config: TrainConfig) -> tuple[str, ...]:
    """What lowers the memory of a run, what costs least first."""
    model, data = config.model, config.data
    ways: Sequence[tuple[bool, str]] = (
        (not model.gradient_checkpointing, "set model.gradient_checkpointing to true"),
        (data.batch_size > 1, "set data.batch_size to 1 and raise optimizer.accumulation"),
        (config.optimizer.name == "adamw", 'set optimizer.name to "adamw8bit"'),
        (model.storage in ("bf16", "fp32"), 'set model.storage to "fp8", half the base\'s size'),
        (model.storage != "nf4", 'set model.storage to "nf4", a third of the base\'s size'),
        (config.lora.rank > 16, "lower lora.rank"),
        (True, "cache the training set at a smaller size or with fewer references"),
        (True, "set model.offload_blocks, at the price of time"),
    )
    return tuple(sentence for applies, sentence in ways if applies)
