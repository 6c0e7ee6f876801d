"""A folder of pairs for the training workflows: crops of the demo photograph and their grades.

Needs Pillow only, as the rest of a base directory does.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

PROMPT = "make it the blue hour"
SIDE = 256  # pixels
#: left, top and side in the photograph of 512 x 512
CROPS = (
    *((0, 0, 256), (128, 0, 256), (256, 0, 256), (0, 128, 256), (128, 128, 256), (256, 128, 256)),
    *((0, 256, 256), (128, 256, 256), (256, 256, 256), (0, 0, 512), (60, 60, 400), (112, 0, 400)),
)
SATURATION = 0.45
#: Added to red, green and blue, out of 255.
DUSK = (-40, -10, 38)
CONTRAST = 0.9


def write_pairs(folder: Path, photograph: Path) -> Path:
    """Writes control/NN.png, target/NN.png and target/NN.txt, unless they are newer than it."""
    from PIL import Image

    last = folder / "target" / f"{len(CROPS) - 1:02}.txt"
    if last.exists() and last.stat().st_mtime >= photograph.stat().st_mtime:
        return folder
    for name in ("control", "target"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    with Image.open(photograph) as file:
        photo = file.convert("RGB")
    for index, (left, top, side) in enumerate(CROPS):
        crop = photo.crop((left, top, left + side, top + side)).resize((SIDE, SIDE))
        crop.save(folder / "control" / f"{index:02}.png")
        grade(crop).save(folder / "target" / f"{index:02}.png")
        (folder / "target" / f"{index:02}.txt").write_text(PROMPT, encoding="utf-8")
    return folder


def grade(picture: Image.Image) -> Image.Image:
    """Muted colours and cool light."""
    from PIL import ImageEnhance

    muted = ImageEnhance.Color(picture).enhance(SATURATION)
    table = [
        min(255, max(0, round(CONTRAST * (value - 128) + 128 + shift)))
        for shift in DUSK
        for value in range(256)
    ]
    return muted.point(table)
