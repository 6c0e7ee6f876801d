"""Files of a set that were removed or replaced: moved aside, and back.

They are in `.removed/<token>/` inside the set's folder, under the same relative names. Readers of
sets skip that folder; `removed_trash` empties it.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..disk.writing import explain, rename
from ..errors import ConfigError, FileError
from ..text import shorten
from .pair import describe_path
from .pair_set import (
    PairConflictError,
    PairSet,
    SetPair,
    UnknownPairError,
    check_inside,
    prepare_folder,
)
from .written_files import name_record, read_record, split_edited

REMOVED_FOLDER = ".removed"


@dataclass(frozen=True)
class Restored:
    """What an undo did."""

    num_files: int
    """Moved back, or moved away because the change had made them."""
    num_edited: int
    """Left as they are, since they were edited after the change."""


def choose_removed(opened: PairSet) -> Path:
    """The folder of a new token, which is its name; it does not exist yet.

    Raises:
        PairConflictError: it leads outside the allowed folders.
    """
    kept = opened.folder / REMOVED_FOLDER / secrets.token_hex(8)
    check_inside(kept, opened.is_allowed)
    return kept


def remove_pair(opened: PairSet, pair: SetPair) -> str:
    """Moves all files of a pair aside; the token restores them.

    Raises:
        FileError: they cannot be moved; then all stay.
    """
    return remove_files(opened, pair.files)


def remove_files(opened: PairSet, paths: Sequence[Path]) -> str:
    kept = choose_removed(opened)
    move_files(opened, list_moves(opened, paths, kept))
    return kept.name


def list_moves(opened: PairSet, paths: Sequence[Path], kept: Path) -> list[tuple[Path, Path]]:
    return [(path, kept / path.relative_to(opened.folder)) for path in paths]


def move_files(opened: PairSet, moves: Sequence[tuple[Path, Path]]) -> None:
    """Moves each file to its place.

    Raises:
        FileError, PairConflictError: one cannot be moved; then all stay.
    """
    moved: list[tuple[Path, Path]] = []
    try:
        for path, place in moves:
            prepare_folder(opened, place.parent)
            rename(path, place)
            moved.append((path, place))
    except (OSError, FileError, PairConflictError) as e:
        for path, place in reversed(moved):
            with contextlib.suppress(OSError):
                rename(place, path)
        if not isinstance(e, OSError):
            raise
        shown = describe_path(moves[len(moved)][0], opened.folder)
        raise FileError(
            "{shown} cannot be moved: {reason}.", shown=shorten(shown), reason=explain(e)
        ) from None


def restore_files(opened: PairSet, token: str) -> Restored:
    """Undoes a change: what it removed comes back, and what it wrote instead is moved aside.

    Raises:
        ConfigError: not a valid token.
        UnknownPairError: nothing was removed under it.
        PairConflictError: a name is taken meanwhile, or all that the change wrote was edited since;
            then nothing is moved.
        FileError: the files cannot be moved; then all stay.
    """
    kept = find_removed(opened, token)
    same, edited = split_edited(opened, read_record(opened, kept))
    held = {one.instead_of for one in edited}
    found = [path for path in list_below(kept) if path.relative_to(kept).as_posix() not in held]
    places = [opened.folder / path.relative_to(kept) for path in found]
    if edited and not (same or found):
        raise PairConflictError(
            "{shown} was changed again since, so that it stays as it is",
            shown=shorten(edited[0].file),
        )
    for place in places:
        if place not in same and (place.is_symlink() or place.exists()):
            shown = describe_path(place, opened.folder)
            raise PairConflictError(
                "{shown} is there again, so that the removed one cannot come back; move it "
                "elsewhere first",
                shown=shorten(shown),
            )
    aside = list_moves(opened, same, choose_removed(opened))
    move_files(opened, [*aside, *zip(found, places, strict=True)])
    for folder, _, _ in os.walk(kept, topdown=False):
        with contextlib.suppress(OSError):  # not empty
            Path(folder).rmdir()
    if not edited:
        with contextlib.suppress(OSError):
            name_record(kept).unlink()
    return Restored(len(set(places) | set(same)), len(edited))


def find_removed(opened: PairSet, token: str) -> Path:
    """The folder of what was removed; it may be missing where something was only written.

    Raises:
        ConfigError, UnknownPairError, PairConflictError: as `restore_files`.
    """
    if not re.fullmatch(r"[0-9a-f]{16}", token):
        raise ConfigError(
            "{token!r} is no token; expected 16 hexadecimal digits", token=shorten(token)
        )
    kept = opened.folder / REMOVED_FOLDER / token
    check_inside(kept, opened.is_allowed)
    is_there = kept.is_dir() or (name_record(kept).is_file() and not kept.exists())
    if kept.is_symlink() or not is_there:
        raise UnknownPairError("what was removed is not there any more")
    return kept


def list_below(folder: Path) -> list[Path]:
    return sorted(Path(parent, name) for parent, _, names in os.walk(folder) for name in names)
