"""LoRAs as ComfyUI's own patches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import comfy.weight_adapter
import torch

from ...lora_core import ConfigError, ModuleWeights, compute_delta
from ...lora_core.stored import load
from ...lora_core.strengths import Strengths
from .models import ModelPatcher


class MergedWeights(comfy.weight_adapter.WeightAdapterBase):
    """Lets ComfyUI's patcher add a delta computed here, for kinds it has not or computes otherwise.

    ComfyUI 0.30 divides a DoRA by the wrong norm and squares an OFT's strength
    (comfy/weight_adapter/base.py and oft.py).

    `weights` is the module's weights, then their tensors one by one: ComfyUI finds them there to
    count, pin and prefetch them, and puts the moved ones into a copy of this object
    (comfy/lora.py, prefetch_prepared_value). Dynamic VRAM fails on a patch without any tensor.
    """

    name = "qwen_edit_lora"

    def __init__(self, loaded_keys: set[str], weights: tuple[ModuleWeights, ...]):
        self.loaded_keys = loaded_keys
        self.weights = weights

    @classmethod
    def wrap(cls, weights: ModuleWeights) -> MergedWeights:
        return cls(set(), (weights, *(load(tensor) for tensor in weights.parts.values())))

    def calculate_weight(
        self,
        weight,
        key,
        strength,
        strength_model,
        offset,
        function,
        intermediate_dtype=torch.float32,
        original_weight=None,
    ):
        stored, *tensors = self.weights
        parts = dict(zip(stored.parts, tensors, strict=True))
        module_weights = stored.with_parts(parts).to(weight.device)
        delta = compute_delta(module_weights, weight).reshape(weight.shape)
        weight += function((strength * delta).to(weight.dtype))
        return weight


def build_patch(weights: ModuleWeights) -> Any:
    """ComfyUI's own patch where it computes the same, so that its memory management knows it."""
    if weights.kind == "LoRA":
        values = (weights.lora_B, weights.lora_A, weights.alpha, None, None, None)
        return comfy.weight_adapter.LoRAAdapter(set(), values)
    if weights.kind == "diff" and weights.shape is not None:
        return ("diff", (weights.part("diff"),))
    return MergedWeights.wrap(weights)


def add_merge(
    model: ModelPatcher, modules: Mapping[str, ModuleWeights], strengths: Strengths
) -> None:
    """Adds native patches to this clone: the weights and biases of `modules`.

    Raises:
        ConfigError: a module has no weight that ComfyUI knows; it would leave such a patch out.
    """
    by_strength: dict[float, dict[str, Any]] = defaultdict(dict)
    for path in strengths.select(modules):
        weights, patches = modules[path], by_strength[strengths.resolve(path)]
        if weights.kind != "diff" or weights.shape is not None:
            patches[f"diffusion_model.{path}.weight"] = build_patch(weights)
        if weights.bias_delta is not None:
            patches[f"diffusion_model.{path}.bias"] = ("diff", (weights.bias_delta,))
    for strength, patches in by_strength.items():
        taken = model.add_patches(patches, strength)
        missing = [key for key in patches if key.endswith(".weight") and key not in taken]
        if missing:
            raise ConfigError(
                f"{len(missing)} modules of this MODEL, such as {missing[0]}, have no weight "
                "that a LoRA could be merged into. Use mode 'side path' or 'auto', without "
                "torch.compile and other nodes that need merged weights."
            )
