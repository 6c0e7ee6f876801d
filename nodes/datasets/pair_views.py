"""What the page sees of sets of pairs: lists, thumbnails, and what the check says about a pair."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...lora_core.errors import ConfigError, FileError
from ...lora_core.messages import message
from ...lora_core.pairs.cache_cleaning import find_size, measure_sets
from ...lora_core.pairs.facts import ImageFacts
from ...lora_core.pairs.images import FileImage, ImageSource
from ...lora_core.pairs.pair import MAX_REFERENCES, UNUSABLE, Level, Pair, Problem, describe_path
from ...lora_core.pairs.pair_set import (
    PairConflictError,
    PairSet,
    SetPair,
    UnknownPairError,
    check_inside,
    compute_id,
)
from ...lora_core.pairs.preflight import check_pair
from ...lora_core.pairs.set_images import encode_thumbnail
from ...lora_core.pairs.set_masks import encode_mask
from .. import host
from .folders import is_dataset_path
from .pair_sets import find_set, find_sets, open_folder

NUM_COVERS = 3  # images on a set's card
THUMBNAIL_SIDES = (384, 1280)  # pixels
NUM_DECODED = 2  # images decoded at the same time, each up to 89 million pixels
#: Of images that were checked before, by path, with the file's version; about 4 kB each.
_facts: dict[str, tuple[str, ImageFacts]] = {}
MAX_FACTS = 4096
MEGAPIXELS = 1.0  # for which the pairs are checked, as the node's default

decoding = threading.BoundedSemaphore(NUM_DECODED)
_opening = threading.Lock()
UNSURE_NS = 100_000_000
#: Sets as they were opened before, with the times of their folders.
_opened: dict[str, tuple[tuple, PairSet]] = {}


def list_sets() -> dict[str, Any]:
    """{"sets": [...]}; one that cannot be edited here has a "problem"."""
    sizes = measure_sets(host.get_cache_folder() / "datasets")
    found = find_sets().items()
    return {"sets": [describe_set(set_id, *one, sizes) for set_id, one in found]}


def describe_set(
    set_id: str, name: str, folder: Path, sizes: dict[str, int] | None = None
) -> dict[str, Any]:
    """
    Args:
        sizes: of `cache_cleaning.measure_sets`.
    """
    try:
        opened = open_known(set_id)
    except (PairConflictError, UnknownPairError) as e:
        return {"id": set_id, "name": name, "problem": e.message}
    cached_bytes = find_size(sizes or {}, folder.name)
    return {"id": set_id, "name": name, **summarize(opened), "cached_bytes": cached_bytes}


def summarize(opened: PairSet) -> dict[str, Any]:
    complete = [pair for pair in opened.pairs if pair.target and pair.references]
    covers = [
        {"pair": pair.id, **describe_image(opened, target, 0)}
        for pair in complete[:NUM_COVERS]
        if (target := pair.target) is not None
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
        UnknownPairError, PairConflictError: as `open_known`.
    """
    name, _ = find_set(set_id)
    with _opening:
        _opened.pop(set_id, None)
    opened = open_known(set_id)
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
        "mask": describe_image(opened, pair.parts.masks[0]) if pair.parts.masks else None,
    }


def describe_image(opened: PairSet, path: Path, slot: int | None = None) -> dict[str, Any]:
    """ "version" changes with the file, so that a browser may keep its thumbnail.

    Args:
        slot: None for a mask.
    """
    file = describe_path(path, opened.folder)
    return {"slot": slot, "file": file, "version": read_version(path)}


def read_caption(opened: PairSet, pair: SetPair) -> tuple[str, str]:
    """(caption, why it cannot be read)."""
    try:
        return opened.read_caption(pair), ""
    except FileError as e:
        return "", e.message


def show_findings(set_id: str, pair_id: str) -> dict[str, Any]:
    """{"findings": [...]}: what the check before a training says about this pair alone.

    The texts name the images as the page shows them, by their sides.
    """
    opened = open_known(set_id)
    problems = find_problems(opened, opened.find(pair_id))
    problems = sorted(problems, key=lambda problem: -problem.level)
    return {
        "findings": [
            {"kind": one.kind, "severity": one.level.severity, "text": one.text} for one in problems
        ]
    }


def find_problems(opened: PairSet, files: SetPair) -> list[Problem]:
    if not files.parts.targets:
        text = message("the target is missing: what the image should become")
        return [Problem(Level.STOP, UNUSABLE, text)]
    if not files.references:
        text = message("the reference is missing: what the target is made of")
        return [Problem(Level.STOP, UNUSABLE, text)]
    try:
        pair = name_by_side(opened.build_pair(files))
    except FileError as e:
        return [Problem(Level.STOP, UNUSABLE, e.message)]
    if pair.caption is None:
        text = message(
            "no caption yet: write the instruction, or one for all into captions of the node"
        )
        return [Problem(Level.STOP, UNUSABLE, text)]
    versions = {str(path): read_version(path) for path in files.parts.paths}
    known: dict[int | str, ImageFacts] = {
        path: fact for path, v in versions.items() if (fact := recall(path, v))
    }
    with decoding:
        _, problems = check_pair(pair, known, MEGAPIXELS, MAX_REFERENCES)
    remember(known, versions)
    return problems


def name_by_side(pair: Pair) -> Pair:
    """With images that messages call "the target" and "reference 1"."""

    def rename(image: ImageSource, name: str) -> ImageSource:
        return replace(image, label=name) if isinstance(image, FileImage) else image

    references = enumerate(pair.references, 1)
    return replace(
        pair,
        target=rename(pair.target, message("the target")),
        references=tuple(
            rename(image, message("reference {slot}", slot=slot)) for slot, image in references
        ),
        mask=None if pair.mask is None else rename(pair.mask, message("the mask")),
    )


def recall(path: str, version: str) -> ImageFacts | None:
    known, fact = _facts.get(path, ("", None))
    return fact if version and known == version else None


def remember(facts: Mapping[int | str, ImageFacts], versions: Mapping[str, str]) -> None:
    for path, version in versions.items():
        if path in facts:
            _facts[path] = version, facts[path]
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
    opened = open_known(set_id)
    pair = opened.find(pair_id)
    images = [pair.target, *pair.references]
    path = images[slot] if 0 <= slot < len(images) else None
    return encode_small(opened, path, side_px, encode_thumbnail)


def read_mask(set_id: str, pair_id: str, side_px: int) -> bytes:
    """A PNG, see `set_masks.encode_mask`; raises as `read_thumbnail`."""
    opened = open_known(set_id)
    path = next(iter(opened.find(pair_id).parts.masks), None)
    return encode_small(opened, path, side_px, encode_mask)


def encode_small(
    opened: PairSet, path: Path | None, side_px: int, encode: Callable[[Path, str, int], bytes]
) -> bytes:
    if side_px not in THUMBNAIL_SIDES:
        raise ConfigError(
            "side is {side_px}; expected one of {thumbnail_sides}",
            side_px=side_px,
            thumbnail_sides=THUMBNAIL_SIDES,
        )
    if path is None:
        raise UnknownPairError("this pair has no such image (any more)")
    check_inside(path, is_dataset_path)
    try:
        with decoding:
            return encode(path, describe_path(path, opened.folder), side_px)
    except FileError as e:
        raise PairConflictError(e) from None


def open_known(set_id: str) -> PairSet:
    """As opened before, unless the times of its folders differ: every thumbnail asks for it.

    Raises:
        UnknownPairError: there is no such set.
        PairConflictError: it cannot be edited here.
    """
    folder = find_set(set_id)[1]
    with _opening:
        times, opened = _opened.get(set_id, (None, None))
        if opened is None or opened.folder != folder or read_times(opened) != times:
            opened = open_folder(folder)
            _opened[set_id] = read_times(opened), opened
        # A file that comes right after a listing may leave its folder's time as it is.
        if max(_opened[set_id][0]) > time.time_ns() - UNSURE_NS:
            del _opened[set_id]
        return opened


def keep_opened(set_id: str, opened: PairSet) -> None:
    """After a change that altered no other file: the next request need not open the set again."""
    with _opening:
        _opened[set_id] = read_times(opened), opened


def read_times(opened: PairSet) -> tuple[int, ...]:
    sides = opened.sides
    folders = [*opened.listing.folders, opened.target_folder, *sides.references]
    return tuple(read_time(path) for path in folders)


def read_time(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return -1
