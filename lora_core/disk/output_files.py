"""What a command may write: nothing of the user's is replaced without being told to."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from ..errors import ConfigError
from ..text import name_path, shorten_list


def check_outputs(
    files: Iterable[Path], inputs: Iterable[str | os.PathLike[str]], overwrite: bool
) -> None:
    """Checks what a command is about to write, before it starts to work.

    Args:
        inputs: files and folders that the command reads.
        overwrite: whether the user asked for existing files to be replaced.

    Raises:
        ConfigError: a file is one of the inputs or belongs to one; or it exists and is not to be
            replaced.
    """
    existing = [file for file in files if os.path.lexists(file)]
    for file in existing:
        for path in inputs:
            if is_part_of(file, path):
                raise ConfigError(
                    "{file} is what is read, or a file in a folder that is; expected another "
                    "file to write to",
                    file=name_path(file),
                )
    if existing and not overwrite:
        names = shorten_list([name_path(file) for file in existing], 2)
        raise ConfigError(
            "{names} already exists; give another name or folder to write to, or --overwrite to "
            "replace it",
            names=names,
        )


def is_part_of(file: Path, path: str | os.PathLike[str]) -> bool:
    """Whether `path` is this file, whatever links and spellings lead to it, or a model's or LoRA's
    folder that holds it."""
    is_in_pipeline = file.absolute().parent.name == "transformer"
    places = (file, file.parent, *([file.parent.parent] if is_in_pipeline else []))
    return any(is_same(place, path) for place in places)


def is_same(a: Path, b: str | os.PathLike[str]) -> bool:
    """Whether both are there and the same file or folder."""
    try:
        return a.samefile(b)
    except (OSError, ValueError):  # ValueError: no name of any file
        return False
