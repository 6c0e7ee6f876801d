"""Folders that a graph may name: those for training pictures, input and output."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..lora_core import FileError
from ..lora_core.stored import shorten
from . import host


def is_dataset_path(path: Path) -> bool:
    """Whether a path, links followed, is inside one of these folders."""
    roots = [root for folders in host.list_dataset_roots().values() for root in folders]
    return any(host.is_within_directory(root, path) for root in roots)


def find_dataset_folder(name: str) -> Path:
    """A folder by its name below one of the roots, by root and name, or by its full path.

    Raises:
        FileError: outside of them, or no such folder.
    """
    roots = host.list_dataset_roots()
    given = name.strip().replace("\\", "/").rstrip("/")
    first, _, rest = given.partition("/")
    tries = [Path(root, rest) for root in roots.get(first, ())]
    tries += [Path(root, given) for folders in roots.values() for root in folders]
    inside = [path for path in tries if "\0" not in given and is_dataset_path(path)]
    found = next((path for path in inside if path.is_dir()), None)
    if not given or (found is None and len(inside) < len(tries)):
        places = ", ".join(root for folders in roots.values() for root in folders)
        raise FileError(
            f"{shorten(given)!r} is outside the folders for training pictures; expected a folder "
            f"inside {places}. Put the pictures there, or add their folder under 'datasets' in "
            "extra_model_paths.yaml."
        )
    if found is None:
        raise FileError(
            f"the folder {shorten(given)!r} does not exist; expected one inside datasets, input or "
            f"output, such as {list_some_folders(roots)}."
        )
    return found


def list_some_folders(roots: Mapping[str, list[str]], limit: int = 4) -> str:
    """Those that are there, for a message."""
    found = [
        f"'{name}/{path.name}'"
        for name, folders in roots.items()
        for root in folders
        if Path(root).is_dir()
        for path in sorted(Path(root).iterdir())
        if path.is_dir() and not path.name.startswith(".")
    ]
    return ", ".join(found[:limit]) or "'datasets/my_pairs' (none is there yet)"
