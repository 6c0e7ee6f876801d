"""The metrics against their formulas in float64; crops and sizes against handmade images."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from qwen_edit_lora.lora_core import ShapeError
from qwen_edit_lora.lora_core.sweep.image_metrics import (
    compare_images,
    fit_image,
    fit_mask,
    measure_appearance,
)

WHOLE = {"whole": None}


def make_picture(seed: int = 0, size: int = 48, batch: int = 1) -> torch.Tensor:
    """Smooth blobs with some grain, 0.1 to 0.9, as different as two photographs."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(batch, 3, 6, 6, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic").clamp(0, 1)
    grain = torch.rand(batch, 3, size, size, generator=generator) * 0.05
    return (0.1 + 0.75 * smooth + grain).movedim(1, -1)


def compute_ssim(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Wang et al. 2004, equations 13 to 16 and section III.B, in float64: (height, width)."""
    from scipy.ndimage import correlate1d

    taps = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    taps /= taps.sum()

    def blur(x: np.ndarray) -> np.ndarray:
        for axis in (0, 1):
            x = correlate1d(x, taps, axis=axis, mode="mirror")
        return x

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    return ((2 * mean_a * mean_b + c1) * (2 * covariance + c2)) / (
        (mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)
    )


@pytest.mark.parametrize("batch", [1, 2])
def test_the_metrics_equal_their_formulas_in_every_region(batch):
    a, b = make_picture(1, batch=batch), make_picture(2, batch=batch)
    inside = torch.zeros(48, 48, dtype=torch.bool)
    inside[10:30, 5:20] = True
    regions = {"whole": None, "inside": inside, "outside": ~inside}
    found = compare_images(a, b, regions)
    x, y = a.double().numpy(), b.double().numpy()
    maps = [
        np.mean([compute_ssim(x[n, ..., c], y[n, ..., c]) for c in range(3)], axis=0)
        for n in range(batch)
    ]
    for name, region in regions.items():
        chosen = np.ones((48, 48), bool) if region is None else region.numpy()
        squares = ((x - y) ** 2)[:, chosen].mean()
        assert found[name].rms == pytest.approx(math.sqrt(squares), rel=1e-5)
        assert found[name].psnr == pytest.approx(10 * math.log10(1 / squares), rel=1e-5)
        expected = np.mean([similarity[chosen] for similarity in maps])
        assert found[name].ssim == pytest.approx(expected, abs=1e-5)
        assert found[name].largest == pytest.approx(np.abs(x - y)[:, chosen].max(), rel=1e-5)
        share = (np.abs(x - y).max(axis=-1)[:, chosen] > 4 / 255).mean()
        assert found[name].visible == pytest.approx(share)
    assert found["inside"].rms != found["outside"].rms


def test_equal_pictures_have_no_psnr_and_an_ssim_of_one():
    found = compare_images(make_picture(), make_picture(), WHOLE)["whole"]
    assert (found.rms, found.psnr, found.visible, found.largest) == (0.0, None, 0.0, 0.0)
    assert found.ssim == pytest.approx(1.0, abs=1e-6)


def test_values_a_display_cannot_show_are_not_a_difference():
    white = torch.ones(1, 16, 16, 3)
    assert compare_images(white, white * 7, WHOLE)["whole"].rms == 0
    assert compare_images(white, white.half(), WHOLE)["whole"].rms == 0


def test_transparency_is_seen_on_white():
    picture, alpha = make_picture(), torch.rand(1, 48, 48, 1)
    shown = 1 - alpha + alpha * picture
    with_alpha = torch.cat([picture, alpha], dim=-1)
    assert compare_images(with_alpha, shown, WHOLE)["whole"].rms < 1e-6
    opaque = torch.cat([picture, torch.full_like(alpha, 1.02)], dim=-1)  # a VAE's, out of range
    assert compare_images(opaque, picture, WHOLE)["whole"].rms == 0
    hidden = torch.cat([make_picture(seed=1), torch.zeros_like(alpha)], dim=-1)
    white = torch.ones_like(picture)
    assert compare_images(hidden, white, WHOLE)["whole"].rms == 0


def test_grey_images_count_as_colour():
    picture = make_picture()
    grey = picture[..., :1]
    assert compare_images(grey, grey.expand(-1, -1, -1, 3), WHOLE)["whole"].rms == 0


@pytest.mark.parametrize("shape", [(1, 48, 47, 3), (2, 48, 48, 3), (1, 8, 8, 3)])
def test_images_that_cannot_be_compared_give_the_reason(shape):
    other = torch.zeros(shape) if shape[1] == 8 else make_picture()
    with pytest.raises(ShapeError, match=f"and {'2 of ' if shape[0] == 2 else ''}"):
        compare_images(other, torch.zeros(shape), WHOLE)


def test_an_appearance_distinguishes_burnt_colours_from_black_and_white():
    halves = torch.zeros(1, 20, 20, 3)
    halves[:, 10:] = 1.0
    found = measure_appearance(halves)
    assert found.burnt == 0
    assert found.brightness == pytest.approx(0.5)
    assert found.contrast == pytest.approx(0.5)
    halves[:, :5, :, 2] = 1.0  # blue
    assert measure_appearance(halves).burnt == pytest.approx(0.25)


def test_roughness_is_the_step_from_pixel_to_pixel():
    board = (torch.arange(20)[:, None] + torch.arange(20)) % 2
    grey = board.float()[None, ..., None].expand(1, 20, 20, 3)
    assert measure_appearance(grey).roughness == pytest.approx(1.0)
    assert measure_appearance(torch.full((1, 20, 20, 3), 0.3)).roughness == pytest.approx(0.0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_values_are_counted_and_do_not_affect_the_rest(value):
    picture = torch.full((1, 20, 20, 3), 0.5)
    picture[0, :5, :, 1] = value
    found = measure_appearance(picture)
    assert found.non_finite == pytest.approx(0.25)
    assert found.brightness == pytest.approx(0.5)
    everything = measure_appearance(torch.full((1, 20, 20, 3), value))
    assert everything.non_finite == 1
    assert math.isfinite(everything.brightness)


def test_a_source_is_cut_in_the_middle_and_resized():
    wide = torch.zeros(1, 20, 60, 3)
    wide[:, :, 20:40] = 1.0
    assert torch.equal(fit_image(wide, 20, 20), torch.ones(1, 20, 20, 3))
    assert torch.allclose(fit_image(wide, 40, 40), torch.ones(1, 40, 40, 3), atol=1e-6)
    tall = wide.transpose(1, 2)
    assert fit_image(tall, 10, 30).shape == (1, 10, 30, 3)
    picture = make_picture()
    assert torch.equal(fit_image(picture, 48, 48), picture)
    half = fit_image(picture, 24, 24)
    means = torch.nn.functional.avg_pool2d(picture.movedim(-1, 1), 2).movedim(1, -1)
    assert (half - means).abs().max() < 0.05


def test_a_mask_follows_the_images_as_the_source_does():
    mask = torch.zeros(2, 20, 60)
    mask[0, :10] = 1.0
    found = fit_mask(mask, 40, 40)
    assert found.dtype == torch.bool
    assert found[:20].all()
    assert not found[20:].any()
    assert torch.equal(fit_mask(mask[0], 40, 40), found)
