"""Folders that a graph may name: those for training images, input and output."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from pathlib import Path

from ...lora_core import FileError
from ...lora_core.messages import message
from ...lora_core.text import shorten
from .. import host


def is_dataset_path(path: Path) -> bool:
    """Whether a path, links followed, is inside one of these folders."""
    roots = [root for folders in host.list_dataset_roots().values() for root in folders]
    try:
        return any(host.is_within_directory(root, path) for root in roots)
    except (OSError, ValueError):  # not a valid file name
        return False


def find_dataset_folder(name: str) -> Path:
    """Finds a folder by its name below one of the roots, by root and name, or by its full path.

    Raises:
        FileError: it is outside the roots, or does not exist.
    """
    roots = host.list_dataset_roots()
    given = name.strip().replace("\\", "/").rstrip("/")
    first, _, rest = given.partition("/")
    tries = [Path(root, rest) for root in roots.get(first, ())]
    tries += [Path(root, given) for folders in roots.values() for root in folders]
    inside = [path for path in tries if "\0" not in given and is_dataset_path(path)]
    found = next((path for path in map(find_composed, inside) if is_folder(path)), None)
    if not given or (found is None and len(inside) < len(tries)):
        raise FileError(
            "{given!r} is outside the folders for training images; expected a folder inside "
            "ComfyUI's {roots}. Put the images there, or add their folder under 'datasets' in "
            "extra_model_paths.yaml.",
            given=shorten(given),
            roots=", ".join(roots),
        )
    if found is None:
        raise FileError(
            "the folder {given!r} does not exist; expected one inside datasets, input or "
            "output, such as {roots}.",
            given=shorten(given),
            roots=list_some_folders(roots),
        )
    return found


def is_folder(path: Path) -> bool:
    """Like Path.is_dir, but False for invalid names too."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def find_composed(path: Path) -> Path:
    """The folder whose name differs only in Unicode normalization, or `path` itself."""
    if is_folder(path) or path.as_posix().isascii() or not is_folder(path.parent):
        return path
    wanted = unicodedata.normalize("NFC", path.name)
    return next(
        (p for p in path.parent.iterdir() if unicodedata.normalize("NFC", p.name) == wanted), path
    )


def list_some_folders(roots: Mapping[str, list[str]], limit: int = 4) -> str:
    """Some of the existing folders, for a message."""
    found = [
        f"'{shorten(f'{name}/{path.name}', 40)}'"
        for name, folders in roots.items()
        for root in folders
        if is_folder(Path(root))
        for path in sorted(Path(root).iterdir())
        if is_folder(path) and not path.name.startswith(".")
    ]
    return ", ".join(found[:limit]) or message("'datasets/my_pairs' (none is there yet)")
