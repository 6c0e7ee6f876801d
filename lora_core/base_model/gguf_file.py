"""GGUF files, one tensor at a time; the gguf package knows the format and its codes."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from ..disk.regular_files import open_regular
from ..disk.safetensors_file import StoredTensor, read_bytes
from ..errors import ConfigError, FileError
from ..text import shorten

#: Sizes of a header's numbers by their type; from the GGUF specification, as all below.
NUMBER_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
TEXT, ARRAY = 8, 9
MAX_DIMENSIONS = 4
#: Numbers of a key's value; a language model's vocabulary has some hundred thousand.
MAX_ARRAY = 1 << 24
#: Entries that a byte of data may hold: no code takes fewer than 1.5 bits.
MAX_ENTRIES_PER_BYTE = 6


@dataclass(frozen=True)
class GgufEntry:
    """Where one tensor's data is."""

    offset: int
    num_bytes: int
    kind: int
    """gguf.GGMLQuantizationType."""
    shape: tuple[int, ...]


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
        size = check_header(path)
        try:
            reader = gguf.GGUFReader(path)
            self.entries = {tensor.name: describe(tensor) for tensor in reader.tensors}
        except (ValueError, KeyError, IndexError, OSError, OverflowError, TypeError) as e:
            raise refuse(path, shorten(str(e))) from None
        #: Key -> how it is stored, of those that are not plain numbers.
        self.storages = {
            key: f"GGUF {gguf.GGMLQuantizationType(entry.kind).name}"
            for key, entry in self.entries.items()
            if entry.kind not in (gguf.GGMLQuantizationType.F32, *plain_kinds(gguf))
        }
        end = max((e.offset + e.num_bytes for e in self.entries.values()), default=0)
        if end > size:
            raise FileError(
                f"{shorten(self.name)} ends early: {size:,} bytes, but its header promises "
                f"{end:,}. Download or copy it again."
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
                f"{shorten(self.name)} stores {shorten(key)} as {kind.name}, which the gguf "
                "package cannot read; choose a file with another quantisation, e.g. Q8_0 or Q4_K_M."
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
                f"{shorten(self.name)} was changed on disk since it was opened; start again."
            )
        return data.reshape(stop - start, row_bytes)

    def release(self) -> None:
        """Nothing is held open."""


def describe(tensor) -> GgufEntry:
    # GGUF lists the fastest dimension first.
    shape = tuple(int(side) for side in reversed(tensor.shape.tolist()))
    return GgufEntry(int(tensor.data_offset), int(tensor.n_bytes), int(tensor.tensor_type), shape)


def plain_kinds(gguf) -> dict[int, torch.dtype]:
    """Types of half precision, whose bytes need no decoding."""
    return {
        int(gguf.GGMLQuantizationType.F16): torch.float16,
        int(gguf.GGMLQuantizationType.BF16): torch.bfloat16,
    }


def refuse(path: Path, reason: str) -> FileError:
    return FileError(
        f"{shorten(path.name)} is damaged ({reason}): it is truncated or was written wrongly. "
        "Download or copy it again."
    )


def check_header(path: Path) -> int:
    """Walks over a GGUF's header, to check that what it declares fits into the file.

    The package trusts every length: an array that claims 2^60 numbers keeps it busy forever.

    Returns:
        The file's size in bytes.

    Raises:
        FileError: it is damaged, or has the other byte order.
    """
    with open_regular(path) as file:
        size = file.seek(0, 2)
        file.seek(4)
        walk = HeaderWalk(path, file, size)
        version = walk.read("I")
        if not version & 0xFFFF:
            raise refuse(path, "its numbers are big-endian, which is not supported")
        num_tensors, num_values = walk.read("Q"), walk.read("Q")
        for _ in range(num_values):
            walk.skip_text()
            walk.skip_value(walk.read("I"))
        for _ in range(num_tensors):
            walk.skip_tensor()
    return size


class HeaderWalk:
    """A place in a GGUF's header that only moves forward, and never past the end.

    Raises:
        FileError: from every method, where the file ends before.
    """

    def __init__(self, path: Path, file: BinaryIO, size: int):
        self.path = path
        self.file = file
        self.size = size

    def read(self, kind: str) -> int:
        data = self.file.read(struct.calcsize(f"<{kind}"))
        if len(data) < struct.calcsize(f"<{kind}"):
            raise refuse(self.path, "its header ends early")
        return struct.unpack(f"<{kind}", data)[0]

    def skip(self, num_bytes: int) -> None:
        if self.file.tell() + num_bytes > self.size:
            raise refuse(self.path, "its header ends early")
        self.file.seek(num_bytes, 1)

    def skip_text(self) -> None:
        self.skip(self.read("Q"))

    def skip_value(self, kind: int) -> None:
        if kind == TEXT:
            self.skip_text()
        elif kind == ARRAY:
            inner, count = self.read("I"), self.read("Q")
            if inner == ARRAY or count > MAX_ARRAY:
                raise refuse(
                    self.path, ("its header holds an array of arrays, or an array that is too long")
                )
            if inner in NUMBER_BYTES:
                self.skip(count * NUMBER_BYTES[inner])
            else:
                for _ in range(count):
                    self.skip_value(inner)
        elif kind in NUMBER_BYTES:
            self.skip(NUMBER_BYTES[kind])
        else:
            raise refuse(self.path, f"its header holds a value of the unknown type {kind}")

    def skip_tensor(self) -> None:
        self.skip_text()
        num_dimensions = self.read("I")
        if num_dimensions > MAX_DIMENSIONS:
            raise refuse(self.path, f"a tensor has {num_dimensions} dimensions")
        sides = [self.read("Q") for _ in range(num_dimensions)]
        if math.prod(sides) > self.size * MAX_ENTRIES_PER_BYTE:
            raise refuse(self.path, "a tensor is larger than the file")
        self.skip(4)  # its type
        if self.read("Q") > self.size:
            raise refuse(self.path, "a tensor begins after the file's end")


def import_gguf():
    try:
        import gguf
    except ImportError:
        raise ConfigError(
            "GGUF files need the gguf package, which is not installed; run pip install gguf."
        ) from None
    return gguf
