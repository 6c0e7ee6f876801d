"""Free photographs from installed packages, on which the demo base is trained and tested.

All are in the public domain or CC0, as scikit-image 0.26 says in `skimage.data` (astronaut and
Hubble: NASA; rocket: SpaceX; retina: Mikael Haeggstroem; coffee: Rachel Michetti; chelsea: Stefan
van der Walt; camera: Lav Varshney; brick, grass, gravel: cc0textures.com; ihc and cell: no known
restrictions), Grace Hopper of matplotlib's sample data (US Navy). Nothing is downloaded.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
import torch.nn.functional as F

#: the VAE's training images; the last five are grey
VAE_PHOTOGRAPHS = (
    *("astronaut.png", "grace_hopper.jpg", "rocket.jpg", "ihc.png", "retina.jpg"),
    *("hubble_deep_field.jpg", "camera.png", "brick.png", "grass.png", "gravel.png", "cell.png"),
)
#: 16 images for a LoRA: file and the square (left, top, side) in it
TRAINING_CROPS = (
    ("astronaut.png", (90, 0, 256)),
    ("astronaut.png", (0, 256, 256)),
    ("astronaut.png", (256, 0, 256)),
    ("astronaut.png", (0, 0, 512)),
    ("grace_hopper.jpg", (120, 40, 256)),
    ("grace_hopper.jpg", (0, 300, 300)),
    ("grace_hopper.jpg", (0, 0, 512)),
    ("rocket.jpg", (220, 0, 256)),
    ("rocket.jpg", (200, 120, 300)),
    ("ihc.png", (0, 0, 256)),
    ("ihc.png", (256, 200, 256)),
    ("retina.jpg", (200, 200, 1000)),
    ("retina.jpg", (700, 500, 500)),
    ("hubble_deep_field.jpg", (100, 100, 400)),
    ("camera.png", (100, 40, 300)),
    ("brick.png", (0, 0, 512)),
)
SCALES = (1.0, 0.7, 0.5, 0.35)  # of the photographs to train on
CROP = 64
COLOURS = 3

#: held out from the training of the VAE and the LoRAs
HELD_OUT_CROPS = (
    ("coffee.png", (100, 0, 400)),
    ("coffee.png", (300, 100, 256)),
    ("chelsea.png", (80, 0, 300)),
    ("chelsea.png", (120, 40, 200)),
)


def find_photograph(name: str) -> Path:
    """Where an installed package keeps a photograph; FileNotFoundError names the package to add."""
    for package, folder in (("skimage", "data"), ("matplotlib", "mpl-data/sample_data")):
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            path = Path(spec.origin).parent / folder / name
            if path.is_file():
                return path
    raise FileNotFoundError(f"{name} comes with scikit-image or matplotlib: install both.")


def read_photograph(
    name: str, box: tuple[int, int, int] | None = None, side: int | None = None
) -> torch.Tensor:
    """A photograph as float32 (3, height, width) in [-1, 1], cropped to `box` (left, top, side)."""
    from PIL import Image

    with Image.open(find_photograph(name)) as file:
        picture = file.convert("RGB")
    if box is not None:
        left, top, length = box
        picture = picture.crop((left, top, left + length, top + length))
    if side is not None:
        picture = picture.resize((side, side), Image.Resampling.LANCZOS)
    return read_pixels(picture)


def read_pixels(picture: object) -> torch.Tensor:
    """A Pillow image as float32 (3, height, width) in [-1, 1]."""
    import numpy

    pixels = numpy.asarray(picture, dtype=numpy.float32)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous() / 127.5 - 1


def read_crops(crops: tuple[tuple[str, tuple[int, int, int]], ...], side: int) -> torch.Tensor:
    """Crops of photographs at one size, float32 (count, 3, side, side)."""
    return torch.stack([read_photograph(name, box, side) for name, box in crops])


def read_pictures() -> list[torch.Tensor]:
    """The VAE's photographs at several sizes, each float32 (3, height, width) in [-1, 1]."""
    pictures = []
    for name in VAE_PHOTOGRAPHS:
        picture = read_photograph(name)
        fit = min(1.0, 768 / max(picture.shape[1:]))
        for scale in SCALES:
            sized = F.interpolate(picture[None], scale_factor=fit * scale, mode="area")[0]
            if min(sized.shape[1:]) >= CROP:
                pictures.append(sized)
    return pictures


def sample_crops(
    pictures: list[torch.Tensor], count: int, generator: torch.Generator, side: int = CROP
) -> torch.Tensor:
    """Random crops (count, 3, side, side), rotated, mirrored and with changed colours."""

    def draw(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator)

    crops = []
    pictures = [picture for picture in pictures if min(picture.shape[1:]) >= side]
    for _ in range(count):
        picture = pictures[int(draw(1) * len(pictures))]
        top, left = ((draw(2) * (torch.tensor(picture.shape[1:]) - side + 1)).int()).tolist()
        crop = picture[:, top : top + side, left : left + side]
        if draw(1) < 0.5:
            crop = crop.flip(2)
        if draw(1) < 0.3:
            crop = crop.transpose(1, 2)
        if draw(1) < 0.7:  # a change of colours: mixed, brighter, in another contrast and tint
            mixing = torch.eye(COLOURS)[torch.randperm(COLOURS, generator=generator)]
            mixing = mixing + 0.5 * (draw(COLOURS, COLOURS) - 0.5)
            crop = (0.6 + 0.6 * draw(1)) * torch.einsum("ij,jhw->ihw", mixing, crop)
            crop = crop + 0.6 * (draw(COLOURS, 1, 1) - 0.5)
        crops.append(crop)
    return torch.stack(crops).clamp(-1, 1)
