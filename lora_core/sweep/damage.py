"""When an image of a sweep is broken rather than edited, judged against strength 0.

A LoRA that is too strong fails in one of four ways. Each criterion looks at something that no
intended edit does to a whole image, so that a white background or a night scene is no failure.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..messages import message
from ..text import format_percent
from .image_metrics import STEP

if TYPE_CHECKING:
    from .image_metrics import Appearance
    from .measures import CellMeasures

NON_FINITE, BLACK, ONE_COLOUR, BURNT, NOISE = "NaN", "black", "one colour", "burnt colours", "noise"
NAMES = {
    NON_FINITE: NON_FINITE,
    BLACK: message("black"),
    ONE_COLOUR: message("one colour"),
    BURNT: message("burnt colours"),
    NOISE: message("noise"),
}

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
    found = measures.appearance
    before = None if reference is None else reference.appearance
    if damage == NON_FINITE:
        return message(
            "NaN or Inf in {non_finite} of the pixels, shown as black",
            non_finite=format_percent(found.non_finite),
        )
    if damage in (BLACK, ONE_COLOUR):
        if before is None:
            return message(
                "{damage} (contrast {contrast:.1f} of 255; below {limit:g} there is nothing to "
                "see)",
                damage=NAMES[damage],
                contrast=found.contrast / STEP,
                limit=FLAT_CONTRAST / STEP,
            )
        return message(
            "{damage} (contrast {contrast:.1f} of 255, {before:.1f} at strength 0; below {share} "
            "of that nothing is left to see)",
            damage=NAMES[damage],
            contrast=found.contrast / STEP,
            before=before.contrast / STEP,
            share=format_percent(FLAT_RATIO),
        )
    if damage == BURNT and before:
        return message(
            "burnt colours ({burnt} of the pixels have one channel at 0 and another at 255, "
            "{before} at strength 0; up to {increase} more is fine)",
            burnt=format_percent(found.burnt),
            before=format_percent(before.burnt),
            increase=format_percent(BURNT_INCREASE),
        )
    if damage == NOISE and before:
        return message(
            "noise (SSIM {ssim:.2f} to strength 0, below {limit:g}; {roughness:.1f} times as "
            "rough, over {ratio:g})",
            ssim=measures.change["whole"].ssim,
            limit=LOST_SSIM,
            roughness=found.roughness / max(before.roughness, 1e-9),
            ratio=ROUGHNESS_RATIO,
        )
    return NAMES.get(damage, damage)
