"""Inspections made before: in memory while the adapter lives, on disk by the file's content."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from weakref import WeakKeyDictionary

from ..lora_core import Adapter, LoraError
from ..lora_core.inspection import Inspection, inspect_adapter
from ..lora_core.inspection_files import compute_content_hash, read_inspection, write_inspection
from . import host

MAX_FILES = 50  # of a few megabytes each

logger = logging.getLogger(__name__)

_known: WeakKeyDictionary[Adapter, dict[bool, Inspection]] = WeakKeyDictionary()


def get_inspection(adapter: Adapter, exact: bool, base: Path | None = None) -> Inspection:
    """The inspection of an adapter; one with `exact` also answers where it was not asked for.

    One beside a base is made anew: its key would be the hash of a file of many gigabytes, and
    ComfyUI keeps the node's outputs while nothing changes.
    """
    if base is not None:
        return host.run_with_progress(inspect_adapter, adapter, base, exact=exact)
    known = _known.setdefault(adapter, {})
    for is_exact in (True,) if exact else (False, True):
        if is_exact in known:
            return known[is_exact]
    content_hash = compute_content_hash(adapter)
    inspection = None
    for path in list_candidates(content_hash, exact):
        inspection = inspection or read_inspection(path, adapter.name)
    if inspection is None:
        inspection = host.run_with_progress(inspect_adapter, adapter, exact=exact)
        if content_hash is not None:
            save(inspection, get_path(content_hash, exact))
    known[exact] = inspection
    return inspection


def list_candidates(content_hash: str | None, exact: bool) -> Iterator[Path]:
    if content_hash is not None:
        yield from (get_path(content_hash, kind) for kind in ((True,) if exact else (False, True)))


def get_path(content_hash: str, exact: bool) -> Path:
    return host.get_cache_folder() / f"{content_hash}{'-exact' if exact else ''}.json"


def save(inspection: Inspection, path: Path) -> None:
    """A full disk costs the next run some seconds, and this one nothing."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_inspection(inspection, path)
        for old in sorted(path.parent.glob("*.json"), key=get_age)[MAX_FILES:]:
            old.unlink(missing_ok=True)
    except (OSError, LoraError) as error:
        logger.warning("Inspect Edit LoRA: the inspection is not kept for later: %s", error)


def get_age(path: Path) -> float:
    return -path.stat().st_mtime
