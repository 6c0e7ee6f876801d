"""The sizes of a Qwen-Image transformer, read from the shapes in its file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from ..errors import KeyFormatError
from .libraries import import_from_diffusers
from .transformer import PATCH

#: ComfyUI's marker of 2511 (comfy/model_detection.py); a tensor without content.
MARKER = "__index_timestep_zero__"
FIRST_BLOCK = "transformer_blocks.0."
NORM_Q = f"{FIRST_BLOCK}attn.norm_q.weight"


@dataclass(frozen=True)
class Architecture:
    """Arguments of diffusers' QwenImageTransformer2DModel, by default the full model's."""

    num_layers: int = 60
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 3584
    in_channels: int = 64
    out_channels: int = 16
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)
    zero_cond_t: bool = False

    def build_empty(self) -> nn.Module:
        """The model without any data, on torch's meta device.

        Raises:
            ConfigError: diffusers is missing or broken.
        """
        (QwenImageTransformer2DModel,) = import_from_diffusers("QwenImageTransformer2DModel")
        arguments = asdict(self)
        zero_cond_t = arguments.pop("zero_cond_t")
        with torch.device("meta"):
            model = QwenImageTransformer2DModel(**arguments)
        model.register_to_config(zero_cond_t=zero_cond_t)  # no argument of its own before 0.37
        return model


def read_architecture(
    shapes: Mapping[str, Sequence[int]],
    name: str,
    axes: Sequence[int] | None = None,
    zero_cond_t: bool = False,
) -> Architecture:
    """The architecture that a file's shapes belong to, at any size.

    Args:
        shapes: key without prefix -> shape.
        name: the file's, for the error.
        axes: entries of a head that turn with image number, row and column; None: in the full
            model's proportions.

    Raises:
        KeyFormatError: a tensor that tells a size is missing.
    """

    def get(key: str, ndim: int) -> Sequence[int]:
        shape = shapes.get(key)
        if shape is None or len(shape) != ndim:
            found = "is missing" if shape is None else f"has the shape {tuple(shape)}"
            raise KeyFormatError(
                f"{name} is no Qwen-Image model: {key} {found}. Choose a diffusion model of "
                "Qwen-Image-Edit."
            )
        return shape

    width, in_channels = get("img_in.weight", 2)
    (text_width,) = get("txt_norm.weight", 1)
    (head_width,) = get(NORM_Q, 1)
    patch_outputs = get("proj_out.weight", 2)[0]
    return Architecture(
        num_layers=count_blocks(shapes),
        attention_head_dim=head_width,
        num_attention_heads=width // head_width,
        joint_attention_dim=text_width,
        in_channels=in_channels,
        out_channels=patch_outputs // PATCH**2,
        axes_dims_rope=tuple(axes) if axes is not None else choose_axes(head_width),
        zero_cond_t=zero_cond_t,
    )


def count_blocks(keys: Mapping[str, Any]) -> int:
    """One more than the highest block's number; a gap shows as missing tensors."""
    numbers = [
        int(number)
        for key in keys
        if key.startswith("transformer_blocks.") and (number := key.split(".")[1]).isdecimal()
    ]
    return max(numbers, default=-1) + 1


def choose_axes(head_width: int) -> tuple[int, int, int]:
    """(16, 56, 56) for heads of 128, and as near to that as even numbers come for others."""
    number = max(2, head_width // 8 // 2 * 2)
    side = (head_width - number) // 4 * 2
    return head_width - 2 * side, side, side
