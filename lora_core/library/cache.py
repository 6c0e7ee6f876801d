"""What is known of adapter files, kept across restarts. For speed only: it may be deleted."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..disk.typed_json import Whole, read_typed
from ..disk.writing import explain, write_then_rename
from ..errors import FileError
from ..inspection import saved
from ..messages import add_messages, restore_messages
from .facts import AdapterFacts
from .health import Health

#: Goes up when the same file would get different facts or a different verdict.
VERSION = 5
#: A thousand files take 2 MB.
MAX_BYTES = 256 << 20

Fingerprint = tuple[Whole, ...]
"""Size and mtime in ns of a file, then those of its config file, if any."""


@dataclass(frozen=True)
class CacheEntry:
    """What is known of the file that had this fingerprint, `stamp` in the JSON."""

    stamp: Fingerprint
    facts: AdapterFacts | None = None
    health: Health | None = None
    messages: dict[str, Any] = field(default_factory=dict)
    """What makes the texts above translatable; see `messages.add_messages`."""


@dataclass(frozen=True)
class CacheFile:
    version: list[int | str]
    adapters: dict[str, CacheEntry]


def read_cache(path: Path) -> dict[str, CacheEntry]:
    """Name -> what is known; empty for a file that is missing, damaged or of another version."""
    try:
        saved = read_typed(path, CacheFile, MAX_BYTES)
    except FileError:
        return {}
    if saved.version != describe_version():
        return {}
    return {n: restore_messages(known, known.messages) for n, known in saved.adapters.items()}


def write_cache(path: Path, known: Mapping[str, CacheEntry]) -> None:
    """Written under another name, then renamed.

    Names that are no Unicode are not found again: their files are read anew after a restart.

    Raises:
        FileError: the folder or the disk does not take it.
    """
    adapters = {name: add_messages(asdict(entry)) for name, entry in known.items()}
    values = {"version": describe_version(), "adapters": adapters}
    text = json.dumps(values, separators=(",", ":"), ensure_ascii=False)
    data = text.encode(errors="replace")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_then_rename(path, lambda temporary: temporary.write_bytes(data))
    except OSError as e:
        raise FileError(
            "{path} cannot be written: {reason}.", path=path.name, reason=explain(e)
        ) from None


def describe_version() -> list[int | str]:
    names = [field.name for kind in (AdapterFacts, Health) for field in fields(kind)]
    return [VERSION, saved.VERSION, *names]
