"""Attack findings: images of training pairs that are read as something else than ComfyUI shows."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps
from qwen_edit_lora.lora_core.pairs.images import FileImage

ORIENTATION = 0x0112


def make_photograph() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 10, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("suffix", ["tif", "png", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_of_any_orientation_is_read_as_load_image_reads_it(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = tmp_path / f"a.{suffix}"
    options = {"lossless": True} if suffix == "webp" else {}
    make_photograph().save(path, exif=exif, **options)
    with Image.open(path) as image:  # as ComfyUI's LoadImage does
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    found = FileImage(path)
    header = found.read_header()
    assert (header.height, header.width) == expected.shape[:2]
    assert np.array_equal((found.read() * 255).round().astype(np.uint8), expected)
    assert np.array_equal(found.read_small(10), expected)


def build_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def write_grey_with_transparent_value(path: Path, bits: int) -> None:
    """2 x 1 pixels, 0 and 10; the value 10 is transparent (PNG specification, tRNS)."""
    code = ">H" if bits == 16 else ">B"
    header = struct.pack(">IIBBBBB", 2, 1, bits, 0, 0, 0, 0)
    rows = b"\0" + struct.pack(code, 0) + struct.pack(code, 10)
    file = io.BytesIO()
    file.write(b"\x89PNG\r\n\x1a\n" + build_chunk(b"IHDR", header))
    file.write(build_chunk(b"tRNS", struct.pack(">H", 10)))
    file.write(build_chunk(b"IDAT", zlib.compress(rows)) + build_chunk(b"IEND", b""))
    path.write_bytes(file.getvalue())


@pytest.mark.parametrize("bits", [8, 16])
def test_the_transparent_value_of_a_grey_image_becomes_white(tmp_path, bits):
    path = tmp_path / "a.png"
    write_grey_with_transparent_value(path, bits)
    assert "transparent" in FileImage(path).read_header().traits
    assert FileImage(path).read()[0, :, 0].tolist() == [0.0, 1.0]
