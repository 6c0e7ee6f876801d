"""Which size an image is encoded at.

Images are stretched by less than half a step, never cropped: a target that loses an edge that its
reference keeps teaches a shift.
"""

from __future__ import annotations

import math

from ..errors import ConfigError

PIXELS_PER_MEGAPIXEL = 1024 * 1024  # as ComfyUI's ImageScaleToTotalPixels counts
TARGET_STEP_PX = 16  # 8 pixels a latent, 2 latents a patch
REFERENCE_STEP_PX = 8  # as TextEncodeQwenImageEditPlus rounds
MAX_MEGAPIXELS = 64.0  # 8192 x 8192; a typo cannot enlarge an image beyond it

Size = tuple[int, int]


def check_megapixels(value: float, name: str) -> None:
    """ConfigError for an invalid area: NaN, infinity, zero, or absurdly large."""
    if not isinstance(value, (int, float)) or not 0 < value <= MAX_MEGAPIXELS:
        raise ConfigError(
            "{name} is {value}; expected a number above 0 and up to {max_megapixels:g}, where 1 "
            "is 1024 x 1024",
            name=name,
            value=str(value)[:20],
            max_megapixels=MAX_MEGAPIXELS,
        )


def choose_size(width: int, height: int, megapixels: float, step_px: int) -> Size:
    """(width, height) of about this area and aspect, multiples of `step_px`."""
    check_megapixels(megapixels, "megapixels")
    scale = math.sqrt(megapixels * PIXELS_PER_MEGAPIXEL / (width * height))
    return (
        max(step_px, round(width * scale / step_px) * step_px),
        max(step_px, round(height * scale / step_px) * step_px),
    )


def choose_target_size(width: int, height: int, megapixels: float) -> Size:
    return choose_size(width, height, megapixels, TARGET_STEP_PX)


def choose_reference_size(width: int, height: int, megapixels: float) -> Size:
    return choose_size(width, height, megapixels, REFERENCE_STEP_PX)
