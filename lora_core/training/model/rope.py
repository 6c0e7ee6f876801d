"""Rotary position embedding (RoPE) with the positions that ComfyUI gives to text and images.

diffusers counts the text from half the side of the *largest* image and centres odd grids one place
further down; ComfyUI counts from the target's side alone (comfy/ldm/qwen_image/model.py,
`process_img` and `_forward`). A LoRA is used there, so it is trained with those.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

THETA = 10000.0

Grid = tuple[int, int]
"""Height and width of an image in patches."""
Rotation = tuple[torch.Tensor, torch.Tensor]
"""See `compute_rotation`."""


def compute_positions(grids: Sequence[Grid], num_text_tokens: int) -> torch.Tensor:
    """(tokens, 3), float64: image number, row and column of the text's tokens, then the images'.

    Args:
        grids: the target's, then those of the references in their order.
    """
    start = max(side // 2 for side in grids[0])
    text = torch.arange(start, start + num_text_tokens, dtype=torch.float64)
    parts = [text[:, None].expand(-1, 3)]
    for number, (height, width) in enumerate(grids):
        rows = torch.arange(height, dtype=torch.float64) - height // 2
        columns = torch.arange(width, dtype=torch.float64) - width // 2
        image = torch.full((height, width), float(number), dtype=torch.float64)
        places = torch.meshgrid(rows, columns, indexing="ij")
        parts.append(torch.stack([image, *places], dim=-1).reshape(-1, 3))
    return torch.cat(parts)


@lru_cache(maxsize=64)
def compute_rotation(
    axes: tuple[int, ...],
    grids: tuple[Grid, ...],
    num_text_tokens: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Rotation:
    """What `rotate` takes: cosine and signed sine of every token's angles, (tokens, head width).

    Both entries of a pair have their own: the sine of the first is negative.

    Args:
        axes: entries of a head that turn with the image number, the row and the column.
        dtype: as in ComfyUI, of the activations.
    """
    # Kept for later calls, some of which will need gradients: never an inference tensor.
    with torch.inference_mode(False), torch.no_grad():
        positions = compute_positions(grids, num_text_tokens)
        angles = []
        for position, width in zip(positions.unbind(1), axes, strict=True):
            exponent = torch.arange(0, width, 2, dtype=torch.float64) / width
            angles.append(position[:, None] * THETA**-exponent)
        angle = torch.cat(angles, dim=1)
        cos = angle.cos().repeat_interleave(2, dim=1)
        sin = torch.stack([-angle.sin(), angle.sin()], dim=-1).flatten(1)
        return cos.float().to(device, dtype), sin.float().to(device, dtype)


def rotate(x: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """Turns each pair of neighbouring entries of (batch, tokens, heads, head width)."""
    cos, sin = (part[:, None] for part in rotation)
    return torch.addcmul(x * cos, swap_pairs(x), sin)


def swap_pairs(x: torch.Tensor) -> torch.Tensor:
    """Exchanges the two entries of every pair."""
    return x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
