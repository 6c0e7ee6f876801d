"""A pair: the target, what it is made from, and the instruction between them."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from ..disk.json_reader import describe_kind, parse_json
from ..disk.regular_files import MAX_TEXT_BYTES, decode_text, read_bytes
from ..errors import FileError
from ..findings import ERROR, NOTE, WARNING
from ..text import shorten
from .images import FileImage, ImageSource

MAX_REFERENCES = 3  # sockets of TextEncodeQwenImageEditPlus
#: The first that exists is used. A .json next to an image often holds anything but a caption.
CAPTION_SUFFIXES = (".txt", ".caption", ".json")
#: Columns of a list, and fields of a .json next to an image, the most certain first.
CAPTION_COLUMNS = (
    *("edit_prompt", "instruction", "edit_instruction", "prompt", "caption", "text"),
)
MAX_CAPTION_BYTES = 1 << 16
#: Unicode's controls, format characters and blanks, and what is as invisible in other categories.
INVISIBLE_CATEGORIES = ("Cc", "Cf", "Zs", "Zl", "Zp")
INVISIBLE = frozenset("\u034f\u115f\u1160\u2800\u3164\ufe0e\ufe0f\uffa0")

IsAllowed = Callable[[Path], bool]
"""Whether a path, links followed, may be opened."""


class Level(IntEnum):
    """Severity of a problem."""

    NOTE = 0
    WARNING = 1
    QUESTION = 2
    """Looks like a mistake, and only the user can tell."""
    STOP = 3
    """Would ruin the run."""

    @property
    def severity(self) -> str:
        """As `Finding` has it."""
        return {Level.NOTE: NOTE, Level.STOP: ERROR}.get(self, WARNING)


#: Kind of a problem that makes one pair unusable.
UNUSABLE = "pair_unusable"


@dataclass(frozen=True)
class Problem:
    level: Level
    kind: str
    """Its identifier for programs; never changes."""
    text: str
    """A sentence."""
    pair: str | None = None
    """Name of the pair; None for the whole set."""
    short: str = ""
    """The same in a few words, for the caption of an image."""
    count: int = 1
    """How many files or pairs it is about."""


@dataclass(frozen=True)
class Pair:
    """One example of an edit."""

    name: str
    target: ImageSource
    references: tuple[ImageSource, ...]
    caption: str | None
    """None where none was found."""
    mask: ImageSource | None = None
    """White where the loss counts."""

    @property
    def images(self) -> tuple[ImageSource, ...]:
        masks = () if self.mask is None else (self.mask,)
        return (self.target, *self.references, *masks)


@dataclass(frozen=True)
class FoundPairs:
    """What a folder holds."""

    layout: str
    """How the files belong together, in the user's words."""
    pairs: tuple[Pair, ...]
    problems: tuple[Problem, ...] = ()


def read_caption(path: Path, is_allowed: IsAllowed) -> str | None:
    """The whole text without a byte order mark, as `clean_caption`; of a .json its caption.

    None for a .json without one.

    Raises:
        FileError: too long, no UTF-8, no text where a .json has its caption, outside the allowed
            folders, no regular file, or cannot be opened.
    """
    data = read_allowed(path, is_allowed)
    if len(data) > MAX_CAPTION_BYTES:
        raise FileError(
            "{path} has {size:,} bytes; expected a caption of at most "
            "{max_caption_bytes:,}. Shorten it, or move the file elsewhere.",
            path=shorten(path.name),
            size=len(data),
            max_caption_bytes=MAX_CAPTION_BYTES,
        )
    if path.suffix.lower() != ".json":
        return clean_caption(decode_text(data, path.name))
    value = parse_json(data, path.name)
    if isinstance(value, str):
        return clean_caption(value)
    return choose_caption(value, path.name) if isinstance(value, dict) else None


def choose_caption(row: Mapping[str, object], place: str) -> str | None:
    """The first column with text; "" where these are there and empty, None where there are none.

    Args:
        place: where the row is, for the message.

    Raises:
        FileError: the first non-empty one is not text.
    """
    found = [row[name] for name in CAPTION_COLUMNS if row.get(name) is not None]
    for value in found:
        if not isinstance(value, str):
            raise FileError(
                "the caption in {place} is {value}; expected text. Write one instruction there.",
                place=shorten(place),
                value=describe_kind(value),
            )
        caption = clean_caption(value)
        if caption:
            return caption
    return "" if found else None


def clean_caption(text: str) -> str:
    """The text as a prompt would have it: lines end with "\\n", no spaces around it.

    ComfyUI's text field knows no other line end, so a "\\r" from Windows would be trained as tokens
    that no prompt has. Empty where nothing can be seen: only NULs, zero-width spaces and the like.
    Next to visible characters these stay, since emoji and some scripts need them.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n").strip()
    return text if any(map(is_visible, text)) else ""


def is_visible(character: str) -> bool:
    category = unicodedata.category(character)
    return category not in INVISIBLE_CATEGORIES and character not in INVISIBLE


def check_allowed(path: Path, is_allowed: IsAllowed) -> Path:
    """The path without links that was judged; whoever opens it later follows none.

    Raises:
        FileError: it leads outside, or is no path.
    """
    try:
        real = path.resolve()
        allowed = is_allowed(real)
    except (OSError, ValueError, RuntimeError):  # a name that no disk takes, links in a circle
        raise FileError(
            "{path} is not a file path; expected one.", path=shorten(path.name)
        ) from None
    if not allowed:
        raise FileError(
            "{path} leads outside the allowed folders; expected a file inside them. Copy it "
            "there instead of linking to it.",
            path=shorten(path.name),
        )
    return real


def read_allowed(path: Path, is_allowed: IsAllowed, max_bytes: int = MAX_TEXT_BYTES) -> bytes:
    """The bytes of exactly the file that was judged.

    Raises:
        FileError: as `check_allowed` and `read_bytes`, or it became a link in between.
    """
    real = check_allowed(path, is_allowed)
    return read_bytes(real, max_bytes, shown=path.name, follow_links=False)


def open_file(path: Path, root: Path, is_allowed: IsAllowed) -> FileImage:
    """FileError for a link that leads outside."""
    real = check_allowed(path, is_allowed)
    return FileImage(path, describe_path(path, root), real)


def describe_path(path: Path, root: Path) -> str:
    """As a user finds the file: relative to the set's folder, or with its own folder's name."""
    inside = path.is_relative_to(root)
    return path.relative_to(root).as_posix() if inside else f"{path.parent.name}/{path.name}"


def list_some(paths: Sequence[Path], root: Path, limit: int = 3) -> str:
    """The first few of many files, for a message."""
    shown = [shorten(describe_path(path, root), 60) for path in paths[:limit]]
    return ", ".join([*shown, "..."] if len(paths) > limit > 1 else shown)


def check_references(name: str, number: int) -> None:
    """FileError for more than the stock node has sockets."""
    if number > MAX_REFERENCES:
        raise FileError(
            "{name} has {number} references; expected at most {max_references}, as many as "
            "TextEncodeQwenImageEditPlus takes. Remove some.",
            name=name,
            number=number,
            max_references=MAX_REFERENCES,
        )
