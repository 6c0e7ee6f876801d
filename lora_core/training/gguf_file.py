"""GGUF files, one tensor at a time; the gguf package knows the format and its codes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import ConfigError, FileError
from ..stored import StoredTensor, read_bytes, shorten


@dataclass(frozen=True)
class GgufEntry:
    """Where one tensor's data lies."""

    offset: int
    num_bytes: int
    kind: int
    """gguf.GGMLQuantizationType."""
    shape: tuple[int, ...]


class GgufFile:
    """A GGUF whose header has been read. Nothing is mapped: each tensor is read when asked for.

    `tensors` looks as a `SafetensorsFile`'s; quantised ones come as float32.

    Raises:
        ConfigError: the gguf package is missing.
        FileError: the file is damaged or ends early.
    """

    def __init__(self, path: Path):
        gguf = import_gguf()
        self.path = path
        self.metadata: dict[str, str] = {}
        size = path.stat().st_size
        try:
            reader = gguf.GGUFReader(path)
            self.entries = {tensor.name: describe(tensor) for tensor in reader.tensors}
        except (ValueError, KeyError, IndexError, OSError, OverflowError) as e:
            raise FileError(
                f"{self.name} is damaged ({shorten(str(e))}): it is truncated or was written "
                "wrongly. Download or copy it again."
            ) from None
        end = max((e.offset + e.num_bytes for e in self.entries.values()), default=0)
        if end > size:
            raise FileError(
                f"{self.name} ends early: {size:,} bytes, but its header promises {end:,}. "
                "Download or copy it again."
            )
        plain = {
            int(gguf.GGMLQuantizationType.F16): torch.float16,
            int(gguf.GGMLQuantizationType.BF16): torch.bfloat16,
        }
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
        if dtype != torch.float32:
            return data.view(dtype).reshape(shape)
        gguf = import_gguf()
        kind = gguf.GGMLQuantizationType(entry.kind)
        try:
            values = gguf.quants.dequantize(data.numpy(), kind)
        except NotImplementedError:
            raise FileError(
                f"{self.name} stores {key} as {kind.name}, which the gguf package cannot read; "
                "choose a file with another quantisation, e.g. Q8_0 or Q4_K_M."
            ) from None
        return torch.from_numpy(values).reshape(shape)

    def read_codes(
        self, key: str, rows: slice = slice(None), buffer: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The bytes as they lie in the file, uint8 (rows, bytes of a row)."""
        entry = self.entries[key]
        num_rows = entry.shape[0] if len(entry.shape) > 1 else 1
        row_bytes = entry.num_bytes // max(1, num_rows)
        start, stop, _ = rows.indices(num_rows)
        with self.path.open("rb") as file:
            place = entry.offset + start * row_bytes
            data = read_bytes(file, place, (stop - start) * row_bytes, buffer)
        if data is None:
            raise FileError(f"{self.name} was changed on disk since it was opened; start again.")
        return data.reshape(stop - start, -1)

    def release(self) -> None:
        """Nothing is held."""


def describe(tensor) -> GgufEntry:
    # GGUF lists the fastest dimension first.
    shape = tuple(int(side) for side in reversed(tensor.shape.tolist()))
    return GgufEntry(int(tensor.data_offset), int(tensor.n_bytes), int(tensor.tensor_type), shape)


def import_gguf():
    try:
        import gguf
    except ImportError:
        raise ConfigError(
            "GGUF files need the gguf package, which is not installed; run pip install gguf."
        ) from None
    return gguf
