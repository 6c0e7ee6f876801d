"""Captions of a set of pairs: one written, all empty ones filled, a trigger word put first."""

from __future__ import annotations

import re
from pathlib import Path

from ..disk.writing import explain, write_then_rename
from ..errors import ConfigError, FileError
from ..text import shorten
from .listing import is_json
from .pair import MAX_CAPTION_BYTES
from .pair_set import PairConflictError, PairSet, SetPair, check_inside, prepare_folder

MAX_TRIGGER = 200  # characters


def write_caption(
    opened: PairSet, pair: SetPair, text: str, before: str | None = None
) -> tuple[str, Path | None]:
    """Writes a pair's caption into the file that has it, or into a new .txt next to its target.

    Args:
        before: what the user saw; None writes in any case.

    Returns:
        The caption as it is now, and the file that has it; None if there is none.

    Raises:
        ConfigError: too long, or no text.
        PairConflictError: the caption is not `before` any more, is not readable text, or is
            outside the allowed folders.
        FileError: it cannot be written.
    """
    text = check_caption(text)
    path = choose_caption_path(opened, pair)
    current = read_current(opened, pair)
    if before is not None and before.strip() != current:
        raise PairConflictError(
            "the caption of {pair} was changed elsewhere meanwhile; refresh the list, then edit "
            "it again",
            pair=shorten(pair.name),
        )
    if text == current:
        return text, pair.caption_path
    prepare_folder(opened, path.parent)
    check_inside(path, opened.is_allowed)
    try:
        write_then_rename(path, lambda temporary: temporary.write_bytes(text.encode()))
    except OSError as e:
        raise FileError(
            "{path} cannot be written: {reason}.", path=shorten(path.name), reason=explain(e)
        ) from None
    return text, path


def read_current(opened: PairSet, pair: SetPair) -> str:
    """A file that is no caption is never overwritten: its text would be lost."""
    try:
        return opened.read_caption(pair)
    except FileError as e:
        raise PairConflictError(e) from None


def check_caption(text: str) -> str:
    """Without blanks around it; ConfigError if it cannot be a caption."""
    text = text.replace("\r\n", "\n").strip()
    try:
        size_bytes = len(text.encode())
    except UnicodeEncodeError:
        raise ConfigError("the caption holds half of a character; write it again") from None
    if size_bytes > MAX_CAPTION_BYTES:
        raise ConfigError(
            "the caption has {size_bytes:,} bytes; expected at most {max_caption_bytes:,}",
            size_bytes=size_bytes,
            max_caption_bytes=MAX_CAPTION_BYTES,
        )
    if "\0" in text:
        raise ConfigError("the caption holds a null character; write it again")
    return text


def choose_caption_path(opened: PairSet, pair: SetPair) -> Path:
    if pair.caption_path is not None and not is_json(pair.caption_path):
        return pair.caption_path
    if pair.target is not None:
        return pair.target.with_suffix(".txt")
    return opened.target_folder / f"{pair.name}.txt"


def fill_captions(opened: PairSet, text: str) -> int:
    """Writes one caption for all pairs that have none; their number.

    Raises:
        ConfigError: it is empty, or as `write_caption`.
        FileError: as `write_caption`.
    """
    if not check_caption(text):
        raise ConfigError("the caption is empty; expected the instruction of these pairs")
    empty = [pair for pair in opened.pairs if not read_current(opened, pair)]
    for pair in empty:
        write_caption(opened, pair, text)
    return len(empty)


def add_trigger(opened: PairSet, word: str) -> int:
    """Puts a trigger word before all captions that do not begin with it; their number.

    Raises:
        ConfigError: it is empty or too long.
        FileError: as `write_caption`.
    """
    word = check_caption(word).rstrip(",").rstrip()
    if not word or len(word) > MAX_TRIGGER or "\n" in word:
        raise ConfigError(
            "the trigger word has {length} characters; expected one line of 1 to {max_trigger}",
            length=len(word),
            max_trigger=MAX_TRIGGER,
        )
    begins = re.compile(rf"{re.escape(word)}(?!\w)")
    captions = [(pair, read_current(opened, pair)) for pair in opened.pairs]
    changed = [(pair, text) for pair, text in captions if text and not begins.match(text)]
    for pair, text in changed:
        write_caption(opened, pair, f"{word}, {text}")
    return len(changed)
