"""The appearance of one image, and the difference between two.

Images are ComfyUI's: (batch, height, width, channels), 0 to 1. Everything is measured on the values
a display gets: clamped to 0 to 1, three channels, on white where a fourth one is alpha.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..errors import ShapeError
from ..messages import message

STEP = 1 / 255
"""One step of an 8-bit display."""
SSIM_WINDOW = 11
"""Taps of the Gaussian window of sigma 1.5: Wang et al., Image Quality Assessment (2004), III.B."""
VISIBLE_STEPS = 4
"""Steps of 8 bits by which a small spot must change before an eye finds it."""
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as PIL converts to "L"


@dataclass(frozen=True)
class Appearance:
    """One image on its own. Where values are NaN or Inf, the metrics are those of the rest."""

    non_finite: float
    """Share of the pixels with a NaN or Inf."""
    brightness: float
    """Mean luma, 0 to 1."""
    contrast: float
    """Standard deviation of the luma."""
    burnt: float
    """Share of the pixels with one channel at its end and another at the opposite one."""
    roughness: float
    """Root mean square of the luma's step from pixel to pixel: noise and fine structure."""


@dataclass(frozen=True)
class Difference:
    """Two images, or the same region of both."""

    rms: float
    """Root mean square over pixels and channels, of the full scale 1."""
    psnr: float | None
    """20 log10(1 / rms) in decibels; None if nothing differs."""
    ssim: float
    """Mean structural similarity of the channels: 1 is the same structure, 0 none in common."""
    visible: float
    """Share of the pixels of which a channel differs by more than VISIBLE_STEPS."""
    largest: float
    """The largest difference of a channel, 0 to 1."""


def measure_appearance(image: torch.Tensor) -> Appearance:
    image = take_colours(image)
    finite = image.isfinite().all(dim=-1)
    shown = clamp(image)
    luma = compute_luma(shown)
    seen = luma[finite] if finite.any() else luma.flatten()
    ends = (shown.amin(dim=-1) < STEP / 2) & (shown.amax(dim=-1) > 1 - STEP / 2)
    steps = [luma.diff(dim=dim) for dim in (-1, -2)]
    squares = sum(step.square().sum(dtype=torch.float64).item() for step in steps)
    count = max(sum(step.numel() for step in steps), 1)
    return Appearance(
        non_finite=1 - finite.double().mean().item(),
        brightness=seen.mean(dtype=torch.float64).item(),
        contrast=seen.double().std(correction=0).item(),
        burnt=ends.double().mean().item(),
        roughness=math.sqrt(squares / count),
    )


def compare_images(
    a: torch.Tensor, b: torch.Tensor, regions: Mapping[str, torch.Tensor | None]
) -> dict[str, Difference]:
    """The difference in each region.

    SSIM compares windows of SSIM_WINDOW pixels, which at the edge of a region reach beyond it.

    Args:
        a, b: finite images of the same shape, at least SSIM_WINDOW pixels wide and high.
        regions: name -> bool (height, width) with at least one True; None is the whole image.

    Raises:
        ShapeError: the shapes differ, or are too small for SSIM.
    """
    a, b = clamp(take_colours(a)), clamp(take_colours(b))
    if a.shape != b.shape or min(a.shape[1:3]) < SSIM_WINDOW:
        raise ShapeError(
            "cannot compare images of {a} and {b}; expected the same size, and at least "
            "{ssim_window} pixels",
            a=describe_size(a),
            b=describe_size(b),
            ssim_window=SSIM_WINDOW,
        )
    # (batch, height, width): each pixel's mean square, worst channel, and structural similarity
    error = (a - b).abs_()
    squares = error.square().mean(dim=-1)
    worst = error.amax(dim=-1)
    similarity = compute_ssim_map(a, b)
    found = {}
    for name, region in regions.items():
        chosen = slice(None) if region is None else region
        rms = math.sqrt(squares[:, chosen].mean(dtype=torch.float64).item())
        found[name] = Difference(
            rms=rms,
            psnr=-20 * math.log10(rms) if rms > 0 else None,
            ssim=similarity[:, chosen].mean(dtype=torch.float64).item(),
            visible=(worst[:, chosen] > VISIBLE_STEPS * STEP).double().mean().item(),
            largest=worst[:, chosen].max().item(),
        )
    return found


def compute_ssim_map(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(batch, height, width, 3) each -> (batch, height, width); beyond the border is mirrored."""
    from kornia.metrics import ssim  # ComfyUI brings it

    a, b = (image.movedim(-1, 1).contiguous() for image in (a, b))
    return ssim(a, b, SSIM_WINDOW, max_val=1.0, eps=0.0).mean(dim=1)


def fit_image(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Centre-cropped to the shape of height by width, and resized to it.

    That is what ComfyUI's image scaling nodes do with "center", and so how an edited image aligns
    with its source.
    """
    image = take_colours(image)
    rows, columns = image.shape[1:3]
    if (rows, columns) == (height, width):
        return image
    scale = min(rows / height, columns / width)
    keep_rows, keep_columns = round(height * scale), round(width * scale)
    top, left = (rows - keep_rows) // 2, (columns - keep_columns) // 2
    cut = image[:, top : top + keep_rows, left : left + keep_columns]
    resized = torch.nn.functional.interpolate(
        cut.movedim(-1, 1), (height, width), mode="bicubic", antialias=True
    )
    return resized.movedim(1, -1).clamp(0, 1)


def fit_mask(mask: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """A MASK (height, width) or (batch, ...), of which the first, as bool (height, width)."""
    first = mask.reshape(-1, *mask.shape[-2:])[:1, ..., None].float().cpu()
    return fit_image(first.expand(-1, -1, -1, 3), height, width)[0, ..., 0] >= 0.5


def take_colours(image: torch.Tensor) -> torch.Tensor:
    """float32 on the CPU, three channels; a single one is repeated.

    With a fourth channel, as Qwen-Image-2.1 gives it, the image is put on white by its alpha.
    """
    image = image.float().cpu()
    if image.shape[-1] == 4:
        alpha = image[..., 3:].clamp(0, 1)
        image = image[..., :3] * alpha + (1 - alpha)
    image = image[..., :3]
    return image if image.shape[-1] == 3 else image[..., :1].expand(*image.shape[:-1], 3)


def clamp(image: torch.Tensor) -> torch.Tensor:
    """As it is saved: NaN becomes black, the rest is clamped to 0 to 1."""
    return image.nan_to_num(0.0, 1.0, 0.0).clamp(0, 1)


def compute_luma(image: torch.Tensor) -> torch.Tensor:
    return image @ torch.tensor(LUMA)


def describe_size(image: torch.Tensor) -> str:
    """ "1024 x 768", width first as in ComfyUI."""
    batch = message("{image_shape} of ", image_shape=image.shape[0]) if image.shape[0] > 1 else ""
    return message(
        "{batch}{image_shape} x {height}",
        batch=batch,
        image_shape=image.shape[2],
        height=image.shape[1],
    )
