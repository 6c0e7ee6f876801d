"""Attack findings: GGUF headers that keep the gguf package busy for minutes or hours."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from qwen_edit_lora.lora_core import FileError
from qwen_edit_lora.lora_core.base_model.gguf_file import check_header

UINT8, STRING, ARRAY, UINT32 = 0, 8, 9, 4


def pack_text(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def write_header(path: Path, values: bytes, num_values: int, num_tensors: int = 0) -> Path:
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, num_tensors, num_values) + values)
    return path


def make_array(kind: int, count: int, data: bytes) -> bytes:
    return pack_text("a") + struct.pack("<IIQ", ARRAY, kind, count) + data


#: GGUFReader makes Python objects for each entry: 80 us and 0.8 kB measured, so that a file of
#: 16 MB takes 20 minutes and gigabytes. The largest vocabularies have 300,000 entries, and a
#: diffusion model has neither those nor thousands of keys.
HEADERS = {
    "2 million numbers": (make_array(UINT8, 1 << 21, bytes(1 << 21)), 1, 0),
    "2 million texts": (make_array(STRING, 1 << 21, bytes(8 << 21)), 1, 0),
    "half a million keys": (
        b"".join(pack_text(f"k{i}") + struct.pack("<II", UINT32, 1) for i in range(1 << 19)),
        1 << 19,
        0,
    ),
    "half a million tensors": (
        b"".join(pack_text(f"t{i}") + struct.pack("<IQIQ", 1, 1, 0, 0) for i in range(1 << 19)),
        0,
        1 << 19,
    ),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_of_absurdly_many_entries_is_refused_before_the_package_reads_it(tmp_path, name):
    path = write_header(tmp_path / "a.gguf", *HEADERS[name])
    with pytest.raises(FileError, match=r"too (long|many)|more than"):
        check_header(path)
