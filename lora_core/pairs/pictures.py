"""Reading pictures of every kind that lie in people's folders, one at a time."""

from __future__ import annotations

import hashlib
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ..errors import FileError
from ..stored import shorten

SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif", ".jfif"}
)
MAX_SIDE_PX = 16_384  # ComfyUI's own MAX_RESOLUTION
MAX_PIXELS = 89_478_485  # where Pillow begins to warn of decompression bombs
ORIENTATION = 0x0112  # EXIF tag
MODES_16_BIT = ("I;16", "I;16L", "I;16B", "I;16N", "I")
#: What Pillow's decoders raise on damaged files.
DAMAGED = (
    *(OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError),
    *(AttributeError, OverflowError, MemoryError, struct.error, zlib.error),
)
HASH_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class FilePicture:
    """A picture in a file."""

    path: Path
    label: str = ""
    """Its path inside the set's folder: target and reference often have one file name."""

    @property
    def name(self) -> str:
        return self.label or self.path.name

    def read(self) -> np.ndarray:
        """float32 (height, width, 3) in [0, 1]: turned upright, transparency over white.

        Raises:
            FileError: no picture, a damaged one, or one too large; the text names the file.
        """
        with open_picture(self.path, self.name) as image:
            return convert(ImageOps.exif_transpose(image))

    def read_small(self, side_px: int) -> np.ndarray:
        """uint8 (height, width, 3), about as large as asked for; JPEGs are decoded at that size."""
        with open_picture(self.path, self.name) as image:
            image.draft(None, (side_px, side_px))
            return shrink(convert(ImageOps.exif_transpose(image)), side_px)

    def compute_digest(self) -> str:
        """Of the file's bytes, and whether they are a picture at all is not asked.

        Raises:
            FileError: the file cannot be opened.
        """
        digest = hashlib.blake2b(digest_size=20)
        try:
            with self.path.open("rb") as file:
                while chunk := file.read(HASH_CHUNK_BYTES):
                    digest.update(chunk)
        except OSError as e:
            raise FileError(f"{shorten(self.name)} cannot be opened: {e.strerror}.") from None
        return digest.hexdigest()

    def read_header(self) -> Header:
        """What can be said without decoding.

        Raises:
            FileError: as `read`.
        """
        with open_picture(self.path, self.name) as image:
            width, height = image.size
            orientation = image.getexif().get(ORIENTATION, 1)
            if orientation in (5, 6, 7, 8):
                width, height = height, width
            frames = getattr(image, "n_frames", 1)
            pages = "pages" if image.format == "TIFF" else "frames"
            traits = {
                "CMYK": image.mode == "CMYK",
                "16-bit": image.mode in MODES_16_BIT,
                f"{frames} {pages}, the first is used": frames > 1,
                "turned by EXIF": orientation in range(2, 9),
                "transparent": has_alpha(image),
            }
        return Header(width, height, tuple(name for name, holds in traits.items() if holds))


@dataclass(frozen=True, eq=False)
class ArrayPicture:
    """A picture from the graph."""

    name: str
    pixels: np.ndarray = field(repr=False)
    """float32 (height, width, 3) in [0, 1]."""

    def read(self) -> np.ndarray:
        return self.pixels

    def read_small(self, side_px: int) -> np.ndarray:
        return shrink(self.pixels, side_px)

    def compute_digest(self) -> str:
        digest = hashlib.blake2b(repr(self.pixels.shape).encode(), digest_size=20)
        digest.update(np.ascontiguousarray(self.pixels).tobytes())
        return digest.hexdigest()

    def read_header(self) -> Header:
        """FileError for one too large, as a file would be."""
        height, width = self.pixels.shape[:2]
        check_size(self.name, width, height)
        return Header(width, height, ())


Picture = FilePicture | ArrayPicture


@dataclass(frozen=True)
class Header:
    width: int
    """In pixels, turned upright."""
    height: int
    traits: tuple[str, ...]
    """What is unusual about the file: "CMYK", "16-bit", "turned by EXIF", ..."""


@contextmanager
def open_picture(path: Path, name: str) -> Iterator[Image.Image]:
    """A Pillow image of a bearable size; whatever goes wrong inside becomes one sentence."""
    name = shorten(name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata; too many pixels are checked here
            with Image.open(path) as image:
                check_size(name, *image.size)
                yield image
    except FileError:
        raise
    except Image.DecompressionBombError:
        raise FileError(
            f"{name} is larger than {MAX_PIXELS // 10**6} million pixels; expected at most "
            f"{MAX_SIDE_PX:,} px a side. Scale it down: training uses about one million."
        ) from None
    except Image.UnidentifiedImageError:
        size_bytes = path.stat().st_size if path.exists() else 0
        what = "an empty file" if not size_bytes else "no picture Pillow can read"
        raise FileError(
            f"{name} is {what}; expected a PNG, JPEG, WebP, BMP, TIFF or GIF of 8 or 16 bits. "
            "Save it again, or remove it."
        ) from None
    except DAMAGED as e:
        reason = getattr(e, "strerror", None) or str(e) or type(e).__name__
        raise FileError(
            f"{name} cannot be read ({shorten(reason)}); save it again, or remove it."
        ) from None


def check_size(name: str, width: int, height: int) -> None:
    if max(width, height) > MAX_SIDE_PX or width * height > MAX_PIXELS:
        raise FileError(
            f"{name} is {width:,} x {height:,} px; expected at most {MAX_SIDE_PX:,} px a side and "
            f"{MAX_PIXELS // 10**6} million in all. Scale it down: training uses about one million."
        )


def has_alpha(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


def convert(image: Image.Image) -> np.ndarray:
    """float32 (height, width, 3) in [0, 1] of any mode.

    Transparent pixels become white: the colour behind them is whatever a program left there.
    """
    if image.mode in MODES_16_BIT:
        grey = np.asarray(image).astype(np.float32).clip(0, 65535) / 65535
        return np.repeat(grey[..., None], 3, axis=2)
    if image.mode == "F":
        raise ValueError("32-bit floating point pixels")
    if has_alpha(image):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return np.asarray(image.convert("RGB")).astype(np.float32) / 255


def shrink(pixels: np.ndarray, side_px: int) -> np.ndarray:
    """float32 (height, width, 3) in [0, 1] -> uint8 whose longer side is at most `side_px`."""
    image = Image.fromarray((pixels.clip(0, 1) * 255).round().astype(np.uint8))
    scale = side_px / max(image.size)
    if scale < 1:
        size = [max(1, round(length * scale)) for length in image.size]
        image = image.resize(tuple(size), Image.Resampling.BOX)
    return np.asarray(image)
