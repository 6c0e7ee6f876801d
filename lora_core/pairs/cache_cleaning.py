"""What the cache of encoded pairs takes on disk, and removing what no training needs."""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..disk.writing import explain, rename
from ..errors import FileError
from ..text import shorten
from ..training.data.dataset import ITEMS_FOLDER
from .cache import SETS_FOLDER, slug

_SET = re.compile(r"(.+)-[0-9a-f]{12}")
_ITEM = re.compile(r"([0-9a-f]{12})[0-9a-f]{20}\.safetensors")
_ITEM_OF_SET = re.compile(r".+-([0-9a-f]{12})\.safetensors")


@dataclass(frozen=True)
class CachePlan:
    """What cleaning would remove. Nothing else in the cache's folder is ever touched."""

    sets: tuple[Path, ...]
    items: tuple[Path, ...]
    size_bytes: int
    """Of the whole cache; files that are links of each other count once."""
    freed_bytes: int


def plan_cleaning(store: Path, needed: Collection[str]) -> CachePlan:
    """
    Args:
        store: as for `cache.cache_pairs`; may not exist.
        needed: names of the training sets' folders that trainings use.

    Raises:
        FileError: the cache cannot be read.
    """
    try:
        sets = list(list_sets(store))
        kept = [path for path in sets if path.name in needed]
        removed = [path for path in sets if path.name not in needed]
        kept_files = [path for one in kept for path in list_items(one)]
        # Some disks have no links: there a set's items are copies, found by their names.
        kept_keys = {match[1] for p in kept_files if (match := _ITEM_OF_SET.fullmatch(p.name))}
        items = [path for path in list_items(store) if get_key(path)]
        spare = [path for path in items if get_key(path) not in kept_keys]
        removed_files = [*spare, *(path for one in removed for path in list_items(one))]
        kept_sizes = measure([*kept_files, *(path for path in items if path not in set(spare))])
        removed_sizes = measure(removed_files)
    except OSError as e:
        raise FileError("the cache of pairs cannot be read: {reason}.", reason=explain(e)) from None
    freed = sum(size for file, size in removed_sizes.items() if file not in kept_sizes)
    total = sum({**kept_sizes, **removed_sizes}.values())
    return CachePlan(tuple(removed), tuple(spare), total, freed)


def get_key(path: Path) -> str:
    """The key of a stored item; "" for another file."""
    found = _ITEM.fullmatch(path.name)
    return "" if found is None else found[1]


def clean(plan: CachePlan) -> None:
    """Removes what a plan lists; a set disappears as a whole.

    Raises:
        FileError: a file cannot be removed; those before it are.
    """
    for path in (*plan.sets, *plan.items):
        try:
            if path in plan.items:
                path.unlink(missing_ok=True)
                continue
            hidden = path.with_name(f".{secrets.token_hex(8)}")
            rename(path, hidden)
            shutil.rmtree(hidden)
        except OSError as e:
            raise FileError(
                "{path} cannot be removed: {reason}.", path=shorten(path.name), reason=explain(e)
            ) from None


def measure_sets(store: Path) -> dict[str, int]:
    """Bytes of the cached training sets, together for those of one name (see `cache.slug`)."""
    sizes: dict[str, dict[tuple[int, int], int]] = {}
    try:
        for path in list_sets(store):
            found = _SET.fullmatch(path.name)
            assert found is not None  # listed for it
            sizes.setdefault(found[1], {}).update(measure(list_items(path)))
    except OSError:  # only a number beside the set's name
        return {}
    return {name: sum(files.values()) for name, files in sizes.items()}


def find_size(sizes: dict[str, int], name: str) -> int:
    """Of a set's folder by its name, in what `measure_sets` returned."""
    return sizes.get(slug(name), 0)


def list_sets(store: Path) -> Iterator[Path]:
    folder = store / SETS_FOLDER
    for entry in scan(folder):
        if entry.is_dir(follow_symlinks=False) and _SET.fullmatch(entry.name):
            yield folder / entry.name


def list_items(folder: Path) -> Iterator[Path]:
    for entry in scan(folder / ITEMS_FOLDER):
        if entry.is_file(follow_symlinks=False):
            yield folder / ITEMS_FOLDER / entry.name


def scan(folder: Path) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except FileNotFoundError:
        return []


def measure(paths: Collection[Path] | Iterator[Path]) -> dict[tuple[int, int], int]:
    """File -> bytes, where names of one file are one."""
    found = {}
    for path in paths:
        status = path.lstat()
        found[status.st_dev, status.st_ino] = status.st_size
    return found
