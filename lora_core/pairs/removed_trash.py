"""The folder of what was removed from a set: its size, and emptying it."""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..disk.writing import explain, rename
from ..errors import FileError
from .pair import IsAllowed
from .pair_set import is_inside
from .removed_files import REMOVED_FOLDER, list_below

#: Of a token, with a dot where emptying was interrupted. What else is in the folder stays.
_REMOVED = re.compile(r"\.?[0-9a-f]{16}")
_RECORD = re.compile(r"[0-9a-f]{16}\.json")


@dataclass(frozen=True)
class Trash:
    num_files: int
    """Those that were in the set; records of changes do not count."""
    size_bytes: int

    def __add__(self, other: Trash) -> Trash:
        return Trash(self.num_files + other.num_files, self.size_bytes + other.size_bytes)


def measure_trash(folder: Path, is_allowed: IsAllowed) -> Trash:
    """What emptying would delete of a set's folder.

    Raises:
        FileError: it cannot be read.
    """
    try:
        folders, records = list_removed(folder, is_allowed)
        files = [path for one in folders for path in list_below(one)]
        size_bytes = sum(path.lstat().st_size for path in [*files, *records])
    except OSError as e:
        raise FileError("what was removed cannot be read: {reason}.", reason=explain(e)) from None
    return Trash(len(files), size_bytes)


def empty_trash(folder: Path, is_allowed: IsAllowed) -> None:
    """Deletes for good what was removed from a set; nothing else, and nothing behind a link.

    Raises:
        FileError: a file cannot be deleted; those before it are.
    """
    try:
        folders, records = list_removed(folder, is_allowed)
        for path in records:
            path.unlink(missing_ok=True)
        for path in folders:
            hidden = path.with_name(f".{secrets.token_hex(8)}")
            rename(path, hidden)  # so that no undo finds a half of it
            shutil.rmtree(hidden)
        kept = folder / REMOVED_FOLDER
        if kept.is_dir() and not kept.is_symlink() and not any(kept.iterdir()):
            kept.rmdir()
    except OSError as e:
        raise FileError(
            "what was removed cannot be deleted: {reason}.", reason=explain(e)
        ) from None


def list_removed(folder: Path, is_allowed: IsAllowed) -> tuple[list[Path], list[Path]]:
    """(folders, records)."""
    kept = folder / REMOVED_FOLDER
    if kept.is_symlink() or not kept.is_dir() or not is_inside(kept, is_allowed):
        return [], []
    entries = list(scan(kept))
    folders = [e for e in entries if e.is_dir(follow_symlinks=False) and _REMOVED.fullmatch(e.name)]
    files = [e for e in entries if e.is_file(follow_symlinks=False) and _RECORD.fullmatch(e.name)]
    return [kept / entry.name for entry in folders], [kept / entry.name for entry in files]


def scan(folder: Path) -> Iterator[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        yield from sorted(entries, key=lambda entry: entry.name)
