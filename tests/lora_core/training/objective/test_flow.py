"""Flow matching, with diffusers and plain numbers as oracles."""

from __future__ import annotations

import math

import pytest
import torch
from qwen_edit_lora.lora_core import ConfigError
from qwen_edit_lora.lora_core.training.objective import flow


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def u():
    return (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000


def get_percentiles(sigma: torch.Tensor) -> list[float]:
    return [round(sigma.quantile(q).item(), 2) for q in (0.1, 0.5, 0.9)]


def make_scheduler(**options):
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, **options
    )


def test_noising_is_that_of_the_scheduler():
    x_0, noise = torch.randn(2, 16, 4, 4), torch.randn(2, 16, 4, 4)
    scheduler = make_scheduler()
    sigma = scheduler.sigmas[[10, 700]]
    expected = scheduler.scale_noise(x_0, scheduler.timesteps[[10, 700]], noise)
    torch.testing.assert_close(flow.add_noise(x_0, noise, sigma), expected)


def test_an_euler_step_along_the_true_velocity_ends_at_the_clean_latents():
    x_0, noise = torch.randn(2, 16, 4, 4), torch.randn(2, 16, 4, 4)
    sigma = torch.tensor([0.3, 0.9])
    x_sigma = flow.add_noise(x_0, noise, sigma)
    torch.testing.assert_close(flow.predict_x_0(x_sigma, noise - x_0, sigma), x_0)


@pytest.mark.parametrize("num_steps", [1, 4, 20])
@pytest.mark.parametrize("num_tokens", [1024, 4096, 6889])
def test_the_levels_of_a_run_are_those_of_the_scheduler(num_steps, num_tokens):
    scheduler = make_scheduler(shift_terminal=0.02 if num_steps > 1 else None)
    mu = flow.compute_mu(num_tokens)
    scheduler.set_timesteps(
        sigmas=torch.linspace(1, 1 / num_steps, num_steps, dtype=torch.float64).tolist(), mu=mu
    )
    levels = flow.build_sigmas(num_steps, "diffusers", num_tokens)
    torch.testing.assert_close(levels, scheduler.sigmas, atol=1e-6, rtol=0)


def test_the_shift_by_tokens_is_that_of_the_pipeline():
    from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import calculate_shift

    for num_tokens in (256, 1024, 4096, 8192):
        expected = calculate_shift(num_tokens, 256, 8192, 0.5, 0.9)
        assert flow.compute_mu(num_tokens) == pytest.approx(expected)


def test_the_levels_of_comfyui_are_shifted_by_3_158_and_not_stretched(u):
    levels = flow.build_sigmas(4, "comfyui", 4096)
    shift = math.exp(1.15)
    expected = [shift * t / (1 + (shift - 1) * t) for t in (1, 0.75, 0.5, 0.25, 0)]
    assert levels.tolist() == pytest.approx(expected)
    assert get_percentiles(flow.choose_sigmas(u, "inference")) == [0.26, 0.76, 0.97]


# Percentiles from survey/trainers.md 1.4, measured on the trainers themselves.
@pytest.mark.parametrize(
    ("options", "percentiles"),
    [
        ({"sampling": "uniform"}, [0.10, 0.50, 0.90]),
        ({"sampling": "logit-normal"}, [0.22, 0.50, 0.78]),
        ({"sampling": "shift", "shift": 2.2}, [0.38, 0.69, 0.89]),
        ({"sampling": "resolution-shift", "num_tokens": 4096}, [0.36, 0.67, 0.88]),
    ],
    ids=lambda value: value["sampling"] if isinstance(value, dict) else None,
)
def test_noise_levels_have_the_percentiles_of_the_other_trainers(options, percentiles, u):
    assert get_percentiles(flow.choose_sigmas(u, **options)) == percentiles


def test_logit_normal_is_the_distribution_that_diffusers_draws_from(u):
    from diffusers.training_utils import compute_density_for_timestep_sampling

    drawn = compute_density_for_timestep_sampling("logit_normal", 200_000, -0.5, 1.3)
    ours = flow.choose_sigmas(u, "logit-normal", mean=-0.5, std=1.3).float()
    for q in (0.05, 0.25, 0.5, 0.75, 0.95):
        assert ours.quantile(q).item() == pytest.approx(drawn.quantile(q).item(), abs=5e-3)


def test_the_range_bounds_every_level(u):
    sigma = flow.choose_sigmas(u, "shift", sigma_range=(0.2, 0.6))
    assert 0.2 < sigma.min() < sigma.max() < 0.6


@pytest.mark.parametrize(("ours", "theirs"), [("sigma-sqrt", "sigma_sqrt"), ("cosmap", "cosmap")])
def test_weights_are_those_of_diffusers(ours, theirs):
    from diffusers.training_utils import compute_loss_weighting_for_sd3

    sigma = torch.linspace(0.01, 1, 50)
    torch.testing.assert_close(
        flow.weigh(sigma, ours), compute_loss_weighting_for_sd3(theirs, sigma)
    )


def test_the_bell_is_diffsynths_up_to_a_factor_and_has_mean_1(u):
    sigma = torch.tensor([1, 0.9, 0.75, 0.5, 0.02])
    diffsynth = torch.tensor([0, 0.51, 1.18, 1.68, 0.10])  # survey/trainers.md 1.4
    torch.testing.assert_close(flow.weigh(sigma, "bell"), diffsynth * 0.94, atol=0.01, rtol=0)
    assert flow.weigh(u, "bell").mean().item() == pytest.approx(1, abs=1e-4)


def test_no_weight_is_infinite_at_either_end():
    for weighting in flow.WEIGHTINGS:
        assert torch.isfinite(flow.weigh(torch.tensor([0.0, 1.0]), weighting)).all()


def test_the_loss_is_the_mean_square_of_each_sample():
    velocity, x_0, noise = torch.randn(3, 2, 16, 4, 6).unbind()
    expected = [
        torch.nn.functional.mse_loss(v, n - x).item()
        for v, x, n in zip(velocity, x_0, noise, strict=True)
    ]
    assert flow.compute_loss(velocity, x_0, noise).tolist() == pytest.approx(expected)


def test_a_mask_of_ones_changes_nothing_and_zeros_hide_a_place():
    velocity, x_0, noise = torch.randn(3, 1, 16, 4, 6).unbind()
    plain = flow.compute_loss(velocity, x_0, noise)
    torch.testing.assert_close(
        flow.compute_loss(velocity, x_0, noise, torch.ones(1, 1, 4, 6)), plain
    )
    mask = torch.zeros(1, 1, 4, 6)
    mask[..., :2] = 0.5
    spoiled = velocity.clone()
    spoiled[..., 2:] = 1e6
    masked = flow.compute_loss(spoiled, x_0, noise, mask)
    left = flow.compute_loss(velocity[..., :2], x_0[..., :2], noise[..., :2])
    torch.testing.assert_close(masked, left)


@pytest.mark.parametrize("call", [
    lambda u: flow.choose_sigmas(u, "sometimes"),
    lambda u: flow.weigh(u, "heavy"),
    lambda u: flow.build_sigmas(4, "karras", 1024),
])  # fmt: skip
def test_an_error_for_unknown_names_lists_the_known_ones(call, u):
    with pytest.raises(ConfigError, match=r"unknown .*; expected one of "):
        call(u)
