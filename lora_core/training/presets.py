"""Settings to start from: how much to train, and how to keep the base in the memory there is."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError

GIB = 2**30

#: Bytes a weight takes, the most exact storage first. nf4 with its modulation in 8 bits, which are
#: a third of Qwen-Image's weights; see `quantization`.
BYTES_PER_WEIGHT = {"bf16": 2.0, "fp8": 1.0, "nf4": 0.68}
#: What training needs beside the base's weights: at 1024 x 1024 with one reference (8192 tokens)
#: 3 GiB for the inputs of 60 blocks, 2 GiB for one block's activations, 2 GiB for a LoRA of rank 16
#: with its optimizer.
HEADROOM = 7 * GIB


@dataclass(frozen=True)
class Preset:
    """A start: settings as `config_files.config_from_dict` takes them, and what they are for."""

    about: str
    settings: Mapping[str, Mapping[str, Any]]


PRESETS: dict[str, Preset] = {
    "standard": Preset(
        "Rank 16 on attention and MLP of both streams: styles, grades, a kind of edit.",
        {
            "lora": {"rank": 16, "targets": ("full",)},
            "optimizer": {"learning_rate": 1e-4, "schedule": "cosine", "final_factor": 0.1},
        },
    ),
    "light": Preset(
        "Rank 8 on attention only, twice the learning rate: does this idea work at all?",
        {
            "lora": {"rank": 8, "targets": ("attention",)},
            "optimizer": {"learning_rate": 2e-4, "schedule": "constant"},
        },
    ),
    "detailed": Preset(
        "Rank 64, averaged weights beside the raw ones: a person, a product, fine texture.",
        {
            "lora": {"rank": 64, "targets": ("full",)},
            "optimizer": {
                "learning_rate": 5e-5,
                "schedule": "cosine",
                "final_factor": 0.1,
                "ema_decay": 0.99,
            },
        },
    ),
}


def apply_preset(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The preset's settings with those given on top, table by table.

    Args:
        settings: as for `config_files.config_from_dict`; what stands here wins.

    Raises:
        ConfigError: an unknown preset.
    """
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}; expected one of {', '.join(PRESETS)}")
    merged: dict[str, Any] = {
        table: dict(values) for table, values in copy.deepcopy(dict(PRESETS[name].settings)).items()
    }
    for key, value in settings.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), dict):
            merged[key] = {**merged[key], **value}
        else:
            merged[key] = value
    return merged


def choose_storage(num_weights: int, available_bytes: int | None) -> tuple[str, str]:
    """The most exact storage and compute dtype that leaves room to train.

    Args:
        num_weights: of the base model; 20.4 billion for Qwen-Image.
        available_bytes: of the GPU; None for a CPU, where float32 is both exact and fast.

    Returns:
        `ModelConfig.storage` and `.compute_dtype`. The smallest storage where none leaves room; an
        estimate then says what to lower.
    """
    if available_bytes is None:
        return "fp32", "fp32"
    for storage, size in BYTES_PER_WEIGHT.items():
        if num_weights * size + HEADROOM <= available_bytes:
            return storage, "bf16"
    return list(BYTES_PER_WEIGHT)[-1], "bf16"
