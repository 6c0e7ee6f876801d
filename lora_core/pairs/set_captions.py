"""Captions of a set of pairs: one written, all empty ones filled, a trigger word put first."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..disk.writing import explain, replace, write_then_rename
from ..errors import ConfigError, FileError, LoraError
from ..text import shorten
from .listing import is_json
from .pair import MAX_CAPTION_BYTES, read_allowed
from .pair_set import PairConflictError, PairSet, SetPair, check_inside, prepare_folder
from .removed_files import choose_removed
from .written_files import describe_written, write_record

MAX_TRIGGER = 200  # characters


@dataclass(frozen=True)
class CaptionChange:
    """A change of many captions."""

    num_changed: int
    token: str
    """Undoes it, see `removed_files.restore_files`; "" if nothing changed."""


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


def fill_captions(opened: PairSet, text: str) -> CaptionChange:
    """Writes one caption for all pairs that have none.

    Raises:
        ConfigError: it is empty, or as `write_caption`.
        FileError: as `write_caption`; then none is changed.
    """
    if not check_caption(text):
        raise ConfigError("the caption is empty; expected the instruction of these pairs")
    empty = [pair for pair in opened.pairs if not read_current(opened, pair)]
    return change_captions(opened, [(pair, text) for pair in empty])


def add_trigger(opened: PairSet, word: str) -> CaptionChange:
    """Puts a trigger word before all captions that do not begin with it.

    Raises:
        ConfigError: it is empty or too long.
        FileError: as `write_caption`; then none is changed.
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
    return change_captions(opened, [(pair, f"{word}, {text}") for pair, text in changed])


def change_captions(opened: PairSet, texts: Sequence[tuple[SetPair, str]]) -> CaptionChange:
    """Writes these captions, all or none; copies of the files before can be restored."""
    if not texts:
        return CaptionChange(0, "")
    kept = choose_removed(opened)
    #: (caption, the copy of what it was)
    done: list[tuple[Path, Path | None]] = []
    try:
        written = []
        for pair, text in texts:
            path = choose_caption_path(opened, pair)
            copy = keep_copy(opened, path, kept)
            done.append((path, copy))
            write_caption(opened, pair, text)
            before = None if copy is None else path
            written.append(describe_written(opened, path, path, before))
        write_record(kept, written)
    except (LoraError, OSError) as e:
        put_back(done, kept)
        if isinstance(e, LoraError):
            raise
        raise FileError("the captions cannot be written: {reason}.", reason=explain(e)) from None
    return CaptionChange(len(texts), kept.name)


def keep_copy(opened: PairSet, path: Path, kept: Path) -> Path | None:
    """A copy of a file in the folder of removed ones; None if there is no file. OSError."""
    if not path.exists():
        return None
    copy = kept / path.relative_to(opened.folder)
    if not copy.exists():  # two pairs may share a caption
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(read_allowed(path, opened.is_allowed))
    return copy


def put_back(done: Sequence[tuple[Path, Path | None]], kept: Path) -> None:
    """The files as they were before an incomplete change."""
    for path, copy in done:
        with contextlib.suppress(OSError):  # as far as the disk allows
            if copy is None:
                path.unlink(missing_ok=True)
            else:
                replace(copy, path)
    shutil.rmtree(kept, ignore_errors=True)
