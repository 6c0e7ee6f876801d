"""Untrusted images: what they may start, how much memory they may use, what is refused."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from demo_base.pair_folders import load_photograph, write_pairs, write_picture
from PIL import Image, ImageOps
from qwen_edit_lora.lora_core import ConfigError, FileError
from qwen_edit_lora.lora_core.pairs import images
from qwen_edit_lora.lora_core.pairs.facts import have_same_pixels
from qwen_edit_lora.lora_core.pairs.images import FileImage
from qwen_edit_lora.lora_core.pairs.layouts import find_pairs
from qwen_edit_lora.lora_core.pairs.pair import Level
from qwen_edit_lora.lora_core.pairs.preflight import check_pairs
from qwen_edit_lora.lora_core.pairs.sizes import choose_size

EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 8 8
%%EndComments
showpage
%%EOF
"""


@pytest.mark.skipif(os.name == "nt", reason="a stand-in for Ghostscript is a shell script")
def test_an_image_starts_no_program(tmp_path, monkeypatch):
    started = tmp_path / "started"
    program = tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {started}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    path = tmp_path / "a.png"
    path.write_bytes(EPS)
    for read in (FileImage(path).read, lambda: FileImage(path).read_small(64)):
        with pytest.raises(FileError, match=r"^a.png is not a readable image"):
            read()
    assert not started.exists()


def test_only_the_formats_named_in_messages_are_opened(tmp_path):
    image = load_photograph(0)
    for suffix in ("png", "jpg", "webp", "bmp", "tif", "gif"):
        FileImage(write_picture(image, tmp_path / f"a.{suffix}")).read()
    for kind in ("PPM", "TGA", "ICO", "JPEG2000", "PCX", "DDS"):
        path = tmp_path / "a.png"
        image.save(path, format=kind)
        with pytest.raises(FileError, match="is not a readable image"):
            FileImage(path).read()


MEASURE = """
import resource, sys
from pathlib import Path
import importlib.util
spec = importlib.util.spec_from_file_location(
    "qwen_edit_lora", Path(sys.argv[1], "__init__.py"), submodule_search_locations=[sys.argv[1]])
sys.modules["qwen_edit_lora"] = importlib.util.module_from_spec(spec)
from qwen_edit_lora.lora_core.pairs.images import FileImage
from qwen_edit_lora.lora_core.pairs.preflight import measure_brightness
small, large = FileImage(Path(sys.argv[2])), FileImage(Path(sys.argv[3]))
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
small.read_small(256), measure_brightness(small)
before = peak()
large.read_small(256), measure_brightness(large)
print((peak() - before) * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak's unit is that of Linux")
def test_reading_an_image_takes_the_memory_of_one_decoded_copy(tmp_path):
    side = 9400
    large = tmp_path / "large.png"
    Image.new("1", (side, side)).save(large)
    assert large.stat().st_size < 20_000
    small = write_picture(load_photograph(0), tmp_path / "small.png")
    root = Path(images.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(root), str(small), str(large)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) < 3 * side * side  # one byte per pixel decoded; it was 40


MODES = ("RGB", "RGBA", "L", "LA", "1", "P", "CMYK", "I;16")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("orientation", [1, 6])
def test_reading_in_bands_changes_no_bit(mode, orientation, tmp_path, monkeypatch):
    image = load_photograph(0, 90, 70)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    elif mode in ("RGBA", "LA"):
        image.putalpha(load_photograph(1, 90, 70).convert("L"))
        image = image.convert(mode)
    else:
        image = image.convert(mode)
    exif = Image.Exif()
    exif[0x0112] = orientation
    suffix = "tif" if mode == "CMYK" else "png"
    picture = FileImage(write_picture(image, tmp_path / f"a.{suffix}", exif=exif))
    whole = [picture.read(), picture.read_small(32), picture.read_small(500)]
    monkeypatch.setattr(images, "BAND_PIXELS", 7 * 90)
    bands = [picture.read(), picture.read_small(32), picture.read_small(500)]
    for a, b in zip(whole, bands, strict=True):
        assert np.array_equal(a, b)
    assert np.array_equal(np.concatenate(list(picture.read_bands())), whole[0])
    # As implemented before bands were introduced.
    expected = Image.fromarray((whole[0] * 255).round().astype(np.uint8))
    size = tuple(max(1, round(length * 32 / max(expected.size))) for length in expected.size)
    assert np.array_equal(
        np.asarray(expected.resize(size, Image.Resampling.BOX)), picture.read_small(32)
    )


def test_images_of_several_bands_are_compared_to_the_last_pixel(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "BAND_PIXELS", 500)
    image = load_photograph(0)
    a = FileImage(write_picture(image, tmp_path / "a.png"))
    b = FileImage(write_picture(image, tmp_path / "b.png", compress_level=1))
    assert have_same_pixels(a, b)
    image.putpixel((95, 63), (1, 2, 3))
    assert not have_same_pixels(a, FileImage(write_picture(image, tmp_path / "c.png")))
    other = write_picture(image.crop((0, 0, 96, 63)), tmp_path / "d.png")
    assert not have_same_pixels(a, FileImage(other))


def test_pixels_of_32_bits_are_refused(tmp_path):
    path = tmp_path / "a.tif"
    values = np.linspace(0, 2**31 - 1, 64, dtype=np.int32).reshape(8, 8)
    Image.fromarray(values).save(path)
    with pytest.raises(FileError, match=r"32-bit whole numbers, expected 8 or 16 bits"):
        FileImage(path).read()
    with pytest.raises(FileError, match=r"32-bit whole numbers, expected 8 or 16 bits"):
        FileImage(path).read_small(64)
    Image.fromarray(values.clip(0, 65535)).save(path)
    assert FileImage(path).read().max() == 1


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes on this system")
@pytest.mark.parametrize(
    "place", ["target/photo_0.png", "control/photo_0.png", "mask/photo_0.png", "target/photo_0.txt"]
)
def test_a_pipe_in_place_of_a_file_is_a_clear_error(place, tmp_path):
    folder = write_pairs(tmp_path / "set", 2)
    path = folder / place
    path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    os.mkfifo(path)
    found = find_pairs(folder, lambda path: True)
    preflight = check_pairs(found, name="set", megapixels=0.01, max_references=3)
    (stop,) = preflight.stops
    assert "is a pipe, socket or device; expected a regular file" in stop.text
    with pytest.raises(FileError, match="is a pipe"):
        FileImage(path).compute_digest()
    assert [one.pair.name for one in preflight.pairs] == ["photo_1"]
    assert stop.level == Level.STOP


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0, 1e300, "1"])
def test_an_area_that_is_not_a_number_is_refused(value, tmp_path):
    with pytest.raises(ConfigError, match="expected a number above 0 and up to 64"):
        choose_size(64, 64, value, 16)
    found = find_pairs(write_pairs(tmp_path / "set", 2), lambda path: True)
    with pytest.raises(ConfigError, match=r"^megapixels is "):
        check_pairs(found, name="set", megapixels=value, max_references=3)


SAVED = {
    "tif": {},
    "tif, compressed": {"compression": "tiff_lzw"},
    "png": {},
    "webp": {"lossless": True},
    "jpg": {},
}


@pytest.mark.parametrize("kind", SAVED)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_of_any_orientation_is_turned_upright_exactly_once(tmp_path, orientation, kind):
    """Pillow turns a TIFF itself while decoding it. ComfyUI's LoadImage has the same sizes, and the
    same pixels for what cameras write (1, 3, 6, 8); it does not mirror the others."""
    exif = Image.Exif()
    exif[images.ORIENTATION] = orientation
    path = tmp_path / f"a.{kind.split(',')[0]}"
    load_photograph(0, 60, 40).save(path, exif=exif, **SAVED[kind])
    with Image.open(path) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    picture = FileImage(path)
    header = picture.read_header()
    assert (header.height, header.width) == expected.shape[:2]
    assert ("turned by EXIF" in header.traits) == (orientation > 1)
    assert np.array_equal((picture.read() * 255).round().astype(np.uint8), expected)
    assert np.array_equal(picture.read_small(60), expected)


def build_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


GREY, RGB = 0, 2  # PNG's colour types
#: Bits, colour type, two pixels as stored, and the value that is transparent: the second pixel's.
TRANSPARENT = {
    "grey of 1 bit": (1, GREY, bytes([0b01000000]), [1]),
    "grey of 2 bits": (2, GREY, bytes([0b00010000]), [1]),
    "grey of 4 bits": (4, GREY, bytes([0x0A]), [10]),
    "grey of 8 bits": (8, GREY, bytes([0, 10]), [10]),
    "grey of 16 bits": (16, GREY, struct.pack(">2H", 0, 10), [10]),
    "colour of 8 bits": (8, RGB, bytes([0, 0, 0, 1, 2, 3]), [1, 2, 3]),
    "colour of 16 bits": (16, RGB, struct.pack(">6H", 0, 0, 0, 258, 515, 772), [258, 515, 772]),
}


@pytest.mark.parametrize("kind", TRANSPARENT)
def test_the_value_that_a_png_declares_transparent_becomes_white(tmp_path, kind):
    """PNG specification, tRNS: one grey or colour, in the file's own units."""
    bits, colour, pixels, value = TRANSPARENT[kind]
    file = io.BytesIO(b"\x89PNG\r\n\x1a\n")
    file.seek(0, 2)
    file.write(build_chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, bits, colour, 0, 0, 0)))
    file.write(build_chunk(b"tRNS", struct.pack(f">{len(value)}H", *value)))
    file.write(build_chunk(b"IDAT", zlib.compress(b"\0" + pixels)) + build_chunk(b"IEND", b""))
    path = tmp_path / "a.png"
    path.write_bytes(file.getvalue())
    picture = FileImage(path)
    assert "transparent" in picture.read_header().traits
    assert picture.read().tolist() == [[[0.0] * 3, [1.0] * 3]]
    assert picture.read_small(2).tolist() == [[[0] * 3, [255] * 3]]
