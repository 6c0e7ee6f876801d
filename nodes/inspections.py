"""Cached inspections: in memory while the adapter lives, on disk by the files' content."""

from __future__ import annotations

import logging
from collections.abc import Hashable, MutableMapping
from pathlib import Path
from weakref import WeakKeyDictionary

from ..lora_core import Adapter, LoraError
from ..lora_core.base_model.base_weights import BaseWeights
from ..lora_core.inspection.inspection import Inspection, inspect_adapter
from ..lora_core.inspection.saved import (
    compute_content_hash,
    compute_file_identity,
    read_inspection,
    write_inspection,
)
from . import host
from .model_base import read_model_base

MAX_FILES = 50  # a few megabytes each

logger = logging.getLogger(__name__)

#: Per adapter: (identity of the base file, whether exact) -> its inspection.
_known: WeakKeyDictionary[Adapter, dict[Hashable, Inspection]] = WeakKeyDictionary()
#: The same for loaded models, keyed by the module that all clones of one share. Never on disk:
#: another loader or a later session may put other weights behind the same MODEL.
_beside: WeakKeyDictionary[Adapter, MutableMapping] = WeakKeyDictionary()


def get_inspection(
    adapter: Adapter, exact: bool, base: Path | host.ModelPatcher | None = None
) -> Inspection:
    """The inspection of an adapter; a cached exact one also serves requests without `exact`.

    Raises:
        KeyFormatError: the base is not a Qwen-Image model.
        FileError: a file is missing, damaged or stored in a way that cannot be read.
    """
    if isinstance(base, host.ModelPatcher):
        return get_inspection_beside_model(adapter, exact, base)
    identity = "" if base is None else compute_file_identity(base)
    known = _known.setdefault(adapter, {})
    kinds = (True,) if exact else (False, True)
    for is_exact in kinds:
        if (identity, is_exact) in known:
            return known[identity, is_exact]
    content_hash = compute_content_hash(adapter)
    inspection = None
    if content_hash is not None:
        for is_exact in kinds:
            path = get_path(content_hash, identity, is_exact)
            inspection = inspection or read_inspection(path, adapter.name)
    if inspection is None:
        inspection = run(adapter, exact, base)
        if content_hash is not None:
            save(inspection, get_path(content_hash, identity, exact))
    known[identity, exact] = inspection
    return inspection


def get_inspection_beside_model(
    adapter: Adapter, exact: bool, model: host.ModelPatcher
) -> Inspection:
    """Cached only while both live; patches are ignored, so clones share the inspection."""
    models = _beside.setdefault(adapter, WeakKeyDictionary())
    known = models.setdefault(model.model.diffusion_model, {})
    for is_exact in (True,) if exact else (False, True):
        if is_exact in known:
            return known[is_exact]
    known[exact] = run(adapter, exact, read_model_base(model))
    return known[exact]


def run(adapter: Adapter, exact: bool, base: Path | BaseWeights | None) -> Inspection:
    if base is None:
        return host.run_with_progress(inspect_adapter, adapter, exact=exact)
    return host.run_with_progress(inspect_adapter, adapter, base, exact=exact)


def get_path(content_hash: str, base_identity: str, exact: bool) -> Path:
    beside = f"-beside-{base_identity}" if base_identity else ""
    return (
        host.get_cache_folder()
        / "inspections"
        / f"{content_hash}{beside}{'-exact' if exact else ''}.json"
    )


def save(inspection: Inspection, path: Path) -> None:
    """A full disk does not fail this run; the next one only computes it again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_inspection(inspection, path)
        for old in sorted(path.parent.glob("*.json"), key=get_age)[MAX_FILES:]:
            old.unlink(missing_ok=True)
    except (OSError, LoraError) as error:
        logger.warning("Inspect Qwen Edit LoRA: the inspection could not be cached: %s", error)


def get_age(path: Path) -> float:
    return -path.stat().st_mtime
