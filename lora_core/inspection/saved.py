"""Inspections on disk, named by the content they are about. For speed only: any may be deleted."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from ..adapter.adapter import Adapter
from ..disk.content_samples import read_samples
from ..disk.regular_files import open_regular
from ..disk.safetensors_file import BASE_MODEL, StoredTensor, read_signature
from ..disk.typed_json import read_typed
from ..disk.writing import write_then_rename
from ..errors import FileError, get_reason
from ..text import shorten
from .against_base import BaseStatistics
from .inspection import Inspection, ModuleInspection

#: Goes up when the same file would get other statistics; the fields are compared anyway.
VERSION = 6
HASH_CHUNK_BYTES = 1 << 24
#: Of an inspection on disk; one of 840 modules of rank 128 has 3 MB.
MAX_BYTES = 256 << 20
MAX_HEADER_BYTES = 100_000_000  # as safetensors limits it


def compute_content_hash(adapter: Adapter) -> str | None:
    """A digest of everything an inspection depends on; None if not all of it is in one file.

    The file's bytes are not enough: alpha may come from another file, and an adapter may hold
    only some of a file's modules.

    Raises:
        FileError: the file was removed or changed since it was opened.
    """
    file = adapter.file
    tensors = [tensor for weights in adapter.modules.values() for tensor in weights.parts.values()]
    if file is None or not all(isinstance(t, StoredTensor) and t.file is file for t in tensors):
        return None
    file.check_unchanged()
    digest = hashlib.blake2b(digest_size=20)
    with open_regular(file.path) as content:
        while chunk := content.read(HASH_CHUNK_BYTES):
            digest.update(chunk)
    for path, weights in adapter.modules.items():
        digest.update(f"{path} {weights.kind} {weights.alpha!r} {weights.scale!r}\n".encode())
    file.check_unchanged()
    return digest.hexdigest()


def compute_file_identity(path: Path) -> str:
    """A digest that distinguishes base model files without reading all of one.

    Of the name (it is in the sentences), size, modification time, header, and 4 KiB at each of 64
    places. Only a file changed elsewhere, with the same size and modification time, would go
    unnoticed; hashing tens of gigabytes takes longer than the inspection it would save.

    Raises:
        FileError: the file is missing or cannot be opened.
    """
    size, modified, *_ = read_signature(path, BASE_MODEL)
    digest = hashlib.blake2b(f"{path.name} {size} {modified}\n".encode(), digest_size=12)
    try:
        with open_regular(path) as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            digest.update(file.read(min(header_bytes, MAX_HEADER_BYTES)))
            for sample in read_samples(file, size):
                digest.update(sample)
    except OSError as e:
        raise FileError(
            "{path} cannot be opened: {reason}.", path=shorten(path.name), reason=get_reason(e)
        ) from None
    return digest.hexdigest()


def write_inspection(inspection: Inspection, path: Path) -> None:
    """Written under another name, then renamed: a reader never sees half a file."""
    text = json.dumps(
        {
            "version": VERSION,
            "fields": list_fields(),
            "modules": {path: asdict(module) for path, module in inspection.modules.items()},
            "skipped": dict(inspection.skipped),
            "non_finite": list(inspection.non_finite),
            "misfits": list(inspection.misfits),
        }
    )
    write_then_rename(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


@dataclass(frozen=True)
class InspectionFile:
    version: int
    fields: list[str]
    modules: dict[str, ModuleInspection]
    skipped: dict[str, str]
    non_finite: tuple[str, ...]
    misfits: tuple[str, ...]


def read_inspection(path: Path, name: str) -> Inspection | None:
    """What `write_inspection` wrote, for an adapter of this name; None if of another version."""
    try:
        saved = read_typed(path, InspectionFile, MAX_BYTES)
    except FileError:
        return None
    if saved.version != VERSION or saved.fields != list_fields():
        return None
    return Inspection(name, saved.modules, saved.skipped, saved.non_finite, saved.misfits)


def list_fields() -> list[str]:
    return [field.name for kind in (ModuleInspection, BaseStatistics) for field in fields(kind)]
