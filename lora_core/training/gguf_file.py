"""GGUF files, one tensor at a time; the gguf package knows the format and its codes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import ConfigError, FileError
from ..stored import StoredTensor, shorten


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
        gguf = import_gguf()
        entry = self.entries[key]
        codes = self.read_codes(key).numpy()
        dtype = self.tensors[key].dtype
        if dtype != torch.float32:
            return torch.from_numpy(codes).view(dtype).reshape(entry.shape)
        kind = gguf.GGMLQuantizationType(entry.kind)
        try:
            values = gguf.quants.dequantize(codes, kind)
        except NotImplementedError:
            raise FileError(
                f"{self.name} stores {key} as {kind.name}, which the gguf package cannot read; "
                "choose a file with another quantisation, e.g. Q8_0 or Q4_K_M."
            ) from None
        return torch.from_numpy(values).reshape(entry.shape)

    def read_codes(self, key: str) -> torch.Tensor:
        """The bytes as they lie in the file, uint8 (rows, bytes of a row)."""
        entry = self.entries[key]
        data = bytearray(entry.num_bytes)
        with self.path.open("rb") as file:
            file.seek(entry.offset)
            num_read = file.readinto(data)
        if num_read != entry.num_bytes:
            raise FileError(f"{self.name} was changed on disk since it was opened; start again.")
        codes = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0).byte()
        return codes.reshape(entry.shape[0] if len(entry.shape) > 1 else 1, -1)

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
