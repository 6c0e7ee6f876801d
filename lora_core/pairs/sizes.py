"""Which size a picture is encoded at.

Pictures are stretched by less than half a step, never cropped: a target that loses an edge which
its reference keeps teaches a shift.
"""

from __future__ import annotations

import math

PIXELS_PER_MEGAPIXEL = 1024 * 1024  # as ComfyUI's ImageScaleToTotalPixels counts
TARGET_STEP_PX = 16  # 8 pixels a latent, 2 latents a patch
REFERENCE_STEP_PX = 8  # as TextEncodeQwenImageEditPlus rounds

Size = tuple[int, int]


def choose_size(width: int, height: int, megapixels: float, step_px: int) -> Size:
    """(width, height) of about this area and aspect, multiples of `step_px`."""
    scale = math.sqrt(megapixels * PIXELS_PER_MEGAPIXEL / (width * height))
    return (
        max(step_px, round(width * scale / step_px) * step_px),
        max(step_px, round(height * scale / step_px) * step_px),
    )


def choose_target_size(width: int, height: int, megapixels: float) -> Size:
    return choose_size(width, height, megapixels, TARGET_STEP_PX)


def choose_reference_size(width: int, height: int, megapixels: float) -> Size:
    return choose_size(width, height, megapixels, REFERENCE_STEP_PX)
