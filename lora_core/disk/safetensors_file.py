"""Tensors that stay in their file until they are requested."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from ..errors import FileError, MissingFileError, get_reason
from ..messages import message
from ..text import name_path, shorten
from .regular_files import open_regular

# Names of the safetensors format specification, section "Format".
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

#: Endings of a safetensors file's name, in any case; ComfyUI lists both.
SUFFIXES = (".safetensors", ".sft")
#: What messages say was expected at a path.
LORA_FILE, BASE_MODEL = message("a LoRA file"), message("a diffusion model")
PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


class TensorFile(Protocol):
    """What a `StoredTensor` is read from."""

    def read(self, key: str) -> torch.Tensor: ...
    def read_rows(
        self, key: str, rows: slice, buffer: torch.Tensor | None = None
    ) -> torch.Tensor: ...


@dataclass(frozen=True, eq=False, slots=True)
class StoredTensor:
    """One tensor of a file: shape and dtype are known, the data is still on disk."""

    file: TensorFile = field(repr=False)
    key: str
    shape: torch.Size
    dtype: torch.dtype
    first_row: int | None = None
    """Where these rows begin in the tensor of this key; None for all of it."""

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def numel(self) -> int:
        return self.shape.numel()

    def load(self) -> torch.Tensor:
        """Maps the data into memory and returns it as stored, without a copy.

        Raises:
            FileError: the file was deleted or replaced since its header was read.
        """
        if self.first_row is None:
            return self.file.read(self.key)
        return self.file.read_rows(self.key, self._find_rows(slice(None)))

    def _find_rows(self, rows: slice) -> slice:
        """Rows of this part as rows of the whole tensor."""
        first, (start, stop, _) = self.first_row or 0, rows.indices(self.shape[0])
        return slice(first + start, first + stop)

    def take_rows(self, first: int, count: int) -> StoredTensor:
        """Some of the rows, read together with the others and not copied."""
        shape = torch.Size((count, *self.shape[1:]))
        return replace(self, shape=shape, first_row=(self.first_row or 0) + first)

    def load_rows(self, rows: slice, buffer: torch.Tensor | None = None) -> torch.Tensor:
        """Some rows of it.

        Args:
            buffer: bytes to read them into, where the file is read and not mapped; what is
                returned is then a view of them.
        """
        if self.first_row is not None:
            rows = self._find_rows(rows)
        return self.file.read_rows(self.key, rows, buffer)


AnyTensor = torch.Tensor | StoredTensor


def load(tensor: AnyTensor) -> torch.Tensor:
    return tensor.load() if isinstance(tensor, StoredTensor) else tensor


def is_safetensors(name: str) -> bool:
    """By the ending of the name, as every loader lists files."""
    return name.lower().endswith(SUFFIXES)


class SafetensorsFile:
    """A safetensors file whose header has been read and checked.

    The file is memory-mapped when the first tensor is requested. `release` drops the mapping,
    so that a trainer may replace the file on systems which lock mapped files; the next read
    maps it again, and refuses if it is no longer the same file.

    Args:
        expected: what messages say should be there.
    """

    def __init__(self, path: str | os.PathLike[str], expected: str = LORA_FILE):
        self.path = Path(path)
        self._expected = expected
        self._location = os.fspath(self.path)  # for a check at every tensor; a Path is slower
        self._signature = read_signature(self.path, expected)
        self._handle = open_checked(self.path, expected)
        self.metadata: dict[str, str] = dict(self._handle.metadata() or {})
        self.tensors = dict(self._describe())

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def signature(self) -> tuple[int, ...]:
        """Size in bytes, modification time in ns, and inode at the time the header was read."""
        return self._signature

    def _describe(self) -> Iterator[tuple[str, StoredTensor]]:
        for key in self._handle.keys():
            part = self._handle.get_slice(key)
            dtype = DTYPES.get(part.get_dtype())
            if dtype is None:
                raise FileError(
                    "{name}: {key} is stored as {dtype}; expected one of {dtypes}. Save it "
                    "again as bf16, fp16 or fp32.",
                    name=shorten(self.name),
                    key=shorten(key),
                    dtype=part.get_dtype(),
                    dtypes=", ".join(DTYPES),
                )
            yield key, StoredTensor(self, key, torch.Size(part.get_shape()), dtype)

    def read(self, key: str) -> torch.Tensor:
        self.check_unchanged()
        if self._handle is None:
            self._handle = open_checked(self.path, self._expected)
        return self._handle.get_tensor(key)

    def read_rows(self, key: str, rows: slice, buffer: torch.Tensor | None = None) -> torch.Tensor:
        return self.read(key)[rows]

    def check_unchanged(self) -> None:
        """Raises FileError if the file on disk is not the one whose header was read.

        A mapped file that was cut short would otherwise end the whole process with SIGBUS.
        """
        if read_signature(self._location, self._expected) != self._signature:
            raise FileError(
                "{name} was changed on disk since it was opened. Queue the prompt again to read "
                "the new file.",
                name=shorten(self.name),
            )

    def release(self) -> None:
        self._handle = None


class UnmappedFile(SafetensorsFile):
    """The same by ordinary reads: for files that are read once from start to end.

    Pages of a mapped file count as the process's memory, come one fault at a time, and reach a GPU
    by one more copy. Here bytes go from the system's cache straight to their destination.
    """

    def __init__(self, path: str | os.PathLike[str], expected: str = LORA_FILE):
        super().__init__(path, expected)
        super().release()
        self._places = locate_tensors(self.path)
        self._file: io.BufferedReader | None = None

    def read(self, key: str) -> torch.Tensor:
        return self.read_rows(key, slice(None))

    def read_rows(self, key: str, rows: slice, buffer: torch.Tensor | None = None) -> torch.Tensor:
        self.check_unchanged()
        if self._file is None:
            self._file = self.path.open("rb")
        tensor = self.tensors[key]
        if not tensor.ndim:
            rows, shape, row_bytes = slice(0, 1), tensor.shape, tensor.dtype.itemsize
        else:
            rows = slice(*rows.indices(tensor.shape[0])[:2])
            shape = torch.Size((rows.stop - rows.start, *tensor.shape[1:]))
            row_bytes = tensor.shape[1:].numel() * tensor.dtype.itemsize
        start = self._places[key] + rows.start * row_bytes
        data = read_bytes(self._file, start, (rows.stop - rows.start) * row_bytes, buffer)
        if data is None:
            raise FileError(
                "{name} was changed on disk since it was opened; start again.",
                name=shorten(self.name),
            )
        return data.view(tensor.dtype).view(shape)

    def release(self) -> None:
        super().release()
        if self._file is not None:
            self._file.close()
            self._file = None


def locate_tensors(path: Path) -> dict[str, int]:
    """Where the data of each tensor begins, in bytes from the file's start; the header is sound."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    return {key: 8 + size + entry["data_offsets"][0] for key, entry in header.items()}


def read_bytes(
    file: io.BufferedIOBase, start: int, num_bytes: int, buffer: torch.Tensor | None = None
) -> torch.Tensor | None:
    """uint8, in the buffer where it is large enough; None where the file ends before."""
    if buffer is None or len(buffer) < num_bytes:
        buffer = torch.empty(num_bytes, dtype=torch.uint8)
    data = buffer[:num_bytes]
    file.seek(start)
    return data if file.readinto(data.numpy()) == num_bytes else None


def read_signature(path: Path | str, expected: str = LORA_FILE) -> tuple[int, ...]:
    """Size in bytes, modification time in ns, and inode.

    Raises:
        MissingFileError: there is no such path.
        FileError: it cannot be examined.
    """
    try:
        found = os.stat(path)  # noqa: PTH116 - called for every tensor; Path's is slower
    except FileNotFoundError:
        raise MissingFileError(
            "{path} does not exist; expected {expected}. Put it back, or choose another one.",
            path=name_path(path),
            expected=expected,
        ) from None
    except OSError as e:
        raise FileError(
            "{path} cannot be opened: {reason}.", path=name_path(path), reason=get_reason(e)
        ) from None
    except ValueError:  # a null character or half a surrogate pair
        raise FileError(
            "{path!r} is not a file name; expected {expected}.",
            path=name_path(path),
            expected=expected,
        ) from None
    return found.st_size, found.st_mtime_ns, found.st_ino


def open_checked(path: Path, expected: str = LORA_FILE) -> Any:
    """Opens a safetensors file; the error says in one sentence why it is none."""
    name = name_path(path)
    if path.is_dir():
        raise FileError("{name} is a folder; expected a .safetensors file.", name=name)
    with open_regular(path) as file:
        try:
            start = file.read(16)
        except OSError as e:
            raise FileError(
                "{name} cannot be read: {reason}.", name=name, reason=get_reason(e)
            ) from None
        size = os.fstat(file.fileno()).st_size
    if size == 0:
        raise FileError(
            "{name} is empty (0 bytes); expected a safetensors file. Download or copy it again.",
            name=name,
        )
    # The first 8 bytes of safetensors are a size, which may look like a pickle's; then comes "{".
    if start.startswith(PICKLE_STARTS) and start[8:9] != b"{":
        raise FileError(
            "{name} is a PyTorch pickle, despite its name; expected safetensors. Pickles can "
            "run code when opened and are refused: if you trust it, convert it.",
            name=name,
        )
    if start.startswith(b"GGUF"):
        raise FileError(
            "{name} is a GGUF file; expected {expected} in safetensors format.",
            name=name,
            expected=expected,
        )
    header_size = int.from_bytes(start[:8], "little")
    if size < 8 or 8 + header_size > size:
        raise FileError(
            "{name} ends early: {size:,} bytes, but its header alone claims {header_size:,}. It "
            "is truncated or not a safetensors file: download or copy it again.",
            name=name,
            size=size,
            header_size=header_size,
        )
    return map_file(path, name)


def map_file(path: Path, name: str) -> Any:
    """As `open_checked`, for a file whose first bytes may be those of safetensors."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:  # bytes that are not UTF-8, which safetensors cannot open
        raise FileError(
            "{name}: this name, or that of its folder, is not UTF-8 text; rename it.", name=name
        ) from None
    try:
        return safe_open(path, framework="pt", device="cpu")
    except SafetensorError as e:
        reason = message("its header does not match its data")
        if any(mark in str(e) for mark in ("InvalidHeader", "invalid JSON", "invalid UTF-8")):
            reason = message("its header is not readable")
        raise FileError(
            "{name} is damaged: {reason} ({error}). It is truncated or was written wrongly: "
            "download or copy it again.",
            name=name,
            reason=reason,
            error=shorten(str(e)),
        ) from None
    except OSError as e:
        raise FileError(
            "{name} cannot be mapped: {reason}.",
            name=name,
            reason=get_reason(e) if e.strerror else shorten(str(e)),
        ) from None
