"""What a cached item may be: its entries in an index, its tensors by shape and dtype."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from ...disk.safetensors_file import AnyTensor
from ...errors import FileError, ShapeError
from ...messages import message
from ...text import shorten
from .latents import NUM_CHANNELS

if TYPE_CHECKING:
    from .dataset import CachedItem, ItemInfo

#: Of a key, which names a file.
KEY = re.compile(r"(?!\.)[A-Za-z0-9_.-]{1,200}")
#: In an item's metadata: the key that it was written under.
ITEM_KEY = "qwen_edit_lora.item"
#: Of that key, how a set's key for the item ends, where both are one file (`pairs.cache`).
SHARED_CHARACTERS = 12
#: Latent pixels of a side, tokens of a text and their width; far beyond what any model takes.
MAX_SIDE = MAX_TEXT_TOKENS = MAX_TEXT_WIDTH = 1 << 16


def count_references(names: Iterable[str]) -> int:
    return sum(name.startswith("reference_") for name in names)


def list_names(num_references: int, has_empty_text: bool, has_mask: bool) -> list[str]:
    """The tensors of an item, in the order in which they are checked."""
    optional = {"text_empty": has_empty_text, "mask": has_mask}
    return [
        "target",
        *(f"reference_{i}" for i in range(num_references)),
        "text",
        *(name for name, is_there in optional.items() if is_there),
    ]


def find_owner_fault(metadata: Mapping[str, str], key: str) -> str | None:
    """Why a file is not the item of this key, by what it says itself; None if it may be.

    An item in place of another one of the same sizes would be trained on with the wrong caption.
    """
    own = metadata.get(ITEM_KEY, key)
    if own == key or key.endswith(f"-{own[:SHARED_CHARACTERS]}"):
        return None
    return f"it holds the item {shorten(own)}"


def find_fault(
    tensors: Mapping[str, AnyTensor], info: ItemInfo | None = None, text_width: int | None = None
) -> str | None:
    """Why these are not the tensors of an item, by names, shapes and dtypes; None where they are.

    One tensor more is a fault like one less: training would leave it out without a word.

    Args:
        info: its entry in the index.
        text_width: likewise, of all embeddings.
    """
    if info is None:
        num_references = count_references(tensors)
        names = list_names(num_references, "text_empty" in tensors, "mask" in tensors)
    else:
        num_references = len(info.references)
        names = list_names(num_references, info.has_empty_text, info.has_mask)
    fault = find_name_fault(tensors, names)
    if fault is not None:
        return fault
    sizes: list[tuple[int, int] | None] = (
        [None] * (1 + num_references) if info is None else [*info.bucket]
    )
    for name, size in zip(names[: 1 + num_references], sizes, strict=True):
        tensor = tensors[name]
        shape = tuple(tensor.shape)
        is_latents = len(shape) == 3 and shape[0] == NUM_CHANNELS and all(shape)
        if not is_latents or size not in (None, shape[1:]) or not tensor.dtype.is_floating_point:
            wanted = "height, width" if size is None else f"{size[0]}, {size[1]}"
            return message(
                "{name} is {tensor}, expected ({num_channels}, {wanted})",
                name=name,
                tensor=describe(tensor),
                num_channels=NUM_CHANNELS,
                wanted=wanted,
            )
    num_tokens = None if info is None else info.num_text_tokens
    fault = find_text_fault(tensors, "text", text_width, num_tokens)
    if fault is None and "text_empty" in names:
        fault = find_text_fault(tensors, "text_empty", text_width)
    if fault is None and "mask" in names:
        mask, expected = tensors["mask"], tuple(tensors["target"].shape[1:])
        if tuple(mask.shape) != expected or mask.dtype.is_complex:
            return message(
                "mask is {mask}, expected {expected}", mask=describe(mask), expected=expected
            )
    return fault


def find_name_fault(found: Iterable[str], expected: Sequence[str]) -> str | None:
    """What is there too little or too much; None where it is exactly what is expected."""
    found = sorted(found)
    wanted = [name for name in expected if name not in found]
    if wanted:
        return message("it lacks {wanted}", wanted=wanted[0])
    more = [name for name in found if name not in expected]
    if more:
        shown = ", ".join(shorten(name, 40) for name in more[:2])
        shown += message(" and {num_more} more", num_more=len(more) - 2) if len(more) > 2 else ""
        return message(
            "it holds {shown}; expected only {expected}",
            shown=shown,
            expected=shorten(", ".join(expected), 120),
        )
    return None


def find_text_fault(
    tensors: Mapping[str, AnyTensor], name: str, width: int | None, length: int | None = None
) -> str | None:
    tensor = tensors.get(name)
    if tensor is None:
        return message("it lacks {name}", name=name)
    shape = tuple(tensor.shape)
    is_text = len(shape) == 2 and all(shape) and tensor.dtype.is_floating_point
    if not is_text or width not in (None, shape[1]) or length not in (None, shape[0]):
        return message(
            "{name} is {tensor}, expected ({length}, {width})",
            name=name,
            tensor=describe(tensor),
            length=length or "tokens",
            width=width or "width",
        )
    return None


def describe(tensor: AnyTensor) -> str:
    shape = shorten(str(tuple(tensor.shape)), 40)
    return f"{shape} {str(tensor.dtype).removeprefix('torch.')}"


def check_item(key: str, item: CachedItem) -> None:
    """Raises ShapeError for latents or a mask of a wrong shape, FileError for NaN and Inf."""
    for name, latents in (("target", item.target), *enumerate(item.references)):
        if latents.ndim != 3 or latents.shape[0] != NUM_CHANNELS or not latents.numel():
            what = name if name == "target" else f"reference_{name}"
            raise ShapeError(
                "{key}: {what} is {latents_shape}; expected ({num_channels}, height, "
                "width), the VAE's latents of one image",
                key=key,
                what=what,
                latents_shape=tuple(latents.shape),
                num_channels=NUM_CHANNELS,
            )
    mask = item.mask
    if mask is not None and (mask.shape != item.target.shape[1:] or not mask.sum() > 0):
        raise ShapeError(
            "{key}: the mask is {mask_shape} with a sum of {total:g}; expected "
            "{target_shape} like the target, not all of it 0",
            key=key,
            mask_shape=tuple(mask.shape),
            total=mask.sum().item(),
            target_shape=tuple(item.target.shape[1:]),
        )
    if mask is not None and mask.min() < 0:
        raise ShapeError("{key}: the mask holds negative weights; expected 0 or more", key=key)
    for name, tensor in item.tensors.items():
        if not torch.isfinite(tensor).all():
            raise FileError(
                "{key}: {name} holds NaN or Inf; expected finite numbers. Encode it again, "
                "in float32 if it was half precision.",
                key=key,
                name=name,
            )


def is_mask(mask: torch.Tensor) -> bool:
    """Whether weights are valid: finite, none below 0, not all of them 0."""
    low, high = mask.float().aminmax()
    return low.item() >= 0 and 0 < high.item() < math.inf
