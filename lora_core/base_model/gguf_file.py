"""GGUF files, one tensor at a time; the gguf package knows its codes."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import torch

from ..disk.safetensors_file import StoredTensor, read_bytes
from ..errors import ConfigError, FileError
from ..text import shorten
from .gguf_header import read_header


class GgufFile:
    """A GGUF whose header has been read. Nothing is mapped: each tensor is read when asked for.

    `tensors` has the form of `SafetensorsFile.tensors`; quantised ones come as float32.

    Raises:
        ConfigError: the gguf package is missing.
        FileError: the file is damaged or ends early.
    """

    def __init__(self, path: Path):
        gguf = import_gguf()
        self.path = path
        self.metadata: dict[str, str] = {}
        header = read_header(path, gguf.GGML_QUANT_SIZES)
        size, self.entries = header.size_bytes, header.entries
        #: Key -> how it is stored, of those that are not plain numbers.
        self.storages = {
            key: f"GGUF {gguf.GGMLQuantizationType(entry.kind).name}"
            for key, entry in self.entries.items()
            if entry.kind not in (gguf.GGMLQuantizationType.F32, *plain_kinds(gguf))
        }
        end = max((e.offset + e.num_bytes for e in self.entries.values()), default=0)
        if end > size:
            raise FileError(
                "{name} ends early: {size:,} bytes, but its header promises {end:,}. Download "
                "or copy it again.",
                name=shorten(self.name),
                size=size,
                end=end,
            )
        plain = plain_kinds(gguf)
        self.tensors = {
            key: StoredTensor(self, key, torch.Size(e.shape), plain.get(e.kind, torch.float32))
            for key, e in self.entries.items()
        }

    @property
    def name(self) -> str:
        return self.path.name

    def read(self, key: str) -> torch.Tensor:
        """One tensor in its own floating-point type, or dequantised to float32."""
        return self.read_rows(key, slice(None))

    def read_rows(self, key: str, rows: slice, buffer: torch.Tensor | None = None) -> torch.Tensor:
        """Some rows of one; `buffer` serves what needs no decoding."""
        entry, dtype = self.entries[key], self.tensors[key].dtype
        data = self.read_codes(key, rows, buffer)
        shape = (len(data), *entry.shape[1:]) if len(entry.shape) > 1 else entry.shape
        if not data.numel():
            return torch.empty(shape, dtype=dtype)
        if dtype != torch.float32:
            return data.view(dtype).reshape(shape)
        gguf = import_gguf()
        kind = gguf.GGMLQuantizationType(entry.kind)
        try:
            values = gguf.quants.dequantize(data.numpy(), kind)
        except NotImplementedError:
            raise FileError(
                "{name} stores {key} as {kind}, which the gguf package cannot read; choose a "
                "file with another quantisation, e.g. Q8_0 or Q4_K_M.",
                name=shorten(self.name),
                key=shorten(key),
                kind=kind.name,
            ) from None
        return torch.from_numpy(values).reshape(shape)

    def read_codes(
        self, key: str, rows: slice = slice(None), buffer: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The bytes as stored in the file, uint8 (rows, bytes of a row)."""
        entry = self.entries[key]
        num_rows = entry.shape[0] if len(entry.shape) > 1 else 1
        row_bytes = entry.num_bytes // max(1, num_rows)
        start, stop, _ = rows.indices(num_rows)
        with self.path.open("rb") as file:
            place = entry.offset + start * row_bytes
            data = read_bytes(file, place, (stop - start) * row_bytes, buffer)
        if data is None:
            raise FileError(
                "{name} was changed on disk since it was opened; start again.",
                name=shorten(self.name),
            )
        return data.reshape(stop - start, row_bytes)

    def release(self) -> None:
        """Nothing is held open."""


def plain_kinds(gguf: ModuleType) -> dict[int, torch.dtype]:
    """Types of half precision, whose bytes need no decoding."""
    return {
        int(gguf.GGMLQuantizationType.F16): torch.float16,
        int(gguf.GGMLQuantizationType.BF16): torch.bfloat16,
    }


def import_gguf() -> ModuleType:
    try:
        import gguf
    except ImportError:
        raise ConfigError(
            "GGUF files need the gguf package, which is not installed; run pip install gguf."
        ) from None
    return gguf
