"""Files of a set that were removed or replaced: moved aside, and back.

They are in `.removed/<token>/` inside the set's folder, under the same relative names. Readers of
sets skip that folder, and nothing empties it.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from collections.abc import Sequence
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

REMOVED_FOLDER = ".removed"


def remove_pair(opened: PairSet, pair: SetPair) -> str:
    """Moves all files of a pair aside; the token restores them.

    Raises:
        FileError: they cannot be moved; then all stay.
    """
    return remove_files(opened, pair.files)


def remove_files(opened: PairSet, paths: Sequence[Path]) -> str:
    token = secrets.token_hex(8)
    kept = opened.folder / REMOVED_FOLDER / token
    check_inside(kept, opened.is_allowed)
    moved: list[tuple[Path, Path]] = []
    try:
        for path in paths:
            place = kept / path.relative_to(opened.folder)
            place.parent.mkdir(parents=True, exist_ok=True)
            rename(path, place)
            moved.append((path, place))
    except OSError as e:
        for path, place in reversed(moved):
            with contextlib.suppress(OSError):
                rename(place, path)
        shown = describe_path(paths[len(moved)], opened.folder)
        raise FileError(
            "{shown} cannot be moved: {reason}.", shown=shorten(shown), reason=explain(e)
        ) from None
    return token


def restore_files(opened: PairSet, token: str) -> int:
    """Moves what was removed back to where it was; the number of files.

    Raises:
        ConfigError: not a valid token.
        UnknownPairError: nothing was removed under it.
        PairConflictError: a name is taken meanwhile; then nothing is moved.
        FileError: the files cannot be moved.
    """
    if not re.fullmatch(r"[0-9a-f]{16}", token):
        raise ConfigError(
            "{token!r} is no token; expected 16 hexadecimal digits", token=shorten(token)
        )
    kept = opened.folder / REMOVED_FOLDER / token
    check_inside(kept, opened.is_allowed)
    if kept.is_symlink() or not kept.is_dir():
        raise UnknownPairError("what was removed is not there any more")
    found = [Path(folder, name) for folder, _, names in os.walk(kept) for name in names]
    places = [opened.folder / path.relative_to(kept) for path in found]
    for place in places:
        if place.is_symlink() or place.exists():
            shown = describe_path(place, opened.folder)
            raise PairConflictError(
                "{shown} is there again, so that the removed one cannot come back; move it "
                "elsewhere first",
                shown=shorten(shown),
            )
    try:
        for path, place in zip(found, places, strict=True):
            prepare_folder(opened, place.parent)
            rename(path, place)
    except OSError as e:
        raise FileError(
            "the removed files cannot be moved back: {reason}.", reason=explain(e)
        ) from None
    for folder, _, _ in os.walk(kept, topdown=False):
        with contextlib.suppress(OSError):  # not empty
            Path(folder).rmdir()
    return len(found)
