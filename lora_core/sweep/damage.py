"""When an image of a sweep is broken rather than edited, judged against strength 0.

A LoRA that is too strong fails in one of four ways. Each criterion looks at something that no
intended edit does to a whole image, so that a white background or a night scene is no failure.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..text import format_percent
from .image_metrics import STEP

if TYPE_CHECKING:
    from .image_metrics import Appearance
    from .measures import CellMeasures

NON_FINITE, BLACK, ONE_COLOUR, BURNT, NOISE = "NaN", "black", "one colour", "burnt colours", "noise"

#: An edit leaves a visible image; below a tenth of the contrast of strength 0 nothing is left.
FLAT_RATIO = 0.1
#: With less contrast than this it is no image, whatever it is compared with.
FLAT_CONTRAST = STEP
#: Mean luma under which one colour is called black.
BLACK_BRIGHTNESS = 2 * STEP
#: Values outside the range of the VAE are clipped, and a pixel clipped at both ends is a pure
#: colour (red, blue, yellow ...). Photographs have next to none; white and black are none.
BURNT_INCREASE = 0.25
#: Unrelated photographs still share an SSIM of 0.1 to 0.4 by their smooth parts, so a lost
#: structure alone may be a new image. Together with the next it is noise.
LOST_SSIM = 0.3
#: Steps from pixel to pixel over those of strength 0. Sharpening doubles them at most; white noise
#: over a photograph makes them five and more times as large.
ROUGHNESS_RATIO = 3.0


def find_damage(measures: CellMeasures, reference: CellMeasures | None) -> str:
    """What is wrong with an image in a word or two; "" if nothing is.

    Args:
        reference: strength 0 of the same seed; may be the image itself, or absent.
    """
    found = measures.appearance
    if found.non_finite > 0:
        return NON_FINITE
    if reference is None or reference is measures:
        return name_flat(found) if found.contrast < FLAT_CONTRAST else ""
    before = reference.appearance
    if before.contrast < FLAT_CONTRAST or not measures.change:
        return ""  # strength 0 is broken itself: nothing to compare with
    if found.contrast < max(FLAT_CONTRAST, FLAT_RATIO * before.contrast):
        return name_flat(found)
    if found.burnt - before.burnt > BURNT_INCREASE:
        return BURNT
    ssim = measures.change["whole"].ssim
    if ssim < LOST_SSIM and found.roughness > ROUGHNESS_RATIO * before.roughness:
        return NOISE
    return ""


def name_flat(found: Appearance) -> str:
    return BLACK if found.brightness < BLACK_BRIGHTNESS else ONE_COLOUR


def describe_damage(damage: str, measures: CellMeasures, reference: CellMeasures | None) -> str:
    """The damage with its values and limits."""
    found, before = measures.appearance, reference and reference.appearance
    if damage == NON_FINITE:
        return f"NaN or Inf in {format_percent(found.non_finite)} of the pixels, shown as black"
    if damage in (BLACK, ONE_COLOUR):
        contrast = f"{damage} (contrast {found.contrast / STEP:.1f} of 255"
        if before is None:
            return f"{contrast}; below {FLAT_CONTRAST / STEP:g} there is nothing to see)"
        return (
            f"{contrast}, {before.contrast / STEP:.1f} at strength 0; below "
            f"{format_percent(FLAT_RATIO)} of that nothing is left to see)"
        )
    if damage == BURNT and before:
        return (
            f"burnt colours ({format_percent(found.burnt)} of the pixels have one channel at 0 and "
            f"another at 255, {format_percent(before.burnt)} at strength 0; up to "
            f"{format_percent(BURNT_INCREASE)} more is fine)"
        )
    if damage == NOISE and before:
        return (
            f"noise (SSIM {measures.change['whole'].ssim:.2f} to strength 0, below "
            f"{LOST_SSIM:g}; {found.roughness / max(before.roughness, 1e-9):.1f} times as rough, "
            f"over {ROUGHNESS_RATIO:g})"
        )
    return damage
