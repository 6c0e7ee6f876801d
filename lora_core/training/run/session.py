"""Opening what a configuration names: base model, LoRAs, training sets, VAE."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ...errors import ConfigError
from ...formats.architectures import read_variant
from ...injection.inject import Injection, inject
from ...messages import message
from ...text import format_count, shorten_list
from ..config.config import TrainConfig
from ..data.batches import load_repeated
from ..data.dataset import CachedDataset, check_text_width, read_dataset
from ..machine.memory import MemoryMeter
from ..machine.memory_limit import limit_memory
from ..model.gradient_checkpointing import adapt_to_memory, get_first_kind, is_free_to_choose
from ..model.loading import load_transformer
from ..model.model_config import ModelConfig
from ..model.sharding import Sharding, choose_sharding
from ..model.transformer import EditTransformer
from ..objective.losses import Decode
from ..sampling.image_decoder import load_decoder
from .adapter_files import DTYPES, build_run_metadata

if TYPE_CHECKING:
    from accelerate import Accelerator

COMPUTE_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass
class Session:
    """Everything `train` takes besides the configuration."""

    model: EditTransformer
    injection: Injection
    dataset: CachedDataset
    prior: CachedDataset | None
    decode: Decode | None
    variant: str | None


def open_session(
    config: TrainConfig,
    device: torch.device | None = None,
    accelerator: Accelerator | None = None,
    is_shared: bool = False,
) -> Session:
    """Loads and injects; training sets first, since their errors are found quickly.

    Args:
        accelerator: of `accelerate launch`, which may ask for the base to be sharded.
        is_shared: whether ComfyUI computes on the same GPU, and needs some of its memory.

    Raises:
        FileError, KeyFormatError, ShapeError, ConfigError, TargetError: as what it opens.
    """
    device = device or choose_device(config.model)
    limit_memory(device)
    sharding = choose_sharding(config.model, accelerator)
    dataset = read_dataset(config.data.folder)
    prior = read_dataset(config.data.prior) if config.data.prior else None
    for one in (dataset, prior):
        if one is not None:
            one.check_items()
    model = load_model(config.model, device, sharding)
    check_text_width(dataset, model.transformer.config.joint_attention_dim)
    injection = inject(model.transformer, config.lora, seed=config.seed, device=device)
    if is_free_to_choose(config.model) and sharding is None:
        sets = [(one, one.find_largest()) for one in (dataset, prior) if one is not None]
        largest, index = max(sets, key=lambda pair: pair[0].items[pair[1]].num_tokens)
        batch = load_repeated(largest, index, config.data.batch_size, config.seed).to(device)
        num_parameters = injection.plan.num_parameters
        free = MemoryMeter(device).find_free()
        adapt_to_memory(
            model,
            batch,
            num_blocks=len(model.blocks),
            num_parameters=num_parameters,
            free_bytes=free,
            is_shared=is_shared,
        )
    if config.model.compile:
        for block in model.blocks:  # after the LoRAs are in; one block's code serves all
            block.compile()
    decode = load_decoder(config.model.vae, device) if config.model.vae else None
    return Session(model, injection, dataset, prior, decode, find_variant(config.model, model))


def describe_session(session: Session, config: TrainConfig) -> list[str]:
    """What will be trained and how large its file will be, one sentence each."""
    plan = session.injection.plan
    metadata = build_run_metadata(config, session.dataset, config.steps, session.variant, False)
    size_bytes = plan.compute_file_size(
        DTYPES[config.saving.dtype], metadata=metadata, title=config.name
    )
    messages = [
        f"{format_count(len(plan.targets), 'module')}, {plan.num_parameters:,} parameters; the "
        f"adapter's file will take {size_bytes:,} bytes"
    ]
    if config.model.offload_blocks:
        messages.append(
            message(
                "storage is {storage}; {offload_blocks} of {num_blocks} blocks are offloaded to "
                "main memory",
                storage=config.model.storage,
                offload_blocks=config.model.offload_blocks,
                num_blocks=len(session.model.blocks),
            )
        )
    if session.model.is_adaptive:
        kind = json.dumps(session.model.gradient_checkpointing)
        messages.append(
            message(
                "gradient_checkpointing is {kind}, the fastest that the free memory allows",
                kind=kind,
            )
        )
    messages += session.model.notes
    for reason in dict.fromkeys(plan.skipped.values()):
        paths = [path for path, why in plan.skipped.items() if why == reason]
        messages.append(
            message("left out {paths}: {reason}", paths=shorten_list(paths, 4), reason=reason)
        )
    return messages


def load_model(
    config: ModelConfig, device: torch.device, sharding: Sharding | None = None
) -> EditTransformer:
    model = load_transformer(
        config.source,
        config.storage,
        device,
        COMPUTE_DTYPES[config.compute_dtype],
        zero_cond_t=None if config.variant == "auto" else config.variant == "2511",
        num_offloaded=config.offload_blocks,
        sharding=sharding,
    )
    model.enable_gradient_checkpointing(get_first_kind(config))
    return model


def choose_device(config: ModelConfig) -> torch.device:
    """The configured device, or the GPU where there is one.

    Raises:
        ConfigError: there is no such device.
    """
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(config.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise ConfigError(
            "the device {device!r} does not exist; expected cpu, cuda or auto", device=config.device
        ) from None
    return device


def find_variant(config: ModelConfig, model: EditTransformer) -> str | None:
    """The variant for the adapter's metadata; None where it is unknown."""
    if config.variant != "auto":
        return config.variant
    if model.zero_cond_t:
        return "2511"
    return read_variant(config.source.replace("\\", "/").rpartition("/")[2], False)
