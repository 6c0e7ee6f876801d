"""Headers of GGUF files: read as the gguf package reads them, and refused before they cost time."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from qwen_edit_lora.lora_core import FileError
from qwen_edit_lora.lora_core.base_model.gguf_header import GgufHeader, read_header

UINT8, UINT32, FLOAT32, TEXT, ARRAY = 0, 4, 6, 8, 9


def read(path: Path) -> GgufHeader:
    return read_header(path, gguf.GGML_QUANT_SIZES)


def pack_text(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def pack_array(kind: int, count: int, data: bytes, name: str = "a") -> bytes:
    return pack_text(name) + struct.pack("<IIQ", ARRAY, kind, count) + data


def pack_tensor(name: str = "t", *sides: int, kind: int = 0, offset: int = 0) -> bytes:
    head = pack_text(name) + struct.pack(f"<I{len(sides)}Q", len(sides), *sides)
    return head + struct.pack("<IQ", kind, offset)


def write(path: Path, header: bytes, num_keys: int, num_tensors: int = 0, version: int = 3) -> Path:
    counts = struct.pack("<IQQ", version, num_tensors, num_keys)
    path.write_bytes(b"GGUF" + counts + header + bytes(4096))
    return path


@pytest.mark.parametrize("alignment", [None, 16, 32, 256])
def test_every_tensor_is_where_the_gguf_package_finds_it(alignment, tmp_path):
    path = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(path, "qwen_image")
    if alignment:
        writer.add_custom_alignment(alignment)
    writer.add_array("tokenizer.ggml.tokens", ["a", "", "ünï"])
    writer.add_array("comfy.gguf.orig_shape.img_in.weight", [4, 64])
    writer.add_bool("general.flag", True)
    writer.add_float64("general.number", 0.5)
    for kind in ("F32", "F16", "BF16", "Q8_0", "Q4_K", "Q6_K"):
        type_ = gguf.GGMLQuantizationType[kind]
        block, num_bytes = gguf.GGML_QUANT_SIZES[type_]
        for shape in ((256,), (3, 512), (2, 3, 256), (1, 2, 1, 256)):
            codes = np.zeros((*shape[:-1], shape[-1] // block * num_bytes), np.uint8)
            writer.add_tensor(f"{kind}{shape}", codes, raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = read(path)
    assert header.size_bytes == path.stat().st_size
    expected = {
        tensor.name: (tensor.data_offset, tensor.n_bytes, tensor.tensor_type, [*tensor.shape[::-1]])
        for tensor in gguf.GGUFReader(path).tensors
    }
    found = {n: (e.offset, e.num_bytes, e.kind, [*e.shape]) for n, e in header.entries.items()}
    assert found == expected
    assert list(found) == list(expected)


def test_the_vocabulary_of_a_large_language_model_is_read(tmp_path):
    size, merges = 262_144, 514_906
    header = b"".join(
        (
            pack_array(TEXT, size, pack_text("to") * size, "tokens"),
            pack_array(FLOAT32, size, bytes(4 * size), "scores"),
            pack_array(UINT32, size, bytes(4 * size), "types"),
            pack_array(TEXT, merges, pack_text("a b") * merges, "merges"),
        )
    )
    path = write(tmp_path / "a.gguf", header + pack_tensor("t", 2, 3), 4, 1)
    (entry,) = read(path).entries.values()
    assert entry.shape == (3, 2)
    assert entry.offset == -(-(24 + len(header) + len(pack_tensor("t", 2, 3))) // 32) * 32


#: Of a few megabytes. The package's reader makes Python objects of each entry, 80 us and 0.8 kB.
ENDLESS = {
    "numbers": lambda: (pack_array(UINT8, 1 << 21, bytes(1 << 21)), 1, 0, "too long"),
    "texts": lambda: (pack_array(TEXT, 1 << 21, bytes(8 << 21)), 1, 0, "too long"),
    "several arrays": lambda: (pack_array(TEXT, 1 << 18, bytes(8 << 18)) * 8, 8, 0, "too long"),
    "arrays": lambda: (pack_array(ARRAY, 1, bytes(64)), 1, 0, "an array of arrays"),
    "keys": lambda: (
        b"".join(pack_text(f"k{i}") + struct.pack("<II", UINT32, 1) for i in range(1 << 17)),
        1 << 17,
        0,
        "more than 100,000 keys",
    ),
    "tensors": lambda: (pack_tensor("t", 0) * (1 << 17), 0, 1 << 17, "more than 100,000 tensors"),
}


@pytest.mark.parametrize("name", ENDLESS)
def test_a_header_of_absurdly_many_entries_is_refused(tmp_path, name):
    header, num_keys, num_tensors, message = ENDLESS[name]()
    path = write(tmp_path / "a.gguf", header, num_keys, num_tensors)
    with pytest.raises(FileError, match=f"^a.gguf is damaged .*{message}"):
        read(path)


ALIGNMENT = pack_text("general.alignment")
DAMAGED = {
    "too long a name": (pack_tensor("t" * 1025, 1), 0, 1, "a name of 1,025 bytes"),
    "a name that ends early": (struct.pack("<Q", 1 << 60), 1, 0, "a name of 1,152"),
    "no UTF-8": (pack_tensor("t", 1).replace(b"t", b"\xff"), 0, 1, "name is not UTF-8"),
    "one name twice": (pack_tensor("t", 1) * 2, 0, 2, "holds t twice"),
    "an unknown kind": (pack_tensor("t", 1, kind=99), 0, 1, "unknown type 99"),
    "half a block": (pack_tensor("t", 33, kind=8), 0, 1, "no multiple of its blocks of 32"),
    "a block of nothing": (pack_tensor("t", kind=8), 0, 1, "no multiple of its blocks of 32"),
    "a huge empty tensor": (pack_tensor("t", 1 << 63, 0), 0, 1, "larger than the file"),
    "no alignment": (ALIGNMENT + struct.pack("<II", UINT32, 0), 1, 0, "not a power of two"),
    "an odd alignment": (ALIGNMENT + struct.pack("<II", UINT32, 24), 1, 0, "not a power of two"),
    "a text as alignment": (ALIGNMENT + struct.pack("<I", TEXT) + pack_text("32"), 1, 0, "power"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_header_is_refused_with_its_fault(tmp_path, name):
    header, num_keys, num_tensors, message = DAMAGED[name]
    path = write(tmp_path / "a.gguf", header, num_keys, num_tensors)
    with pytest.raises(FileError, match=f"^a.gguf is damaged .*{message}"):
        read(path)


@pytest.mark.parametrize("version", [1, 4])
def test_a_version_that_is_not_known_is_refused(tmp_path, version):
    path = write(tmp_path / "a.gguf", b"", 0, version=version)
    with pytest.raises(FileError, match=f"version {version}; expected 2 or 3"):
        read(path)


def test_a_file_that_is_no_gguf_is_refused(tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(b"GGML" + bytes(64))
    with pytest.raises(FileError, match="does not begin with GGUF"):
        read(path)
