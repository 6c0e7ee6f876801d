"""The files of a folder, by the names that pair them."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import FileError
from ..files import explain
from ..stored import shorten
from .pair import CAPTION_SUFFIXES
from .pictures import SUFFIXES

#: What archives and systems leave behind.
SKIPPED_FOLDERS = ("__MACOSX", "__pycache__")


def sort_naturally(name: str) -> list:
    """Key under which `a_2` comes before `a_10`."""
    parts = re.split(r"(\d+)", name.casefold())
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts]


@dataclass
class Listing:
    """Pictures and captions below a folder; keys are paths without suffix, case ignored."""

    root: Path
    pictures: dict[str, list[Path]] = field(default_factory=dict)
    captions: dict[str, Path] = field(default_factory=dict)

    @property
    def num_pictures(self) -> int:
        return sum(map(len, self.pictures.values()))

    def list_folder(self, folder: Path, is_deep: bool = True) -> dict[str, list[Path]]:
        """Pictures in a folder, and below it if `is_deep`; keys are relative to it."""
        start = make_key(self.root, folder)
        start = "" if start == "." else f"{start}/"
        inside = {
            key[len(start) :]: paths
            for key, paths in self.pictures.items()
            if key.startswith(start)
        }
        return {key: paths for key, paths in inside.items() if is_deep or "/" not in key}

    def find_caption(self, keys: list[str]) -> Path | None:
        """The first that exists."""
        return next((self.captions[key] for key in keys if key in self.captions), None)


def list_files(root: Path) -> Listing:
    """Walks a folder; links to folders are not followed.

    Raises:
        FileError: it cannot be opened.
    """
    listing = Listing(root)
    found: list[Path] = []

    def fail(error: OSError) -> None:
        name = shorten(Path(error.filename or root).name)
        raise FileError(f"{name} cannot be opened: {explain(error)}.")

    for folder, subfolders, names in os.walk(root, onerror=fail):
        subfolders[:] = [n for n in subfolders if n[0] != "." and n not in SKIPPED_FOLDERS]
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    for path in sorted(found, key=lambda path: sort_naturally(str(path.relative_to(root)))):
        suffix = path.suffix.lower()
        if suffix in SUFFIXES:
            listing.pictures.setdefault(make_key(root, path), []).append(path)
        elif suffix in CAPTION_SUFFIXES:
            listing.captions.setdefault(make_key(root, path), path)
    return listing


def make_key(root: Path, path: Path) -> str:
    relative = path.relative_to(root)
    is_file = relative.suffix.lower() in SUFFIXES or relative.suffix.lower() in CAPTION_SUFFIXES
    return (relative.with_suffix("") if is_file else relative).as_posix().casefold()
