"""Folders of real photographs and their edits, in layouts that people use."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from .photographs import find_photograph

PHOTOGRAPHS = (
    *("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "retina.jpg"),
    "hubble_deep_field.jpg",
)
CAPTION = "exchange red and blue"


def load_photograph(index: int, width: int = 96, height: int = 64) -> Image.Image:
    """A small crop of a photograph; a different one for each index."""
    image = Image.open(find_photograph(PHOTOGRAPHS[index % len(PHOTOGRAPHS)])).convert("RGB")
    image.thumbnail((480, 480))
    left = 7 * (index // len(PHOTOGRAPHS)) + 20
    return image.crop((left, 40, left + width, 40 + height))


def edit(image: Image.Image) -> Image.Image:
    """Swaps red and blue."""
    return Image.fromarray(np.ascontiguousarray(np.asarray(image)[..., ::-1]))


def write_picture(image: Image.Image, path: Path, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def write_text(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def write_pairs(
    folder: Path,
    number: int = 4,
    target: str = "target/{}.png",
    reference: str = "control/{}.png",
    caption: str | None = "target/{}.txt",
    width: int = 96,
    height: int = 64,
) -> Path:
    """`number` pairs named by the patterns; {} is photo_0, photo_1, ..."""
    for index in range(number):
        image = load_photograph(index, width, height)
        name = f"photo_{index}"
        write_picture(image, folder / reference.format(name))
        write_picture(edit(image), folder / target.format(name))
        if caption is not None:
            write_text(folder / caption.format(name), f"{CAPTION}, number {index}")
    return folder
