"""What a job's images show: the captions of its training set, by the items' keys."""

from __future__ import annotations

from collections.abc import Collection
from functools import lru_cache
from pathlib import Path

from ..disk.regular_files import read_bytes
from ..errors import FileError
from ..training.data.dataset import INDEX_FILE, MAX_INDEX_BYTES, parse_index

MAX_CAPTION = 300  # characters
NUM_SETS = 4  # remembered


def read_captions(dataset: Path, items: Collection[str]) -> dict[str, str]:
    """Key -> the start of its caption, in one line; without those that have none.

    Empty where the training set is gone or damaged: the keys are as good a title.
    """
    if not items:
        return {}
    try:
        stat = (dataset / INDEX_FILE).stat()
        known = _read(dataset, stat.st_mtime_ns, stat.st_size)
    except (OSError, FileError):
        return {}
    return {key: known[key] for key in items if known.get(key)}


@lru_cache(NUM_SETS)
def _read(dataset: Path, modified_ns: int, size_bytes: int) -> dict[str, str]:
    """Asked every second while a page shows the job; a set is read again when its index changes."""
    index = parse_index(read_bytes(dataset / INDEX_FILE, MAX_INDEX_BYTES), dataset.name)
    return {info.key: clean(info.caption) for info in index.items}


def clean(text: str) -> str:
    text = " ".join(text[: 4 * MAX_CAPTION].split())
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= MAX_CAPTION else f"{text[: MAX_CAPTION - 1]}…"
