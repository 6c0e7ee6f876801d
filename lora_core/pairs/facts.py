"""What the checks and the cache know about an image after decoding it once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from ..errors import FileError
from ..text import shorten
from .images import FileImage, ImageSource
from .pair import Pair

SIGNATURE_PX = 32
MEASURE_PX = 256  # at which colours and details are measured


@dataclass(frozen=True)
class ImageFacts:
    """Small enough to keep for thousands of images."""

    width: int
    height: int
    traits: tuple[str, ...]
    digest: str
    """Of the file's bytes, or of the pixels from the graph."""
    signature: np.ndarray
    """uint8 (32, 32, 3): the downscaled image."""
    saturation: float
    """Mean of max - min over the channels, 0 to 1; 0 is grey."""
    detail: float
    """Mean step from pixel to pixel of the brightness, 0 to 1, at 256 px."""

    @property
    def aspect(self) -> float:
        return self.width / self.height

    def looks_like(self, other: ImageFacts, tolerance: int = 2) -> bool:
        """Whether no cell of the signatures differs by more than this many of 255."""
        difference = self.signature.astype(int) - other.signature.astype(int)
        return int(np.abs(difference).max()) <= tolerance


@dataclass(frozen=True)
class PairFacts:
    """A pair's images in the order of `Pair.images`."""

    target: ImageFacts
    references: tuple[ImageFacts, ...]
    mask: ImageFacts | None = None


def measure_image(image: ImageSource) -> ImageFacts:
    """Decodes it once, small; a damaged one is a FileError."""
    digest = image.compute_digest()  # first: an image that changes later differs from it then
    header = image.read_header()
    small = image.read_small(MEASURE_PX)
    squeezed = Image.fromarray(small).resize((SIGNATURE_PX, SIGNATURE_PX), Image.Resampling.BOX)
    values = small.astype(np.float32) / 255
    grey = values.mean(axis=2)
    steps = [np.abs(np.diff(grey, axis=axis)).mean() for axis in (0, 1) if grey.shape[axis] > 1]
    return ImageFacts(
        width=header.width,
        height=header.height,
        traits=header.traits,
        digest=digest,
        signature=np.asarray(squeezed).copy(),
        saturation=float((values.max(axis=2) - values.min(axis=2)).mean()),
        detail=float(np.mean(steps)) if steps else 0.0,
    )


def measure_pair(pair: Pair, known: dict[int | str, ImageFacts]) -> PairFacts:
    """Facts of all images; `known` remembers those that several pairs share."""

    def measure(image: ImageSource) -> ImageFacts:
        key = str(image.path) if hasattr(image, "path") else id(image)
        if key not in known:
            known[key] = measure_image(image)
        return known[key]

    return PairFacts(
        target=measure(pair.target),
        references=tuple(map(measure, pair.references)),
        mask=None if pair.mask is None else measure(pair.mask),
    )


def check_unchanged(pair: Pair, facts: PairFacts) -> None:
    """Whether the files of a pair still are those that were measured.

    Raises:
        FileError: one is another, or cannot be read any more.
    """
    known = [facts.target, *facts.references, *([facts.mask] if facts.mask else [])]
    for image, one in zip(pair.images, known, strict=True):
        if isinstance(image, FileImage) and image.compute_digest() != one.digest:
            raise FileError(
                "{image} changed while it was read; expected the file that was checked. Run it "
                "again when nothing writes there.",
                image=shorten(image.name),
            )


def have_same_pixels(a: ImageSource, b: ImageSource) -> bool:
    """Exactly, at full size, a band of each at a time."""
    first, second = a.read_header(), b.read_header()
    if (first.width, first.height) != (second.width, second.height):
        return False
    return all(map(np.array_equal, a.read_bands(), b.read_bands()))
