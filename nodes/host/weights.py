"""Our own weights, which ComfyUI loads, offloads, pages, pins and casts like a model's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import comfy.model_patcher
import comfy.ops
import torch

from .models import ModelPatcher, Placement

#: Alignment of each tensor's start, in elements: 256 bytes of bfloat16, as CUDA aligns.
ALIGNMENT = 128


class PackedWeights(torch.nn.Module, comfy.ops.CastWeightBiasOp):
    """Tensors moved as one: a single flat weight, one page fault and one copy for all.

    ComfyUI only knows a module's `weight` and `bias`; here the weight packs several tensors.

    Args:
        tensors: any shapes and types, stored as `dtype`, one after the other.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], dtype: torch.dtype):
        super().__init__()
        #: (shape, strides, first element) of each tensor.
        self.views: list[tuple[tuple[int, ...], tuple[int, ...], int]] = []
        start = 0
        for tensor in tensors:
            strides = tuple(math.prod(tensor.shape[axis + 1 :]) for axis in range(tensor.dim()))
            self.views.append((tuple(tensor.shape), strides, start))
            start += math.ceil(tensor.numel() / ALIGNMENT) * ALIGNMENT
        flat = torch.zeros(start, dtype=dtype)
        self.weight = torch.nn.Parameter(flat, requires_grad=False)
        self.register_parameter("bias", None)  # ComfyUI's casts ask for one
        for view, tensor in zip(self.split(flat), tensors, strict=True):
            view.copy_(tensor)

    def fetch(self, like: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """The flat weight on the device and in the dtype of `like`, and a ticket for `release`."""
        weight: Any = self._parameters["weight"]
        if (
            weight.dtype == like.dtype
            and weight.device == like.device
            and "_v" not in self.__dict__  # set under dynamic VRAM
            and not self.weight_function
        ):
            return weight, None
        weight, bias, origin = comfy.ops.cast_bias_weight(self, like, offloadable=True)
        return weight, (weight, bias, origin)

    def release(self, ticket: Any) -> None:
        """Must be called once the last product that reads the fetched weight is queued."""
        if ticket is not None:
            comfy.ops.uncast_bias_weight(self, *ticket)

    def split(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """The tensors as views of a fetched weight, each in its shape."""
        first = flat.storage_offset()
        return [
            flat.as_strided(shape, strides, first + start) for shape, strides, start in self.views
        ]


def wrap_in_patcher(module: torch.nn.Module, placement: Placement) -> ModelPatcher:
    """A patcher of its own, through which ComfyUI loads, offloads and accounts for `module`."""
    # Looked up at call time: main.py swaps in the dynamic-VRAM class after import.
    return comfy.model_patcher.CoreModelPatcher(
        module, placement.load_device, placement.offload_device
    )


def prioritize(patcher: ModelPatcher) -> None:
    """Under dynamic VRAM, makes the pages of this patcher the last to be evicted from a full card.

    ComfyUI loads a model's additional models before the model and gives each in turn the highest
    priority, so that of all weights the additional ones would be evicted first. A no-op without
    dynamic VRAM, or if a later ComfyUI has no such pages.
    """
    get_pages = getattr(patcher, "_vbar_get", None)
    pages = None if get_pages is None else get_pages()
    prioritize_pages = getattr(pages, "prioritize", None)
    if prioritize_pages is not None:
        prioritize_pages()
