"""The weights of a loaded MODEL, as a base to compare an adapter with."""

from __future__ import annotations

import torch

from ..lora_core.base_model.base_weights import BaseWeights
from ..lora_core.messages import message
from .host import ModelPatcher

NAME = message("the connected MODEL")
PREFIX = "diffusion_model."


def read_model_base(model: ModelPatcher) -> BaseWeights:
    """The weights as stored, left in place; each is copied to the CPU on request.

    Raises:
        KeyFormatError: the MODEL is not a Qwen-Image transformer.
    """
    return BaseWeights(collect_tensors(model), f"{NAME} ({type(model.model).__name__})")


def collect_tensors(model: ModelPatcher) -> dict[str, torch.Tensor]:
    """Key -> tensor as in a file of the diffusion model; nothing is moved or copied.

    ComfyUI's own state dict splits comfy-kitchen's quantised weights into the tensors of their
    file. A LoRA merged earlier has replaced some weights; the originals are in the patcher's
    backups, which all clones of one model share.
    """
    tensors = dict(model.model.diffusion_model.state_dict())
    backups = {key: kept.weight for key, kept in model.backup.items()}
    backups |= {key: weight for key, (weight, _) in model.hook_backup.items()}
    for key, weight in backups.items():
        if key.startswith(PREFIX):
            name = key.removeprefix(PREFIX)
            quantised = hasattr(weight, "dequantize") and hasattr(weight, "_qdata")
            tensors.update(weight.state_dict(name) if quantised else {name: weight})
    return tensors
