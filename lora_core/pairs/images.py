"""Reading images of every kind that users have, one at a time."""

from __future__ import annotations

import functools
import hashlib
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

from ..disk.regular_files import open_regular
from ..errors import FileError, get_reason
from ..messages import message
from ..text import shorten

SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif", ".jfif"}
)
#: By Pillow's names. Some of its other readers start programs, such as Ghostscript for EPS.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "TIFF", "GIF", "AVIF")
MAX_SIDE_PX = 16_384  # ComfyUI's own MAX_RESOLUTION
MAX_PIXELS = 89_478_485  # where Pillow begins to warn of decompression bombs
IMAGE_WIDTH, IMAGE_HEIGHT, ORIENTATION = 0x0100, 0x0101, 0x0112  # TIFF's tags, and EXIF's
MODES_16_BIT = ("I;16", "I;16L", "I;16B", "I;16N", "I")
MAX_16_BIT = 65_535
#: EXIF orientation -> the transform that turns the image upright.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
HASH_CHUNK_BYTES = 1 << 20
#: Of an image, converted at a time; all at once would need many times the file's own memory.
BAND_PIXELS = 1 << 20


@dataclass(frozen=True)
class FileImage:
    """An image in a file."""

    path: Path
    label: str = ""
    """Its path inside the set's folder: target and reference often have one file name."""
    real: Path | None = None
    """The path without links that was judged allowed, and is opened without following any."""

    @property
    def name(self) -> str:
        return self.label or self.path.name

    def read(self) -> np.ndarray:
        """float32 (height, width, 3) in [0, 1]: turned upright, transparency over white.

        Raises:
            FileError: not an image, damaged, or too large; the text names the file.
        """
        with self._decode() as image:
            upright = turn_upright(image)
            pixels = np.empty((upright.height, upright.width, 3), np.float32)
            for top, band in split_image(upright):
                pixels[top : top + band.height] = convert(band)
            return pixels

    def read_bands(self) -> Iterator[np.ndarray]:
        """`read` piece by piece: float32 (rows, width, 3), from the top."""
        with self._decode() as image:
            for _, band in split_image(turn_upright(image)):
                yield convert(band)

    def read_small(self, side_px: int) -> np.ndarray:
        """uint8 (height, width, 3), about as large as asked for; JPEGs are decoded at that size.

        Apart from the decoded file, memory depends on `side_px`, not on the image.
        """
        with self._decode() as image:
            image.draft(None, (side_px, side_px))
            upright = turn_upright(image)
            bands = ((top, convert_to_bytes(band)) for top, band in split_image(upright))
            return shrink(bands, upright.size, side_px)

    def compute_digest(self) -> str:
        """Of the file's bytes, whether or not they are an image.

        Raises:
            FileError: the file cannot be opened.
        """
        digest = hashlib.blake2b(digest_size=20)
        try:
            with self._open() as file:
                while chunk := file.read(HASH_CHUNK_BYTES):
                    digest.update(chunk)
        except OSError as e:
            raise FileError(
                "{name} cannot be read: {reason}.", name=shorten(self.name), reason=get_reason(e)
            ) from None
        return digest.hexdigest()

    def _open(self) -> BinaryIO:
        return open_regular(self.real or self.path, self.name, follow_links=self.real is None)

    def _decode(self) -> AbstractContextManager[Image.Image]:
        return open_image(self._open(), self.name)

    def read_header(self) -> Header:
        """What is known without decoding.

        Raises:
            FileError: as `read`.
        """
        with self._decode() as image:
            width, height = find_upright_size(image)
            orientation = image.getexif().get(ORIENTATION)
            frames = getattr(image, "n_frames", 1)
            pages = message("pages") if image.format == "TIFF" else message("frames")
            first_used = message("{frames} {pages}, the first is used", frames=frames, pages=pages)
            traits = {
                "CMYK": image.mode == "CMYK",
                message("16-bit"): image.mode in MODES_16_BIT,
                first_used: frames > 1,
                message("turned by EXIF"): orientation in TURNS,
                message("transparent"): has_alpha(image),
            }
        return Header(width, height, tuple(name for name, holds in traits.items() if holds))


@dataclass(frozen=True, eq=False)
class ArrayImage:
    """An image from the graph."""

    name: str
    pixels: np.ndarray = field(repr=False)
    """float32 (height, width, 3) in [0, 1]."""

    def read(self) -> np.ndarray:
        return self.pixels

    def read_bands(self) -> Iterator[np.ndarray]:
        for rows in slice_rows(*self.pixels.shape[:2]):
            yield self.pixels[rows]

    def read_small(self, side_px: int) -> np.ndarray:
        height, width = self.pixels.shape[:2]
        bands = (
            (rows.start, Image.fromarray(round_to_bytes(self.pixels[rows])))
            for rows in slice_rows(height, width)
        )
        return shrink(bands, (width, height), side_px)

    def compute_digest(self) -> str:
        digest = hashlib.blake2b(repr(self.pixels.shape).encode(), digest_size=20)
        digest.update(np.ascontiguousarray(self.pixels).tobytes())
        return digest.hexdigest()

    def read_header(self) -> Header:
        """FileError for one too large, as a file would be."""
        height, width = self.pixels.shape[:2]
        check_size(self.name, width, height)
        return Header(width, height, ())


ImageSource = FileImage | ArrayImage


@dataclass(frozen=True)
class Header:
    width: int
    """In pixels, turned upright."""
    height: int
    traits: tuple[str, ...]
    """What is unusual about the file: "CMYK", "16-bit", "turned by EXIF", ..."""


@contextmanager
def open_image(file: BinaryIO, name: str) -> Iterator[Image.Image]:
    """A Pillow image of an acceptable size; any error inside becomes a one-sentence FileError.

    Args:
        file: closed at the end.
    """
    name = shorten(name)
    with file:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of odd metadata; too many pixels: see below
                with Image.open(file, formats=list_formats()) as image:
                    check_size(name, *image.size)
                    scale_transparent_value(image)
                    yield image
        except FileError:
            raise
        except Image.DecompressionBombError:
            raise FileError(
                "{name} is larger than {max_pixels} million pixels; expected at most "
                "{max_side_px:,} px a side. Scale it down: training uses about one million.",
                name=name,
                max_pixels=MAX_PIXELS // 10**6,
                max_side_px=MAX_SIDE_PX,
            ) from None
        except Image.UnidentifiedImageError:
            what = message("not a readable image") if file.seek(0, 2) else message("an empty file")
            raise FileError(
                "{name} is {what}; expected a PNG, JPEG, WebP, BMP, TIFF, GIF or AVIF of 8 or "
                "16 bits. Save it again, or remove it.",
                name=name,
                what=what,
            ) from None
        except Exception as e:  # noqa: BLE001 - Pillow raises nearly anything on damaged files
            reason = getattr(e, "strerror", None) or str(e) or type(e).__name__
            raise FileError(
                "{name} cannot be read ({reason}); save it again, or remove it.",
                name=name,
                reason=shorten(reason),
            ) from None


@functools.cache
def list_formats() -> tuple[str, ...]:
    """Those of FORMATS that this Pillow has; AVIF came with 11.3."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def check_size(name: str, width: int, height: int) -> None:
    if max(width, height) > MAX_SIDE_PX or width * height > MAX_PIXELS:
        raise FileError(
            "{name} is {width:,} x {height:,} px; expected at most {max_side_px:,} px a side "
            "and {max_pixels} million in all. Scale it down: training uses about one million.",
            name=name,
            width=width,
            height=height,
            max_side_px=MAX_SIDE_PX,
            max_pixels=MAX_PIXELS // 10**6,
        )


def has_alpha(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


def scale_transparent_value(image: Image.Image) -> None:
    """Brings the one grey or colour that a PNG declares transparent to the units of its pixels.

    Pillow widens 2 and 4 bits, and narrows colours of 16, but leaves that value as in the file.
    """
    value = image.info.get("transparency")
    tiles = getattr(image, "tile", None)  # of a file that is not decoded yet
    if image.format != "PNG" or value is None or not tiles:
        return
    raw = tiles[0][3]
    if raw in ("L;2", "L;4"):
        most = 2 ** int(raw[-1]) - 1
        image.info["transparency"] = (value & most) * 255 // most
    elif raw == "RGB;16B":
        image.info["transparency"] = tuple(part >> 8 for part in value)


def turn_upright(image: Image.Image) -> Image.Image:
    """Decodes the image and turns it as its EXIF says.

    In this order, as ImageOps.exif_transpose does: Pillow turns a TIFF itself while it decodes, and
    then no longer has an orientation.
    """
    image.load()
    turn = TURNS.get(image.getexif().get(ORIENTATION, 0))
    return image if turn is None else image.transpose(turn)


def find_upright_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) of `turn_upright(image)`, without decoding."""
    width, height = image.size
    if image.format == "TIFF":  # whose `size` is turned or not, depending on Pillow's version
        tags = cast(TiffImageFile, image).tag_v2
        width, height = tags[IMAGE_WIDTH], tags[IMAGE_HEIGHT]
    is_on_its_side = image.getexif().get(ORIENTATION) in (5, 6, 7, 8)
    return (height, width) if is_on_its_side else (width, height)


def slice_rows(height: int, width: int) -> Iterator[slice]:
    """Rows of about BAND_PIXELS pixels together."""
    step = max(1, BAND_PIXELS // width)
    for top in range(0, height, step):
        yield slice(top, min(top + step, height))


def split_image(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """(first row, those rows), from the top; a small image unchanged."""
    for rows in slice_rows(image.height, image.width):
        is_whole = rows == slice(0, image.height)
        yield rows.start, image if is_whole else image.crop((0, rows.start, image.width, rows.stop))


def convert(image: Image.Image) -> np.ndarray:
    """float32 (height, width, 3) in [0, 1] of any mode.

    Transparent pixels become white: the colour behind them is whatever a program left there.
    """
    if image.mode in MODES_16_BIT:
        grey = np.asarray(image)
        if grey.min(initial=0) < 0 or grey.max(initial=0) > MAX_16_BIT:
            raise ValueError("pixels of 32-bit whole numbers, expected 8 or 16 bits")
        transparent = image.info.get("transparency")
        if transparent is not None:
            grey = np.where(grey == transparent, MAX_16_BIT, grey)
        grey = grey.astype(np.float32) / MAX_16_BIT
        return np.repeat(grey[..., None], 3, axis=2)
    return np.asarray(convert_to_bytes(image)).astype(np.float32) / 255


def convert_to_bytes(image: Image.Image) -> Image.Image:
    """As `convert`, in mode RGB."""
    if image.mode in MODES_16_BIT:
        return Image.fromarray(round_to_bytes(convert(image)))
    if image.mode == "F":
        raise ValueError("pixels of 32-bit floating point, expected 8 or 16 bits")
    if has_alpha(image):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def round_to_bytes(pixels: np.ndarray) -> np.ndarray:
    """float32 in [0, 1] -> uint8 of the same shape."""
    return (pixels.clip(0, 1) * 255).round().astype(np.uint8)


def shrink(
    bands: Iterable[tuple[int, Image.Image]], size: tuple[int, int], side_px: int
) -> np.ndarray:
    """uint8 (height, width, 3) whose longer side is at most `side_px`, from `split_image`'s bands.

    Each band is narrowed on its own, as Pillow does before it reduces the height, so that the
    result is bit-identical to that of the whole image.
    """
    width, height = size
    scale = min(1.0, side_px / max(size))
    small = max(1, round(width * scale)), max(1, round(height * scale))
    narrow = Image.new("RGB", (small[0], height))
    for top, band in bands:
        narrow.paste(band.resize((small[0], band.height), Image.Resampling.BOX), (0, top))
    return np.asarray(narrow.resize(small, Image.Resampling.BOX))
