"""What the page may change in sets of pairs, one change at a time."""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...lora_core.disk.regular_files import open_regular
from ...lora_core.disk.writing import explain
from ...lora_core.errors import ConfigError, FileError
from ...lora_core.messages import message
from ...lora_core.pairs.pair_set import PairSet, check_inside, compute_id
from ...lora_core.pairs.removed_files import remove_pair, restore_files
from ...lora_core.pairs.removed_trash import Trash, empty_trash, measure_trash
from ...lora_core.pairs.set_captions import add_trigger, fill_captions, write_caption
from ...lora_core.pairs.set_images import add_image, check_image, create_set, put_image
from ...lora_core.pairs.set_masks import put_mask, remove_mask
from ...lora_core.text import shorten
from .. import host
from .folders import is_dataset_path
from .pair_sets import ROOTS, find_set, find_sets
from .pair_views import decoding, describe_pair, describe_set, keep_opened, open_known

#: Changes are made one at a time, so that none is based on what another one is changing.
_changes = threading.RLock()


@contextmanager
def changing(set_id: str) -> Iterator[PairSet]:
    """The set, which no other request changes meanwhile."""
    with _changes:
        yield open_known(set_id)


def create(name: str) -> dict[str, Any]:
    """A new set in ComfyUI's input folder.

    Raises:
        ConfigError, PairConflictError, FileError: as `set_images.create_set`.
    """
    with _changes:
        root = Path(host.list_dataset_roots()[ROOTS[-1]][0])
        create_set(root, name)
    shown = f"{ROOTS[-1]}/{name}"
    return describe_set(compute_id(shown), shown, root / name)


def set_caption(set_id: str, pair_id: str, text: str, before: str | None) -> dict[str, Any]:
    """Raises as `set_captions.write_caption`."""
    with changing(set_id) as opened:
        caption, path = write_caption(opened, opened.find(pair_id), text, before)
        keep_opened(set_id, opened.with_caption(pair_id, path))
        return {"id": pair_id, "caption": caption}


def change_captions(set_id: str, fill: str | None, trigger: str | None) -> dict[str, Any]:
    """Fills all empty captions, or puts a trigger word before all others.

    Returns:
        How many changed, and the token that undoes it.

    Raises:
        ConfigError, FileError: as `set_captions`.
    """
    with changing(set_id) as opened:
        done = add_trigger(opened, trigger or "") if fill is None else fill_captions(opened, fill)
        return {"num_changed": done.num_changed, "removed": done.token}


def remove(set_id: str, pair_id: str) -> dict[str, Any]:
    """Moves a pair's files aside; {"removed": token}."""
    with changing(set_id) as opened:
        return {"id": pair_id, "removed": remove_pair(opened, opened.find(pair_id))}


def restore(set_id: str, token: str) -> dict[str, Any]:
    """Undoes a change; raises as `removed_files.restore_files`."""
    with changing(set_id) as opened:
        done = restore_files(opened, token)
        return {"num_files": done.num_files, "num_edited": done.num_edited}


class Upload:
    """A file on the set's disk to write an upload into; it is deleted unless it was moved.

    Raises:
        UnknownPairError: there is no such set.
        PairConflictError: its folder leads outside the allowed ones.
    """

    def __init__(self, set_id: str):
        folder = find_set(set_id)[1]
        check_inside(folder, is_dataset_path)
        self.path = folder / f".{secrets.token_hex(8)}.tmp"

    def __enter__(self) -> Upload:
        return self

    def __exit__(self, *exception: object) -> None:
        self.path.unlink(missing_ok=True)


def take_upload(set_id: str, path: Path, name: str, slot: int, pair_id: str) -> dict[str, Any]:
    """Makes an uploaded file an image of the set; the pair it belongs to now, and what it replaced.

    Args:
        name: as the user's file is called, with its ending.
        pair_id: "" for a new pair, or one that is found by the name.

    Raises:
        ConfigError, PairConflictError, FileError: as `set_images`.
    """
    stem = os.path.splitext(name)[0]  # noqa: PTH122 - `name` is no path
    try:
        with decoding:
            suffix = check_image(path, name)
    except FileError as e:
        raise ConfigError(e) from None
    with changing(set_id) as opened:
        if pair_id:
            placed, token = put_image(opened, path, opened.find(pair_id), suffix, slot)
        else:
            placed, token = add_image(opened, path, stem, suffix, slot), ""
    return describe_change(set_id, placed, token)


def take_output(
    set_id: str, source: Path, name: str, slot: int, pair_id: str, max_bytes: int
) -> dict[str, Any]:
    """Copies an image that a graph made into the set; the answer is as that of `take_upload`.

    Args:
        source: without links.
        name: of a new pair's file, with an ending; "" for the file's own.

    Raises:
        ConfigError, PairConflictError, FileError: as `take_upload`, or it is larger than
            `max_bytes`.
    """
    with Upload(set_id) as upload:
        copy_file(source, upload.path, max_bytes)
        return take_upload(set_id, upload.path, name or source.name, slot, pair_id)


def copy_file(source: Path, path: Path, max_bytes: int) -> None:
    data_left = max_bytes
    try:
        with open_regular(source, follow_links=False) as file, path.open("xb") as copy:
            while chunk := file.read(1 << 20):
                data_left -= len(chunk)
                if data_left < 0:
                    raise ConfigError(
                        "{name} is too large; expected up to {limit_mb} MB. Scale it down",
                        name=shorten(source.name),
                        limit_mb=max_bytes // 10**6,
                    )
                copy.write(chunk)
    except OSError as e:
        raise FileError(
            "{name} cannot be copied: {reason}.", name=shorten(source.name), reason=explain(e)
        ) from None


def take_mask(set_id: str, path: Path, pair_id: str) -> dict[str, Any]:
    """Makes an uploaded image the mask of a pair; the answer is as that of `take_upload`.

    Raises:
        ConfigError, PairConflictError, FileError: as `set_masks.put_mask`.
    """
    with changing(set_id) as opened, decoding:
        placed, token = put_mask(opened, path, opened.find(pair_id), message("the mask"))
    return describe_change(set_id, placed, token)


def clear_mask(set_id: str, pair_id: str) -> dict[str, Any]:
    """Removes a pair's mask; raises as `set_masks.remove_mask`."""
    with changing(set_id) as opened:
        token = remove_mask(opened, opened.find(pair_id))
    opened = open_known(set_id)
    return {"pair": describe_pair(opened, opened.find(pair_id)), "removed": token}


def describe_change(set_id: str, placed: Path, token: str) -> dict[str, Any]:
    opened = open_known(set_id)
    pair = next((one for one in opened.pairs if placed in one.parts.paths), None)
    return {"pair": None if pair is None else describe_pair(opened, pair), "removed": token}


# --- what was removed -----------------------------------------------------------------------------


def measure_removed() -> dict[str, Any]:
    """{"size_bytes", "num_files"}: what was removed from all sets."""
    trashes = [measure_trash(folder, is_dataset_path) for _, folder in find_sets().values()]
    return asdict(sum(trashes, Trash(0, 0)))


def empty_removed() -> dict[str, Any]:
    """Deletes for good what was removed from all sets; what that was, as `measure_removed`.

    Raises:
        FileError: as `removed_trash.empty_trash`.
    """
    with _changes:
        before = measure_removed()
        for _, folder in find_sets().values():
            empty_trash(folder, is_dataset_path)
        return before
