"""Sets of pairs in ComfyUI's folders, for the page: found, read and changed by their ids.

A set's id stands for its name, such as `input/my_pairs`; a pair's for its name in the set. Paths
are neither accepted nor returned.
"""

from __future__ import annotations

import os
import re
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...lora_core.errors import ConfigError, FileError, LoraError
from ...lora_core.pairs.facts import ImageFacts
from ...lora_core.pairs.pair import MAX_REFERENCES, UNUSABLE, Level, Problem, describe_path
from ...lora_core.pairs.pair_set import (
    PairConflictError,
    PairSet,
    SetPair,
    UnknownPairError,
    check_inside,
    compute_id,
    is_inside,
    list_folders,
    looks_like_set,
    open_set,
)
from ...lora_core.pairs.preflight import check_pair
from ...lora_core.pairs.removed_files import remove_pair, restore_files
from ...lora_core.pairs.set_captions import add_trigger, fill_captions, write_caption
from ...lora_core.pairs.set_images import (
    add_image,
    check_image,
    create_set,
    encode_thumbnail,
    put_image,
)
from .. import host
from .folders import is_dataset_path

#: Folders of ComfyUI in which sets are looked for; new ones are made in the last.
ROOTS = ("datasets", "input")
NUM_COVERS = 3  # images on a set's card
THUMBNAIL_SIDES = (384, 1280)  # pixels
NUM_DECODED = 2  # images decoded at the same time, each up to 89 million pixels

#: Changes are made one at a time, so that none is based on what another one is changing.
_changes = threading.RLock()
_decoding = threading.BoundedSemaphore(NUM_DECODED)
#: Id -> (name, folder), as last found.
_known: dict[str, tuple[str, Path]] = {}
#: Sets as they were opened for thumbnails, with the times of their folders.
_opened: dict[str, tuple[tuple, PairSet]] = {}

#: Of images that were checked before, by path, with the file's version; about 4 kB each.
_facts: dict[str, tuple[str, ImageFacts]] = {}
MAX_FACTS = 4096
MEGAPIXELS = 1.0  # for which the pairs are checked, as the node's default


def check_id(value: object) -> str:
    """Raises ConfigError if it is no id of a set or pair."""
    if not isinstance(value, str) or not re.fullmatch(r"[0-9a-f]{16}", value):
        raise ConfigError("the id is not valid; expected 16 hexadecimal digits")
    return value


# --- finding --------------------------------------------------------------------------------------


def find_sets() -> dict[str, tuple[str, Path]]:
    """Id -> (name, folder) of every set, up to two levels below the roots."""
    found: dict[str, tuple[str, Path]] = {}
    roots = host.list_dataset_roots()
    for name in ROOTS:
        for root in map(Path, roots[name]):
            for path in list_sets_below(root):
                shown = f"{name}/{path.relative_to(root).as_posix()}"
                found.setdefault(compute_id(shown), (shown, path))
    _known.clear()
    _known.update(found)
    return found


def list_sets_below(folder: Path, depth: int = 2) -> Iterator[Path]:
    try:
        inside = [path for path in list_folders(folder) if is_inside(path, is_dataset_path)]
    except FileError:
        return
    for path in inside:
        try:
            is_set = looks_like_set(path)
        except FileError:
            continue
        if is_set:
            yield path
        elif depth > 1:
            yield from list_sets_below(path, depth - 1)


def find_set(set_id: str) -> tuple[str, Path]:
    """(name, folder); UnknownPairError if there is none."""
    found = _known.get(set_id)
    if found is None or not found[1].is_dir():
        found = find_sets().get(set_id)
    if found is None:
        raise UnknownPairError("this set is not there any more; its folder was moved or renamed")
    return found


def open_by_id(set_id: str) -> PairSet:
    """
    Raises:
        UnknownPairError: there is no such set.
        PairConflictError: it cannot be edited here.
    """
    return open_folder(find_set(set_id)[1])


def open_folder(folder: Path) -> PairSet:
    try:
        return open_set(folder, is_dataset_path)
    except FileError as e:
        raise PairConflictError(str(e)) from None


@contextmanager
def changing(set_id: str) -> Iterator[PairSet]:
    """The set, which no other request changes meanwhile."""
    with _changes:
        yield open_by_id(set_id)


# --- reading --------------------------------------------------------------------------------------


def list_sets() -> dict[str, Any]:
    """{"sets": [...]}; one that cannot be edited here has a "problem"."""
    return {"sets": [describe_set(set_id, *found) for set_id, found in find_sets().items()]}


def describe_set(set_id: str, name: str, folder: Path) -> dict[str, Any]:
    try:
        opened = open_folder(folder)
    except PairConflictError as e:
        return {"id": set_id, "name": name, "problem": str(e)}
    return {"id": set_id, "name": name, **summarize(opened)}


def summarize(opened: PairSet) -> dict[str, Any]:
    complete = [pair for pair in opened.pairs if pair.target and pair.references]
    covers = [
        {"pair": pair.id, **describe_image(opened, pair.target, 0)}
        for pair in complete[:NUM_COVERS]
    ]
    return {
        "num_pairs": len(opened.pairs),
        "num_incomplete": len(opened.pairs) - len(complete),
        "num_uncaptioned": sum(not read_caption(opened, pair)[0] for pair in opened.pairs),
        "covers": covers,
    }


def show_set(set_id: str) -> dict[str, Any]:
    """The set with all its pairs.

    Raises:
        UnknownPairError, PairConflictError: as `open_by_id`.
    """
    name, folder = find_set(set_id)
    opened = open_folder(folder)
    return {
        "id": set_id,
        "name": name,
        "num_references": len(opened.sides.references),
        "pairs": [describe_pair(opened, pair) for pair in opened.pairs],
    }


def describe_pair(opened: PairSet, pair: SetPair) -> dict[str, Any]:
    caption, fault = read_caption(opened, pair)
    target = pair.target
    return {
        "id": pair.id,
        "name": pair.name,
        "caption": caption,
        "fault": fault,
        "target": None if target is None else describe_image(opened, target, 0),
        "references": [
            describe_image(opened, path, slot) for slot, path in enumerate(pair.references, 1)
        ],
    }


def describe_image(opened: PairSet, path: Path, slot: int) -> dict[str, Any]:
    """ "version" changes with the file, so that a browser may keep its thumbnail."""
    file = describe_path(path, opened.folder)
    return {"slot": slot, "file": file, "version": read_version(path)}


def read_caption(opened: PairSet, pair: SetPair) -> tuple[str, str]:
    """(caption, why it cannot be read)."""
    try:
        return opened.read_caption(pair), ""
    except FileError as e:
        return "", str(e)


def show_findings(set_id: str, pair_id: str) -> dict[str, Any]:
    """{"findings": [...]}: what the check before a training says about this pair alone."""
    opened = open_by_id(set_id)
    files = opened.find(pair_id)
    try:
        pair = opened.build_pair(files)
    except FileError as e:
        problems = [Problem(Level.STOP, UNUSABLE, str(e))]
    else:
        known = {str(path): fact for path in files.parts.paths if (fact := recall(path))}
        with _decoding:
            _, problems = check_pair(pair, known, MEGAPIXELS, MAX_REFERENCES)
        for path, fact in known.items():
            remember(Path(path), fact)
    problems = sorted(problems, key=lambda problem: -problem.level)
    return {
        "findings": [
            {"kind": one.kind, "severity": one.level.severity, "text": one.text} for one in problems
        ]
    }


def recall(path: Path) -> ImageFacts | None:
    version, fact = _facts.get(str(path), ("", None))
    return fact if version == read_version(path) else None


def remember(path: Path, fact: ImageFacts) -> None:
    _facts[str(path)] = read_version(path), fact
    while len(_facts) > MAX_FACTS:
        _facts.pop(next(iter(_facts)), None)


def read_version(path: Path) -> str:
    """Changes with the file; "" if it cannot be read."""
    try:
        status = path.stat()
    except OSError:  # a link that leads nowhere
        return ""
    return compute_id(f"{path.name} {status.st_mtime_ns} {status.st_size}")


def read_thumbnail(set_id: str, pair_id: str, slot: int, side_px: int) -> bytes:
    """A JPEG.

    Raises:
        ConfigError: another size than THUMBNAIL_SIDES.
        UnknownPairError: no such image.
        PairConflictError: the file is no image, is damaged, or leads outside.
    """
    if side_px not in THUMBNAIL_SIDES:
        raise ConfigError(f"side is {side_px}; expected one of {THUMBNAIL_SIDES}")
    try:
        return draw_thumbnail(open_known(set_id), pair_id, slot, side_px)
    except LoraError:  # the set may have changed since it was opened
        _opened.pop(set_id, None)
        return draw_thumbnail(open_known(set_id), pair_id, slot, side_px)


def draw_thumbnail(opened: PairSet, pair_id: str, slot: int, side_px: int) -> bytes:
    pair = opened.find(pair_id)
    images = [pair.target, *pair.references]
    path = images[slot] if 0 <= slot < len(images) else None
    if path is None:
        raise UnknownPairError("this pair has no such image (any more)")
    check_inside(path, is_dataset_path)
    try:
        with _decoding:
            return encode_thumbnail(path, describe_path(path, opened.folder), side_px)
    except FileError as e:
        raise PairConflictError(str(e)) from None


def open_known(set_id: str) -> PairSet:
    """As opened before, unless the times of its folders differ: every thumbnail asks for it."""
    folder = find_set(set_id)[1]
    times, opened = _opened.get(set_id, (None, None))
    if opened is None or read_times(opened) != times:
        opened = open_folder(folder)
        _opened[set_id] = read_times(opened), opened
    return opened


def read_times(opened: PairSet) -> tuple:
    sides = opened.sides
    folders = {path.parent for path in opened.listing.files}
    folders |= {opened.folder, sides.base, opened.target_folder, *sides.references}
    return tuple((str(path), read_time(path)) for path in sorted(folders))


def read_time(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return -1


# --- changing -------------------------------------------------------------------------------------


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
        pair = opened.find(pair_id)
        return {"id": pair_id, "caption": write_caption(opened, pair, text, before)}


def change_captions(set_id: str, fill: str | None, trigger: str | None) -> dict[str, Any]:
    """Fills all empty captions, or puts a trigger word before all others; how many changed.

    Raises:
        ConfigError, FileError: as `set_captions`.
    """
    with changing(set_id) as opened:
        if fill is not None:
            return {"num_changed": fill_captions(opened, fill)}
        return {"num_changed": add_trigger(opened, trigger or "")}


def remove(set_id: str, pair_id: str) -> dict[str, Any]:
    """Moves a pair's files aside; {"removed": token}."""
    with changing(set_id) as opened:
        return {"id": pair_id, "removed": remove_pair(opened, opened.find(pair_id))}


def restore(set_id: str, token: str) -> dict[str, Any]:
    """Raises as `removed_files.restore_files`."""
    with changing(set_id) as opened:
        return {"num_files": restore_files(opened, token)}


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
        with _decoding:
            suffix = check_image(path, name)
    except FileError as e:
        raise ConfigError(str(e)) from None
    with changing(set_id) as opened:
        if pair_id:
            placed, token = put_image(opened, path, opened.find(pair_id), suffix, slot)
        else:
            placed, token = add_image(opened, path, stem, suffix, slot), ""
    opened = open_by_id(set_id)
    pair = next((one for one in opened.pairs if placed in one.parts.paths), None)
    return {"pair": None if pair is None else describe_pair(opened, pair), "removed": token}
