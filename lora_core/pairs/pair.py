"""A pair: the target, what it is made from, and the instruction between them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from ..errors import FileError
from ..stored import shorten
from .pictures import FilePicture, Picture

MAX_REFERENCES = 3  # sockets of TextEncodeQwenImageEditPlus
CAPTION_SUFFIXES = (".txt", ".caption")
MAX_CAPTION_BYTES = 1 << 16

IsAllowed = Callable[[Path], bool]
"""Whether a path, links followed, may be opened."""


class Level(IntEnum):
    """How bad a problem is."""

    NOTE = 0
    WARNING = 1
    QUESTION = 2
    """Looks like a mistake, and only the user can tell."""
    STOP = 3
    """Would ruin the run."""


@dataclass(frozen=True)
class Problem:
    level: Level
    text: str
    """A sentence."""
    pair: str | None = None
    """Name of the pair; None for the whole set."""
    short: str = ""
    """The same in a few words, for below a picture."""


@dataclass(frozen=True)
class Pair:
    """One example of an edit."""

    name: str
    target: Picture
    references: tuple[Picture, ...]
    caption: str | None
    """None where none was found."""
    mask: Picture | None = None
    """Bright where the loss counts."""

    @property
    def pictures(self) -> tuple[Picture, ...]:
        masks = () if self.mask is None else (self.mask,)
        return (self.target, *self.references, *masks)


@dataclass(frozen=True)
class FoundPairs:
    """What a folder holds."""

    layout: str
    """How the files belong together, in the user's words."""
    pairs: tuple[Pair, ...]
    problems: tuple[Problem, ...] = ()


def read_caption(path: Path, is_allowed: IsAllowed) -> str:
    """The whole text, without a byte order mark and spaces around it.

    Raises:
        FileError: too long, no UTF-8, outside the allowed folders, or cannot be opened.
    """
    name = shorten(path.name)
    check_allowed(path, is_allowed)
    try:
        if path.stat().st_size > MAX_CAPTION_BYTES:
            raise FileError(
                f"{name} has {path.stat().st_size:,} bytes; expected a caption of at most "
                f"{MAX_CAPTION_BYTES:,}. Shorten it, or move the file elsewhere."
            )
        return path.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError:
        raise FileError(f"{name} is no UTF-8 text; save it again as UTF-8.") from None
    except OSError as e:
        raise FileError(f"{name} cannot be opened: {e.strerror}.") from None


def check_allowed(path: Path, is_allowed: IsAllowed) -> None:
    if not is_allowed(path):
        raise FileError(
            f"{shorten(path.name)} leads outside the allowed folders; expected a file inside "
            "them. Copy it there instead of linking to it."
        )


def open_file(path: Path, root: Path, is_allowed: IsAllowed) -> FilePicture:
    """FileError for a link that leads outside."""
    check_allowed(path, is_allowed)
    return FilePicture(path, describe_path(path, root))


def describe_path(path: Path, root: Path) -> str:
    """As a person finds the file: inside the set's folder, or with the name of its own folder."""
    inside = path.is_relative_to(root)
    return path.relative_to(root).as_posix() if inside else f"{path.parent.name}/{path.name}"


def check_references(name: str, number: int) -> None:
    """FileError for more than the stock node has sockets."""
    if number > MAX_REFERENCES:
        raise FileError(
            f"{name} has {number} references; expected at most {MAX_REFERENCES}, as many as "
            "TextEncodeQwenImageEditPlus takes. Remove some."
        )
