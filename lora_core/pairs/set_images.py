"""Images of a set of pairs: a new set, images added, replaced and shown small."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from ..disk.file_names import check_file_name
from ..disk.regular_files import open_regular
from ..disk.writing import explain, replace
from ..errors import ConfigError, FileError, LoraError
from ..text import shorten
from .images import FileImage, convert_to_bytes, open_image, split_image, turn_upright
from .pair import MAX_REFERENCES
from .pair_set import (
    REFERENCE_FOLDER,
    TARGET_FOLDER,
    PairConflictError,
    PairSet,
    SetPair,
    get_number,
    is_taken,
    prepare_folder,
)
from .removed_files import REMOVED_FOLDER, remove_files, restore_files
from .written_files import describe_written, write_record

#: The slot of the target; 1 to MAX_REFERENCES are those of the references.
TARGET_SLOT = 0
#: Ending of an image's file, by Pillow's name of its format.
SUFFIXES = {
    **{"PNG": ".png", "JPEG": ".jpg", "MPO": ".jpg", "WEBP": ".webp", "BMP": ".bmp"},
    **{"TIFF": ".tif", "GIF": ".gif", "AVIF": ".avif"},
}
LONGEST_ENDING = max(SUFFIXES.values(), key=len)
THUMBNAIL_QUALITY = 88


def create_set(root: Path, name: str) -> Path:
    """A new, empty set.

    Raises:
        ConfigError: not a valid name of a folder.
        PairConflictError: the name is taken.
        FileError: the folder cannot be made.
    """
    check_file_name(name, "")
    folder = root / name
    try:
        folder.mkdir(parents=False)
        (folder / TARGET_FOLDER).mkdir()
        (folder / REFERENCE_FOLDER).mkdir()
    except FileExistsError:
        raise PairConflictError(
            "there is a folder {name} already; choose another name", name=shorten(name)
        ) from None
    except OSError as e:
        raise FileError(
            "{name} cannot be made: {reason}.", name=shorten(name), reason=explain(e)
        ) from None
    return folder


def check_image(path: Path, name: str) -> str:
    """Decodes an image completely.

    Args:
        name: what messages call the file.

    Returns:
        The ending that its content asks for, such as ".png".

    Raises:
        FileError: not an image of `images.FORMATS`, damaged, or too large.
    """
    with open_image(open_regular(path, name), name) as image:
        suffix = SUFFIXES[image.format or ""]
        for _, band in split_image(turn_upright(image)):
            convert_to_bytes(band)
    return suffix


def add_image(opened: PairSet, source: Path, name: str, suffix: str, slot: int) -> Path:
    """Moves a checked image into the folder of its side, under a name that is free there.

    Args:
        name: the new file's name without its ending.
        slot: TARGET_SLOT, or the number of the reference.

    Raises:
        ConfigError: not a valid name or slot.
        PairConflictError: the name is taken, or a reference before this one has no folder.
        FileError: the file cannot be written there.
    """
    check_file_name(name, LONGEST_ENDING)
    folder = choose_folder(opened, slot)
    if is_taken(opened, folder, name):
        raise PairConflictError(
            "{folder} has an image {name} already; rename the file, or drop it on that pair to "
            "replace the image",
            folder=folder.name,
            name=shorten(name),
        )
    return move_image(opened, source, folder / f"{name}{suffix}")


def put_image(
    opened: PairSet, source: Path, pair: SetPair, suffix: str, slot: int
) -> tuple[Path, str]:
    """Gives a pair this image; one that it displaces is removed.

    Returns:
        The new file, and the token of what was removed or "".

    Raises:
        ConfigError, PairConflictError, FileError: as `add_image`.
    """
    check_slot(slot)
    present = pair.parts.targets[:1] if slot == TARGET_SLOT else pair.references[slot - 1 : slot]
    if present:
        return replace_image(opened, source, present[0], present[0].with_suffix(suffix))
    if slot > len(pair.references) + 1:
        raise PairConflictError(
            "{pair} has {num_references} references; add reference {slot} first",
            pair=shorten(pair.name),
            num_references=len(pair.references),
            slot=len(pair.references) + 1,
        )
    relative = find_relative_name(opened, pair)
    folder = choose_folder(opened, slot)
    number = slot
    while is_taken(opened, folder, relative) and number < MAX_REFERENCES:
        number += 1
        folder = choose_folder(opened, number)
    if is_taken(opened, folder, relative):
        raise PairConflictError(
            "{pair} has an image in each folder already", pair=shorten(pair.name)
        )
    return move_image(opened, source, folder / f"{relative}{suffix}"), ""


def replace_image(opened: PairSet, source: Path, before: Path, path: Path) -> tuple[Path, str]:
    """Moves an image to `path` and the one before it aside; (path, the token that undoes it).

    Raises:
        PairConflictError, FileError: it cannot be moved; then the one before it stays.
    """
    written = describe_written(opened, source, path, before)
    token = remove_files(opened, [before])
    try:
        write_record(opened.folder / REMOVED_FOLDER / token, [written])
        return move_image(opened, source, path), token
    except LoraError:
        restore_files(opened, token)
        raise


def find_relative_name(opened: PairSet, pair: SetPair) -> str:
    """A pair's name below the folder of each side, from the first of its files."""
    path = pair.parts.paths[0]
    folders = [opened.target_folder, *opened.sides.references, *opened.sides.masks]
    # The innermost: targets may be in the set's own folder, around those of the references.
    around = [one for one in folders if path.is_relative_to(one)]
    folder = max(around, key=lambda one: len(one.parts), default=path.parent)
    return path.relative_to(folder).with_suffix("").as_posix()


def check_slot(slot: int) -> None:
    if not TARGET_SLOT <= slot <= MAX_REFERENCES:
        raise ConfigError(
            "slot is {slot}; expected 0 for the target, or 1 to {max_references} for a reference",
            slot=slot,
            max_references=MAX_REFERENCES,
        )


def choose_folder(opened: PairSet, slot: int) -> Path:
    """Where images of a slot are; the folder may not exist yet."""
    check_slot(slot)
    if slot == TARGET_SLOT:
        return opened.target_folder
    folders = opened.sides.references
    if slot <= len(folders):
        return folders[slot - 1]
    if slot > len(folders) + 1:
        raise PairConflictError(
            "this set has {num_folders} folders of references; add images of reference "
            "{slot} first",
            num_folders=len(folders),
            slot=len(folders) + 1,
        )
    if not folders:
        return opened.sides.base / REFERENCE_FOLDER
    number = max(slot, *(get_number(path) + 1 for path in folders))
    return opened.sides.base / f"{REFERENCE_FOLDER}_{number}"


def move_image(opened: PairSet, source: Path, path: Path) -> Path:
    prepare_folder(opened, path.parent)
    try:
        if path.is_symlink() or path.exists():
            raise PairConflictError(
                "{path} is there already; refresh the list", path=shorten(path.name)
            )
        replace(source, path)
    except OSError as e:
        raise FileError(
            "{path} cannot be written: {reason}.", path=shorten(path.name), reason=explain(e)
        ) from None
    return path


def encode_thumbnail(path: Path, name: str, side_px: int, real: Path | None = None) -> bytes:
    """A JPEG whose longer side is at most `side_px`.

    Args:
        real: as of `FileImage`.

    Raises:
        FileError: not an image, damaged, or too large.
    """
    buffer = io.BytesIO()
    Image.fromarray(FileImage(path, name, real).read_small(side_px)).save(
        buffer, "JPEG", quality=THUMBNAIL_QUALITY
    )
    return buffer.getvalue()
