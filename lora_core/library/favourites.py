"""The adapters that a user has starred, in one file of our own user folder."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from ..disk.typed_json import Whole, read_typed
from ..disk.writing import explain, write_then_rename
from ..errors import ConfigError, FileError, MissingFileError

VERSION = 1
MAX_FAVOURITES = 10_000
MAX_BYTES = 16 << 20

#: Size in bytes and mtime in ns.
Mark = tuple[int, int]


@dataclass(frozen=True)
class Favourite:
    """A starred file as it was then: one that is renamed or moved is found by size and time."""

    name: str
    """As in the loaders' list, with forward slashes."""
    size_bytes: Whole
    modified_ns: Whole


@dataclass(frozen=True)
class FavouritesFile:
    version: Whole
    favourites: tuple[Favourite, ...]


class Favourites:
    """The starred files; any thread may ask."""

    def __init__(self, path: Path):
        self.path = path
        self._lock = threading.Lock()

    def find(self, files: Mapping[str, Mark]) -> set[str]:
        """Names of the starred ones among these files.

        Raises:
            FileError: the record is damaged or cannot be read.
        """
        with self._lock:
            return match(self._read(), files)

    def set(self, name: str, is_favourite: bool, files: Mapping[str, Mark]) -> None:
        """Stars a file or takes its star; what is recorded of files that are gone now stays.

        Args:
            name: one of `files`.

        Raises:
            ConfigError: too many.
            FileError: the record is damaged, or the disk does not take it.
        """
        with self._lock:
            known = self._read()
            # A renamed file is recorded under its old name.
            find = build_finder(files)
            kept = [one for one in known if name not in find(one)]
            if is_favourite:
                if len(kept) >= MAX_FAVOURITES:
                    raise ConfigError(
                        "there are {num_kept} favourites; expected fewer than {max_favourites}. "
                        "Take some stars away first",
                        num_kept=len(kept),
                        max_favourites=MAX_FAVOURITES,
                    )
                kept.append(Favourite(normalize(name), *files[name]))
            self._write(kept)

    def _read(self) -> tuple[Favourite, ...]:
        try:
            return read_typed(self.path, FavouritesFile, MAX_BYTES).favourites
        except MissingFileError:
            return ()

    def _write(self, favourites: list[Favourite]) -> None:
        values = {"version": VERSION, "favourites": [asdict(one) for one in favourites]}
        data = json.dumps(values, ensure_ascii=False, indent=1).encode(errors="replace")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_then_rename(self.path, lambda temporary: temporary.write_bytes(data))
        except OSError as e:
            raise FileError(
                "{path} cannot be written: {reason}.", path=self.path.name, reason=explain(e)
            ) from None


def match(favourites: tuple[Favourite, ...], files: Mapping[str, Mark]) -> set[str]:
    """Names of the files that a record means: of its name, or else the only one of its mark."""
    find = build_finder(files)
    return {name for one in favourites for name in find(one)}


def build_finder(files: Mapping[str, Mark]) -> Callable[[Favourite], tuple[str, ...]]:
    """A function that gives the one file that a record means, or none; the files are read once."""
    names = {normalize(name): name for name in files}
    by_mark: dict[Mark, list[str]] = {}
    for name, mark in files.items():
        by_mark.setdefault(mark, []).append(name)

    def find(one: Favourite) -> tuple[str, ...]:
        if one.name in names:
            return (names[one.name],)
        same = by_mark.get((one.size_bytes, one.modified_ns), [])
        return tuple(same) if len(same) == 1 else ()

    return find


def normalize(name: str) -> str:
    return name.replace("\\", "/").encode(errors="replace").decode()
