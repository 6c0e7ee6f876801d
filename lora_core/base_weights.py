"""The weights of a base model, read from its file one module at a time."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .errors import FileError, KeyFormatError
from .stored import AnyTensor, SafetensorsFile, load
from .targets import is_known

#: What ComfyUI's and diffusers' single files put in front of the transformer's keys.
PREFIXES = ("", "model.diffusion_model.", "diffusion_model.", "transformer.")
#: Names of the per-tensor factor of a scaled fp8 weight (comfy/quant_ops.py, and older files).
SCALE_NAMES = ("weight_scale", "scale_weight")


@dataclass(frozen=True)
class BaseWeight:
    """One weight as stored and as it acts: values = stored * scale."""

    stored: torch.Tensor
    scale: float | None

    @property
    def values(self) -> torch.Tensor:
        """float32 (out, in)."""
        values = self.stored.float()
        return values if self.scale is None else values * self.scale

    @property
    def storage(self) -> str:
        name = str(self.stored.dtype).removeprefix("torch.")
        return name if self.scale is None else f"scaled {name}"


class BaseWeights:
    """Looks weights up by module path; holds none of them."""

    def __init__(self, tensors: Mapping[str, AnyTensor], name: str, file=None):
        self.name = name
        self._tensors = tensors
        self._file = file
        self._prefix = find_prefix(tensors, name)

    def get(self, module_path: str) -> BaseWeight | None:
        """The weight of a module; None if the base has none of that name.

        Raises:
            FileError: stored in a way that is not understood yet (integers, block-wise scales).
        """
        stem = f"{self._prefix}{module_path}"
        weight = self._tensors.get(f"{stem}.weight")
        if weight is None:
            return None
        scales = (self._tensors.get(f"{stem}.{name}") for name in SCALE_NAMES)
        scale = next((scale for scale in scales if scale is not None), None)
        if not weight.dtype.is_floating_point or (scale is not None and scale.numel() != 1):
            raise FileError(
                f"{self.name} stores {module_path} as {str(weight.dtype).removeprefix('torch.')}"
                + (f" with {scale.numel()} scales" if scale is not None else "")
                + ", which cannot be read here yet; expected bf16, fp16, fp32, fp8 or fp8 with one "
                "scale per weight. Choose such a file of the same model."
            )
        return BaseWeight(load(weight), None if scale is None else float(load(scale).item()))

    def list_matrices(self) -> dict[str, AnyTensor]:
        """Module path -> its weight as stored, perhaps still on disk, of every known Linear."""
        start, end = len(self._prefix), -len(".weight")
        return {
            key[start:end]: tensor
            for key, tensor in self._tensors.items()
            if key.startswith(self._prefix) and key.endswith(".weight")
            if tensor.ndim == 2 and is_known(key[start:end])
        }

    def release(self) -> None:
        if self._file is not None:
            self._file.release()


def open_base(base: BaseWeights | Mapping[str, AnyTensor] | str | os.PathLike[str]) -> BaseWeights:
    """A base from a model file or from tensors by key.

    Raises:
        FileError: the file is missing or damaged.
        KeyFormatError: it holds no Qwen-Image transformer.
    """
    if isinstance(base, BaseWeights):
        return base
    if isinstance(base, Mapping):
        return BaseWeights(base, "the base")
    file = SafetensorsFile(base)
    return BaseWeights(file.tensors, file.name, file)


def find_prefix(tensors: Mapping[str, AnyTensor], name: str) -> str:
    for prefix in PREFIXES:
        for key in tensors:
            if key.startswith(prefix) and key.endswith(".weight"):
                path = key[len(prefix) :].removesuffix(".weight")
                if path.startswith("transformer_blocks.") and is_known(path):
                    return prefix
    example = next(iter(tensors), "none")
    raise KeyFormatError(
        f"{name} is no Qwen-Image model: none of its {len(tensors)} keys is like "
        f"'transformer_blocks.0.attn.to_q.weight' (the first is {example!r}). Choose the diffusion "
        "model's file."
    )
