"""LoRAs as ComfyUI's own patches.

ComfyUI keeps a patch's tensors as long as any MODEL has it, and recomputes a weight whenever the
model returns to its device. The tensors are views of the file, as with ComfyUI's own loader, so
each patch checks the file's fingerprint before use. That takes microseconds; a copy would take as
much memory as the LoRA.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import comfy.weight_adapter
import torch

from ...lora_core import (
    ConfigError,
    DiffWeights,
    FileError,
    LoraWeights,
    ModuleWeights,
    compute_delta,
)
from ...lora_core.adapter.strengths import Strengths
from ...lora_core.base_model.family import Family
from ...lora_core.disk.safetensors_file import SafetensorsFile, StoredTensor, load, read_signature
from ...lora_core.text import format_count, shorten
from .models import ModelPatcher
from .places import Place


def find_files(weights: ModuleWeights) -> tuple[SafetensorsFile, ...]:
    """The files that its tensors are views of."""
    parts = weights.parts.values()
    files = (part.file for part in parts if isinstance(part, StoredTensor))
    return tuple({file: None for file in files if isinstance(file, SafetensorsFile)})


def check_not_overwritten(files: Iterable[SafetensorsFile]) -> None:
    """Raises FileError if a file was overwritten in place, so that its views show other content.

    A file that was deleted, or replaced by another of its name, remains readable through a mapping.
    """
    for file in files:
        try:
            found = read_signature(file.path)
        except FileError:
            continue
        if found != file.signature and found[2] == file.signature[2]:
            raise FileError(
                "{file} was overwritten on disk while this MODEL held it merged; queue the "
                "prompt again to read the new file.",
                file=shorten(file.name),
            )


class CheckedLora(comfy.weight_adapter.LoRAAdapter):
    """ComfyUI's own adapter, with the files its tensors are views of after its six weights."""

    def calculate_weight(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        check_not_overwritten(self.weights[6])
        return super().calculate_weight(*args, **kwargs)


class CheckedDiff(comfy.weight_adapter.WeightAdapterBase):
    """A whole delta as ComfyUI's "diff" adds it; `weights` are the delta and its files."""

    name = "qwen_edit_lora_diff"

    def __init__(self, loaded_keys: set[str], weights: tuple[torch.Tensor, tuple]):
        self.loaded_keys = loaded_keys
        self.weights = weights

    def calculate_weight(
        self,
        weight: torch.Tensor,
        key: str,
        strength: float,
        strength_model: float,
        offset: Any,
        function: Callable[[torch.Tensor], torch.Tensor],
        intermediate_dtype: torch.dtype = torch.float32,
        original_weight: Any = None,
    ) -> torch.Tensor:
        diff, files = self.weights
        check_not_overwritten(files)
        weight += function(strength * diff.to(weight.device, weight.dtype))
        return weight


class MergedWeights(comfy.weight_adapter.WeightAdapterBase):
    """Lets ComfyUI's patcher add a delta computed here, for kinds it lacks or computes differently.

    ComfyUI 0.30 divides a DoRA by the wrong norm and squares an OFT's strength
    (comfy/weight_adapter/base.py and oft.py).

    `weights` is the module's weights, then each of their tensors: ComfyUI finds them there to
    count, pin and prefetch them, and puts the moved ones into a copy of this object
    (comfy/lora.py, prefetch_prepared_value). Dynamic VRAM fails on a patch without any tensor.
    """

    name = "qwen_edit_lora"

    def __init__(self, loaded_keys: set[str], weights: tuple[Any, ...]):
        self.loaded_keys = loaded_keys
        self.weights = weights

    @classmethod
    def wrap(cls, weights: ModuleWeights) -> MergedWeights:
        return cls(set(), (weights, *(load(tensor) for tensor in weights.parts.values())))

    def calculate_weight(
        self,
        weight: torch.Tensor,
        key: str,
        strength: float,
        strength_model: float,
        offset: Any,
        function: Callable[[torch.Tensor], torch.Tensor],
        intermediate_dtype: torch.dtype = torch.float32,
        original_weight: Any = None,
    ) -> torch.Tensor:
        stored, *tensors = self.weights
        check_not_overwritten(find_files(stored))
        parts = dict(zip(stored.parts, tensors, strict=True))
        module_weights = stored.with_parts(parts).to(weight.device)
        delta = compute_delta(module_weights, weight).reshape(weight.shape)
        weight += function((strength * delta).to(weight.dtype))
        return weight


def build_patch(weights: ModuleWeights) -> Any:
    """ComfyUI's own patch where it computes the same, since its memory management knows it."""
    files = find_files(weights)
    if isinstance(weights, LoraWeights):
        values = (weights.lora_B, weights.lora_A, weights.alpha, None, None, None, files)
        return CheckedLora(set(), values)
    if isinstance(weights, DiffWeights) and weights.shape is not None:
        return CheckedDiff(set(), (weights.need_part("diff"), files))
    return MergedWeights.wrap(weights)


def add_merge(
    model: ModelPatcher,
    modules: Mapping[str, ModuleWeights],
    strengths: Strengths,
    find_place: Callable[[str], Place | None] = Place,
    family: Family | None = None,
) -> None:
    """Adds native patches to this clone: the weights and biases of `modules`.

    Args:
        find_place: module path -> where this model keeps the module.
        family: that of the model, see `Strengths.resolve`.

    Raises:
        ConfigError: ComfyUI knows no such weight or bias, and would skip the patch silently.
    """
    by_strength: dict[float, dict[Any, Any]] = defaultdict(dict)
    for path in strengths.select(modules, family):
        weights, patches = modules[path], by_strength[strengths.resolve(path, family)]
        place = find_place(path)
        assert place is not None  # modules that the model lacks were left out
        if weights.kind != "diff" or weights.shape is not None:
            patches[place.build_key("weight", weights.out_features)] = build_patch(weights)
        if weights.bias_delta is not None:
            bias = (weights.bias_delta, find_files(weights))
            patches[place.build_key("bias", weights.out_features)] = CheckedDiff(set(), bias)
    for strength, patches in by_strength.items():
        taken = model.add_patches(patches, strength)
        missing = [key for key in patches if key not in taken]
        if missing:
            first = missing[0] if isinstance(missing[0], str) else missing[0][0]
            raise ConfigError(
                "{num_modules} of this MODEL, such as {missing}, without a weight or bias that "
                "a LoRA could be merged into. Use mode 'side path' or 'auto', without "
                "torch.compile and other nodes that need merged weights.",
                num_modules=format_count(len(missing), "module"),
                missing=first,
            )
