"""Masks of a set of pairs: painted, shown, removed. White is where the loss counts."""

from __future__ import annotations

import io
import secrets
from pathlib import Path

from PIL import Image

from ..disk.regular_files import open_regular
from ..disk.writing import explain
from ..errors import ConfigError, FileError
from ..text import shorten
from .images import FileImage, convert_to_bytes, open_image, turn_upright
from .pair import open_file
from .pair_set import PairConflictError, PairSet, SetPair, is_taken
from .removed_files import remove_files
from .set_images import find_relative_name, move_image, replace_image

MASK_FOLDER = "mask"
MASK_SUFFIX = ".png"
#: By which the proportions of a painted mask may differ from those of its target: a mask is painted
#: on a scaled copy, whose sides are rounded.
MAX_ASPECT_DIFFERENCE = 0.02


def put_mask(opened: PairSet, source: Path, pair: SetPair, name: str) -> tuple[Path, str]:
    """Gives a pair a mask of its target's size.

    Args:
        source: an image of the target's proportions; its brightness is the mask.
        name: what messages call it.

    Returns:
        The mask's file, and the token of the one that it displaced or "".

    Raises:
        ConfigError: not an image, of other proportions, or black all over.
        PairConflictError: the pair has no target, or a name is taken.
        FileError: the file cannot be written.
    """
    mask = read_mask(opened, source, pair, name)
    temporary = opened.folder / f".{secrets.token_hex(8)}.tmp"
    try:
        mask.save(temporary, "PNG")
        present = pair.parts.masks[:1]
        if present:
            path = present[0].with_suffix(MASK_SUFFIX)
            return replace_image(opened, temporary, present[0], path)
        return move_image(opened, temporary, choose_place(opened, pair)), ""
    except OSError as e:
        raise FileError("the mask cannot be written: {reason}.", reason=explain(e)) from None
    finally:
        temporary.unlink(missing_ok=True)


def read_mask(opened: PairSet, source: Path, pair: SetPair, name: str) -> Image.Image:
    """Decoded, in mode L, of the target's size; raises as `put_mask`."""
    if pair.target is None:
        raise PairConflictError(
            "{name} has no target to mask; add it first", name=shorten(pair.name)
        )
    header = open_file(pair.target, opened.folder, opened.is_allowed).read_header()
    size = header.width, header.height
    try:
        with open_image(open_regular(source, name), name) as image:
            mask = convert_to_bytes(turn_upright(image)).convert("L")
    except FileError as e:
        raise ConfigError(e) from None
    if abs(mask.width * size[1] / (mask.height * size[0]) - 1) > MAX_ASPECT_DIFFERENCE:
        raise ConfigError(
            "{name} is {width} x {height} px, the target {target_width} x {target_height}; "
            "expected a mask of the same proportions",
            name=shorten(name),
            width=mask.width,
            height=mask.height,
            target_width=size[0],
            target_height=size[1],
        )
    mask = mask if mask.size == size else mask.resize(size, Image.Resampling.BILINEAR)
    if not mask.getextrema()[1]:
        raise ConfigError(
            "{name} is black all over, so that nothing of the target would count; paint what "
            "should count, or remove the mask",
            name=shorten(name),
        )
    return mask


def choose_place(opened: PairSet, pair: SetPair) -> Path:
    folders = opened.sides.masks
    folder = folders[0] if folders else opened.sides.base / MASK_FOLDER
    relative = find_relative_name(opened, pair)
    if is_taken(opened, folder, relative):
        raise PairConflictError(
            "{folder} has an image {name} already", folder=folder.name, name=shorten(relative)
        )
    return folder / f"{relative}{MASK_SUFFIX}"


def remove_mask(opened: PairSet, pair: SetPair) -> str:
    """Moves a pair's masks aside; the token restores them, "" if there is none.

    Raises:
        FileError: they cannot be moved.
    """
    return remove_files(opened, pair.parts.masks) if pair.parts.masks else ""


def encode_mask(path: Path, name: str, side_px: int) -> bytes:
    """A PNG of white pixels, opaque where the loss counts; its longer side is at most `side_px`.

    Raises:
        FileError: not an image, damaged, or too large.
    """
    mask = Image.fromarray(FileImage(path, name).read_small(side_px)).convert("L")
    white = Image.new("L", mask.size, 255)
    buffer = io.BytesIO()
    Image.merge("LA", (white, mask)).save(buffer, "PNG")
    return buffer.getvalue()
