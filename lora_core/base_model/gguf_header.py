"""The header of a GGUF file: where each tensor is. By the GGUF specification, versions 2 and 3.

The gguf package's reader makes Python objects of every number in the header, 80 us each, and trusts
every length; a file of some megabytes would keep it busy for hours.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from ..disk.regular_files import open_regular
from ..errors import FileError
from ..messages import message
from ..text import shorten

MAGIC = b"GGUF"
VERSIONS = (2, 3)
#: Sizes of a header's numbers by their type.
NUMBER_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
UINT32, TEXT, ARRAY = 4, 8, 9
ALIGNMENT_KEY, DEFAULT_ALIGNMENT = b"general.alignment", 32
MAX_DIMENSIONS = 4
#: Largest language models: some hundred keys, some thousand tensors.
MAX_KEYS = MAX_TENSORS = 100_000
#: Numbers and texts in all arrays together. A vocabulary of 262,144 texts comes with a score and a
#: type for each, and some 515,000 merges.
MAX_ARRAY_ENTRIES = 2_000_000
MAX_NAME_BYTES = 1024  # ggml itself takes 64
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


@dataclass(frozen=True)
class GgufHeader:
    size_bytes: int
    """Of the file."""
    entries: dict[str, GgufEntry]
    """By name."""


def read_header(path: Path, block_sizes: Mapping[int, tuple[int, int]]) -> GgufHeader:
    """Reads a GGUF's header, and checks that what it declares fits into the file.

    Args:
        block_sizes: kind -> numbers of a block, and its bytes (gguf.GGML_QUANT_SIZES).

    Raises:
        FileError: it is damaged, holds more than any model, or has the other byte order.
    """
    with open_regular(path) as file:
        size = file.seek(0, 2)
        file.seek(0)
        walk = HeaderWalk(path, file, size)
        if file.read(len(MAGIC)) != MAGIC:
            raise refuse(path, message("it does not begin with GGUF"))
        version = walk.read("I")
        if not version & 0xFFFF:
            raise refuse(path, message("its numbers are big-endian, which is not supported"))
        if version not in VERSIONS:
            raise refuse(
                path, message("it is of version {version}; expected 2 or 3", version=version)
            )
        num_tensors, num_keys = walk.read("Q"), walk.read("Q")
        for number, limit, what in (
            (num_tensors, MAX_TENSORS, message("tensors")),
            (num_keys, MAX_KEYS, message("keys")),
        ):
            if number > limit:
                raise refuse(
                    path,
                    message("its header holds more than {limit:,} {what}", limit=limit, what=what),
                )
        alignment = DEFAULT_ALIGNMENT
        for _ in range(num_keys):
            alignment = walk.skip_key() or alignment
        entries: dict[str, GgufEntry] = {}
        for _ in range(num_tensors):
            name, entry = walk.read_entry(block_sizes)
            if name in entries:
                raise refuse(path, message("it holds {name} twice", name=shorten(name)))
            entries[name] = entry
        start = -(-file.tell() // alignment) * alignment
    moved = {name: replace(entry, offset=start + entry.offset) for name, entry in entries.items()}
    return GgufHeader(size, moved)


def refuse(path: Path, reason: str) -> FileError:
    return FileError(
        "{path} is damaged ({reason}): it is truncated or was written wrongly. Download or copy "
        "it again.",
        path=shorten(path.name),
        reason=reason,
    )


class HeaderWalk:
    """A place in a GGUF's header that only moves forward, and never past the end.

    Raises:
        FileError: from every method, where the file ends before.
    """

    def __init__(self, path: Path, file: BinaryIO, size: int):
        self.path = path
        self.file = file
        self.size = size
        self._num_array_entries = 0

    def read(self, kind: str) -> int:
        data = self.file.read(struct.calcsize(f"<{kind}"))
        if len(data) < struct.calcsize(f"<{kind}"):
            raise refuse(self.path, message("its header ends early"))
        return struct.unpack(f"<{kind}", data)[0]

    def skip(self, num_bytes: int) -> None:
        if self.file.tell() + num_bytes > self.size:
            raise refuse(self.path, message("its header ends early"))
        self.file.seek(num_bytes, 1)

    def skip_text(self) -> None:
        self.skip(self.read("Q"))

    def read_name(self) -> bytes:
        num_bytes = self.read("Q")
        if num_bytes > MAX_NAME_BYTES:
            raise refuse(
                self.path,
                message("its header holds a name of {num_bytes:,} bytes", num_bytes=num_bytes),
            )
        name = self.file.read(num_bytes)
        if len(name) < num_bytes:
            raise refuse(self.path, message("its header ends early"))
        return name

    def skip_key(self) -> int | None:
        """Moves behind one key and its value; the value of that for the alignment."""
        name, kind = self.read_name(), self.read("I")
        if name != ALIGNMENT_KEY:
            self.skip_value(kind)
            return None
        alignment = self.read("I") if kind == UINT32 else 0
        if alignment.bit_count() != 1:
            raise refuse(self.path, message("its alignment is not a power of two"))
        return alignment

    def skip_value(self, kind: int) -> None:
        if kind == TEXT:
            self.skip_text()
        elif kind == ARRAY:
            self.skip_array()
        elif kind in NUMBER_BYTES:
            self.skip(NUMBER_BYTES[kind])
        else:
            raise refuse(
                self.path, message("its header holds a value of the unknown type {kind}", kind=kind)
            )

    def skip_array(self) -> None:
        kind, count = self.read("I"), self.read("Q")
        self._num_array_entries += count
        if kind == ARRAY or self._num_array_entries > MAX_ARRAY_ENTRIES:
            raise refuse(
                self.path,
                message("its header holds an array of arrays, or an array that is too long"),
            )
        if kind in NUMBER_BYTES:
            self.skip(count * NUMBER_BYTES[kind])
        else:
            for _ in range(count):
                self.skip_value(kind)

    def read_entry(self, block_sizes: Mapping[int, tuple[int, int]]) -> tuple[str, GgufEntry]:
        """Name and place of one tensor, its offset as stored: from where the data begins."""
        try:
            name = self.read_name().decode()
        except UnicodeDecodeError:
            raise refuse(self.path, message("a tensor's name is not UTF-8")) from None
        num_dimensions = self.read("I")
        if num_dimensions > MAX_DIMENSIONS:
            raise refuse(
                self.path,
                message("a tensor has {num_dimensions} dimensions", num_dimensions=num_dimensions),
            )
        sides = [self.read("Q") for _ in range(num_dimensions)]  # the fastest first
        number = math.prod(sides)
        if max([number, *sides]) > self.size * MAX_ENTRIES_PER_BYTE:
            raise refuse(self.path, message("a tensor is larger than the file"))
        kind, offset = self.read("I"), self.read("Q")
        if kind not in block_sizes:
            raise refuse(self.path, message("a tensor is of the unknown type {kind}", kind=kind))
        block, block_bytes = block_sizes[kind]
        if (sides or [1])[0] % block:
            raise refuse(
                self.path,
                message("a tensor's rows are no multiple of its blocks of {block}", block=block),
            )
        if offset > self.size:
            raise refuse(self.path, message("a tensor begins after the file's end"))
        num_bytes = number // block * block_bytes
        return name, GgufEntry(offset, num_bytes, kind, tuple(reversed(sides)))
