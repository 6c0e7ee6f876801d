"""Sets of pairs in ComfyUI's folders, for the page: found, read and changed by their ids.

A set's id stands for its name, such as `input/my_pairs`; a pair's for its name in the set. Paths
are neither accepted nor returned.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from ...lora_core.errors import ConfigError, FileError
from ...lora_core.pairs.pair_set import (
    PairConflictError,
    PairSet,
    UnknownPairError,
    compute_id,
    is_inside,
    list_folders,
    looks_like_set,
    open_set,
)
from .. import host
from .folders import is_dataset_path

#: Folders of ComfyUI in which sets are looked for; new ones are made in the last.
ROOTS = ("datasets", "input")

#: Id -> (name, folder), as last found.
_known: dict[str, tuple[str, Path]] = {}


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


def open_folder(folder: Path) -> PairSet:
    """Raises PairConflictError if it cannot be edited here."""
    try:
        return open_set(folder, is_dataset_path)
    except FileError as e:
        raise PairConflictError(e) from None
