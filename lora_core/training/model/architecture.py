"""The sizes of a Qwen-Image transformer, read from the shapes in its file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from ...base_model.families import detect_by_names
from ...base_model.qwen_image import QWEN_IMAGE
from ...errors import KeyFormatError
from ...messages import message
from ...text import shorten
from ..data.latents import NUM_CHANNELS
from .libraries import import_from_diffusers
from .transformer import PATCH

BLOCKS = "transformer_blocks"
FIRST_BLOCK = f"{BLOCKS}.0."
#: Numbers of a token, before and after the blocks: a patch of latents.
PATCH_NUMBERS = NUM_CHANNELS * PATCH**2
#: Of a block's number that are read.
MAX_DIGITS = 9
#: Image number, row and column.
NUM_AXES = 3
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
        model.register_to_config(zero_cond_t=zero_cond_t)  # not an argument before 0.37
        return model


def read_architecture(
    shapes: Mapping[str, Sequence[int]],
    name: str,
    axes: Sequence[int] | None = None,
    zero_cond_t: bool = False,
) -> Architecture:
    """The architecture that a file's shapes belong to, at any size; nothing is built for it.

    Args:
        shapes: key without prefix -> shape.
        name: the file's, for the error.
        axes: entries of a head that turn with image number, row and column, from an untrusted
            config.json; None: in the full model's proportions.

    Raises:
        KeyFormatError: a tensor that determines a size is missing, the sizes are impossible, or a
            block's number is missing.
    """
    name = shorten(name)

    def refuse(what: str) -> KeyFormatError:
        return KeyFormatError(
            "{name} is not a Qwen-Image model: {what}. Choose a diffusion model of "
            "Qwen-Image-Edit.",
            **{"name": name, "what": what},
        )

    def get(key: str, ndim: int) -> Sequence[int]:
        shape = shapes.get(key)
        if shape is None or len(shape) != ndim or not all(shape):
            if shape is None:
                raise refuse(message("{key} is missing", key=key))
            shown = shorten(str(tuple(shape)))
            raise refuse(message("{key} has the shape {shape}", key=key, shape=shown))
        return shape

    check_family(shapes, name)
    width, in_channels = get("img_in.weight", 2)
    (text_width,) = get("txt_norm.weight", 1)
    (head_width,) = get(NORM_Q, 1)
    patch_outputs = get("proj_out.weight", 2)[0]
    if (in_channels, patch_outputs) != (PATCH_NUMBERS, PATCH_NUMBERS):
        what = message(
            "it takes {taken} and returns {given} numbers per token; expected {number} for both",
            **{"taken": in_channels, "given": patch_outputs, "number": PATCH_NUMBERS},
        )
        raise refuse(what)
    if width % head_width or head_width % 2:
        what = "a width of {width} has no even heads of {head}"
        raise refuse(message(what, width=width, head=head_width))
    return Architecture(
        num_layers=count_blocks(shapes, name),
        attention_head_dim=head_width,
        num_attention_heads=width // head_width,
        joint_attention_dim=text_width,
        in_channels=in_channels,
        out_channels=patch_outputs // PATCH**2,
        axes_dims_rope=choose_axes(head_width) if axes is None else check_axes(axes, head_width),
        zero_cond_t=zero_cond_t,
    )


def check_family(keys: Iterable[str], name: str) -> None:
    family = detect_by_names(key.rpartition(".")[0] for key in keys)
    if family is not None and family is not QWEN_IMAGE:
        raise KeyFormatError(
            "{name} is a {family} model, on which nothing can be trained here yet. Choose a "
            "diffusion model of Qwen-Image-Edit.",
            name=name,
            family=family.title,
        )


def count_blocks(keys: Iterable[str], name: str) -> int:
    """How many blocks these keys belong to.

    Raises:
        KeyFormatError: their numbers are not 0, 1, ... without a gap, so that a single odd key
            could demand any number of blocks.
    """
    numbers: set[int] = set()
    for key in keys:
        first, _, rest = key.partition(".")
        number = rest.partition(".")[0]
        if first == BLOCKS and number.isascii() and number.isdecimal():
            numbers.add(int(number[:MAX_DIGITS]))
    highest = max(numbers, default=-1)
    if len(numbers) != highest + 1:
        raise KeyFormatError(
            "{name} holds {num_numbers} blocks, but one of them has the number {highest}; "
            "expected 0, 1, ... without a gap. The file is incomplete or changed: choose a "
            "complete diffusion model of Qwen-Image-Edit.",
            name=name,
            num_numbers=len(numbers),
            highest=highest,
        )
    return len(numbers)


def check_axes(axes: Any, head_width: int) -> tuple[int, ...]:
    """The axes as a config.json gives them.

    Raises:
        KeyFormatError: not three even numbers that make up a head.
    """
    is_list = isinstance(axes, list | tuple) and len(axes) == NUM_AXES
    if is_list and all(type(axis) is int and axis >= 0 and axis % 2 == 0 for axis in axes):
        if sum(axes) == head_width:
            return tuple(axes)
    raise KeyFormatError(
        "config.json's axes_dims_rope is {axes}; expected {num_axes} even numbers whose sum is "
        "a head's width, {head_width}. Download or copy config.json again.",
        axes=shorten(repr(axes)),
        num_axes=NUM_AXES,
        head_width=head_width,
    )


def choose_axes(head_width: int) -> tuple[int, int, int]:
    """(16, 56, 56) for heads of 128, and as near to that as even numbers come for others."""
    number = max(2, head_width // 8 // 2 * 2)
    side = (head_width - number) // 4 * 2
    return head_width - 2 * side, side, side
