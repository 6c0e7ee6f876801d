"""Folders of our own inside a job's folder or a cache: never links, through which files would be
written and deleted elsewhere.
"""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import FileError
from ..text import shorten


def is_link(path: str | os.PathLike[str]) -> bool:
    """A symbolic link, or a junction of Windows; whether or not it leads anywhere."""
    is_junction = getattr(os.path, "isjunction", None)  # Python 3.12
    return os.path.islink(path) or (is_junction is not None and is_junction(path))  # noqa: PTH114


def check_own_folder(folder: Path) -> None:
    """FileError if a link has the place of the folder; there may be none yet."""
    if is_link(folder):
        raise FileError(
            "{folder} in {folder_parent} is a link; expected a folder of its own, since nothing "
            "is written elsewhere. Remove the link, or move the folder itself there.",
            folder=shorten(folder.name),
            folder_parent=shorten(folder.parent.name),
        )


def make_own_folder(folder: Path, parents: bool = False) -> None:
    """Creates the folder where it is missing.

    Raises:
        FileError: as `check_own_folder`.
        OSError: it cannot be made.
    """
    check_own_folder(folder)
    folder.mkdir(parents=parents, exist_ok=True)
