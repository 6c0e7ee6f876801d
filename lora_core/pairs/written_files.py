"""What a change wrote into a set, so that undoing it leaves alone what was edited since.

It is in `.removed/<token>.json`, next to the folder of what the change moved aside.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..disk.plain_json import write_json
from ..disk.typed_json import read_typed
from ..disk.writing import explain, write_then_rename
from ..errors import FileError, MissingFileError
from .pair import describe_path, open_file
from .pair_set import PairConflictError, PairSet, check_inside


@dataclass(frozen=True)
class WrittenFile:
    """One file of a change; names are relative to the set's folder."""

    file: str
    digest: str
    """Of its bytes, as `FileImage.compute_digest`."""
    instead_of: str
    """The file that was moved aside for it; "" if there was none."""


@dataclass(frozen=True)
class WrittenFiles:
    """All that one change wrote."""

    files: tuple[WrittenFile, ...]


def describe_written(
    opened: PairSet, content: Path, path: Path, instead_of: Path | None
) -> WrittenFile:
    """
    Args:
        content: a file of the same bytes; `path` itself once it is written.

    Raises:
        FileError: it cannot be read.
    """
    digest = open_file(content, content.parent, opened.is_allowed).compute_digest()
    before = "" if instead_of is None else describe_path(instead_of, opened.folder)
    return WrittenFile(describe_path(path, opened.folder), digest, before)


def write_record(kept: Path, written: Sequence[WrittenFile]) -> None:
    """
    Args:
        kept: the folder of what was moved aside, which may not exist.

    Raises:
        FileError: the disk does not take it.
    """
    text = write_json(asdict(WrittenFiles(tuple(written))))
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_then_rename(name_record(kept), lambda path: path.write_bytes(text.encode()))
    except OSError as e:
        raise FileError(
            "what can be undone cannot be written: {reason}.", reason=explain(e)
        ) from None


def read_record(opened: PairSet, kept: Path) -> tuple[WrittenFile, ...]:
    """Empty if there is none; PairConflictError if it is damaged."""
    check_inside(name_record(kept), opened.is_allowed)
    try:
        return read_typed(name_record(kept), WrittenFiles).files
    except MissingFileError:
        return ()
    except FileError as e:
        raise PairConflictError(e) from None


def name_record(kept: Path) -> Path:
    return kept.with_name(f"{kept.name}.json")


def split_edited(
    opened: PairSet, written: Sequence[WrittenFile]
) -> tuple[list[Path], list[WrittenFile]]:
    """(files as they were written, those that were edited since); others are gone.

    Only files of the set's pairs count, whatever a record says.
    """
    known = {
        describe_path(path, opened.folder): path for pair in opened.pairs for path in pair.files
    }
    same: list[Path] = []
    edited: list[WrittenFile] = []
    for one in written:
        path = known.get(one.file)
        if path is None:
            continue
        with contextlib.suppress(MissingFileError):  # gone since the set was opened
            file = open_file(path, opened.folder, opened.is_allowed)
            if file.compute_digest() == one.digest:
                same.append(path)
            else:
                edited.append(one)
    return same, edited
