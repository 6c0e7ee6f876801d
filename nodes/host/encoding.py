"""The building blocks of ComfyUI's own encoding nodes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import comfy.utils
import torch

from .models import ModelPatcher


def get_stock_encoder(class_name: str) -> Any:
    """The class of ComfyUI's own node that encodes a prompt with its images."""
    from comfy_extras import nodes_qwen

    return getattr(nodes_qwen, class_name)


def scale_area(image: torch.Tensor, width: int, height: int) -> torch.Tensor:
    """(1, h, w, 3) -> (1, height, width, 3) as the stock encoders scale."""
    scaled = comfy.utils.common_upscale(image.movedim(-1, 1), width, height, "area", "disabled")
    return scaled.movedim(1, -1)


def list_weights(patcher: ModelPatcher) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of all weights as loaded, without patches."""
    for key, tensor in patcher.model.state_dict().items():
        kept = patcher.backup.get(key)  # the original, if the module holds a patched one
        yield key, tensor if kept is None else kept.weight
