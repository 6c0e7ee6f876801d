"""How the Train node fits a base model into the memory of the devices that its job gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from ..lora_core import TARGET_PRESETS, count_parameters
from ..lora_core.base_model.base_files import open_base_file
from ..lora_core.jobs.devices import Device
from ..lora_core.training.config.config import TrainConfig
from ..lora_core.training.config.presets import choose_storage, measure_base
from ..lora_core.training.data.dataset import read_dataset
from ..lora_core.training.machine.memory import find_free_host_memory
from ..lora_core.training.model.architecture import read_architecture
from .server.job_devices import find_memory
from .training_settings import AUTO

#: Bytes by which the memory of GPUs of one kind may differ.
SAME_KIND = 2**28


def choose_base(
    config: TrainConfig, storage: str, own: Mapping[str, Any], devices: Sequence[Device]
) -> tuple[dict[str, Any], list[str], int]:
    """Chooses how the base is stored on the devices that the job gets.

    Args:
        config: the requested run, with its LoRA and training set.
        storage: the node's input.
        own: the user's own model settings from `more_settings`; they take precedence.

    Returns:
        Values of `ModelConfig`; lines for the report; GPU memory in bytes the choice needs.

    Raises:
        KeyFormatError: the file is not a Qwen-Image model.
    """
    available = find_memory(devices)
    if storage != AUTO or "storage" in own:
        dtype = {"compute_dtype": "fp32" if available is None else "bf16"}
        return dtype if storage == AUTO else {"storage": storage, **dtype}, [], 0
    base = open_base_file(config.model.source)
    try:
        read_architecture(base.shapes, base.name, base.axes)
        size = measure_base(base.shapes)
    finally:
        base.release()
    host_bytes = find_free_host_memory()
    offload_blocks = own.get("offload_blocks")
    if offload_blocks is None and config.model.gradient_checkpointing not in (AUTO, True):
        offload_blocks = 0  # offloaded blocks are recomputed
    choice = choose_storage(
        size,
        available,
        size.count_headroom(
            count_tokens(config), count_lora_parameters(config), bool(config.optimizer.ema_decay)
        ),
        # one process per device
        host_bytes=None if host_bytes is None else host_bytes // len(devices),
        offload_blocks=offload_blocks,
        has_nf4=find_spec("bitsandbytes") is not None,
    )
    settings = {
        "storage": choice.storage,
        "compute_dtype": choice.compute_dtype,
        "offload_blocks": choice.offload_blocks,
    }
    needed_bytes = 0 if available is None else available - SAME_KIND
    return settings, [choice.describe(size)], needed_bytes


def count_tokens(config: TrainConfig) -> int:
    """Tokens in a batch of the largest sample."""
    folders = (config.data.folder, config.data.prior)
    sets = [read_dataset(folder) for folder in folders if folder]
    return config.data.batch_size * max(one.items[one.find_largest()].num_tokens for one in sets)


def count_lora_parameters(config: TrainConfig) -> int:
    """Trainable parameters on the full model; patterns count as all layers but modulation."""
    names = [name if name in TARGET_PRESETS else "full" for name in config.lora.targets]
    rank = config.lora.rank
    every = count_parameters("full + modulation", rank)
    return min(every, sum(count_parameters(name, rank) for name in names))
