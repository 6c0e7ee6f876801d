"""A job's images by their names: samples, their sources and their targets."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..disk.writing import explain
from ..errors import FileError
from ..text import format_bytes
from .folder import list_inside, open_inside
from .job import UnknownImageError

Kind = Literal["source", "target", "sample"]
#: In the order of display.
KINDS: tuple[Kind, ...] = ("source", "target", "sample")
SUFFIX = ".png"
SIGNATURE = b"\x89PNG\r\n\x1a\n"
#: Of a PNG. One of 4096 x 4096 pixels has 50 MB before compression.
MAX_BYTES = 64 << 20

_ITEM = r"(?P<item>[A-Za-z0-9_-][A-Za-z0-9_.-]{0,199})"
_NAMES: dict[Kind, re.Pattern[str]] = {
    "source": re.compile(rf"source_{_ITEM}_(?P<index>[0-9]{{1,3}})\.png"),
    "target": re.compile(rf"target_{_ITEM}\.png"),
    "sample": re.compile(rf"step_(?P<step>[0-9]{{8,12}})_{_ITEM}\.png"),
}


@dataclass(frozen=True)
class JobImage:
    """One PNG file of a job."""

    name: str
    """Of its file."""
    kind: Kind
    item: str
    """Key in the training set."""
    step: int | None
    """Of a sample: after how many steps; 0 is before the first."""
    index: int | None
    """Of a source: which reference, from 0."""


def name_source(item: str, index: int) -> str:
    """File name without a suffix, as the others here."""
    return f"source_{item}_{index}"


def name_target(item: str) -> str:
    return f"target_{item}"


def name_sample(item: str, step: int) -> str:
    return f"step_{step:08d}_{item}"


def parse_name(name: str) -> JobImage | None:
    """None for what is no image's name."""
    for kind, pattern in _NAMES.items():
        if match := pattern.fullmatch(name):
            item = match["item"]
            step = int(match["step"]) if kind == "sample" else None
            index = int(match["index"]) if kind == "source" else None
            return JobImage(name, kind, item, step, index)
    return None


def build_sort_key(image: JobImage) -> tuple[str, int, int, int, str]:
    """For sorting."""
    p = image
    return p.item, KINDS.index(p.kind), p.step or 0, p.index or 0, p.name


def list_images(folder: Path) -> list[JobImage]:
    """Those in a job's folder of samples, by item, kind (sources, target, samples), step, index."""
    names = (path.name for path in list_inside(folder))
    images = [image for name in names if (image := parse_name(name)) is not None]
    return sorted(images, key=build_sort_key)


def read_image(folder: Path, name: str) -> bytes:
    """A PNG's bytes.

    Raises:
        UnknownImageError: none of the listed names, or its file is no PNG or too large for one.
        FileError: it cannot be read.
    """
    if name not in {image.name for image in list_images(folder)}:
        raise UnknownImageError("there is no image {name!r}; reload the list", name=str(name)[:80])
    try:
        with open_inside(folder / name) as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as e:
        raise FileError("{name} cannot be read: {reason}", name=name, reason=explain(e)) from None
    if not data.startswith(SIGNATURE) or len(data) > MAX_BYTES:
        raise UnknownImageError(
            "{name} is not a PNG file of up to {max_bytes}; delete it",
            name=name,
            max_bytes=format_bytes(MAX_BYTES),
        )
    return data
