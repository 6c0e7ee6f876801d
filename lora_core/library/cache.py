"""What is known of adapter files, kept across restarts. For speed only: it may be deleted."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..disk.field_types import check_fields
from ..disk.json_reader import read_object
from ..disk.writing import explain, write_then_rename
from ..errors import FileError
from ..inspection import saved
from .facts import AdapterFacts
from .health import Health

#: Goes up when the same file would get different facts or a different verdict.
VERSION = 3
#: A thousand files take 2 MB.
MAX_BYTES = 256 << 20

Fingerprint = tuple[int, ...]
"""Size and mtime in ns of a file, then those of its config file, if any."""


@dataclass(frozen=True)
class CacheEntry:
    """What is known of the file that had this fingerprint, `stamp` in the JSON."""

    stamp: Fingerprint
    facts: AdapterFacts | None = None
    health: Health | None = None


def read_cache(path: Path) -> dict[str, CacheEntry]:
    """Name -> what is known; empty for a file that is missing, damaged or of another version."""
    try:
        saved = read_object(path, MAX_BYTES)
        if saved["version"] != describe_version():
            return {}
        return {name: restore(values) for name, values in saved["adapters"].items()}
    except (FileError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def write_cache(path: Path, known: Mapping[str, CacheEntry]) -> None:
    """Written under another name, then renamed.

    Raises:
        FileError: the folder or the disk does not take it.
    """
    values = {"version": describe_version(), "adapters": {n: asdict(k) for n, k in known.items()}}
    text = json.dumps(values, separators=(",", ":"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_then_rename(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    except OSError as e:
        raise FileError(f"{path.name} cannot be written: {explain(e)}.") from None


def describe_version() -> list[Any]:
    names = [field.name for kind in (AdapterFacts, Health) for field in fields(kind)]
    return [VERSION, saved.VERSION, *names]


def restore(values: dict[str, Any]) -> CacheEntry:
    facts, health = values["facts"], values["health"]
    known = CacheEntry(
        tuple(values["stamp"]),
        facts and AdapterFacts(**with_tuples(facts)),
        health and Health(**with_tuples(health)),
    )
    for part in (known, known.facts, known.health):
        if part is not None:
            check_fields(part)
    return known


def with_tuples(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has lists only."""
    return {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
