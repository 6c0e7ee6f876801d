"""Flow matching as Qwen-Image was trained: noising, noise levels, weights, loss.

Legend: x_0 clean latents, sigma in [0, 1] the share of noise, x_sigma = (1 - sigma) * x_0 +
sigma * noise, velocity = noise - x_0 (Lipman et al. 2023; Esser et al. 2024, section 2). Shapes:
B samples, C = 16 channels, H x W latent pixels. Every noise level is a function of a uniform
number u in (0, 1), so that a draw depends on nothing but that number.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from ...errors import ConfigError

#: ComfyUI's default for Qwen-Image (comfy/supported_models.py); a shift of e^1.15 = 3.158.
COMFYUI_MU = 1.15
#: diffusers' scheduler_config: mu is linear in the target's tokens, the last level is 0.02.
MU_POINTS = ((256, 0.5), (8192, 0.9))
SHIFT_TERMINAL = 0.02
#: Below this level `sigma_sqrt` would weigh a sample a million times.
MIN_WEIGHTED_SIGMA = 1e-3

SAMPLINGS = ("uniform", "logit-normal", "shift", "resolution-shift", "inference")
SCHEDULES = ("comfyui", "diffusers")


def add_noise(x_0: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """x_sigma of (B, C, H, W) latents at the levels `sigma` (B,)."""
    sigma = expand_like(sigma, x_0)
    return (1 - sigma) * x_0 + sigma * noise


def predict_x_0(x_sigma: torch.Tensor, velocity: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """The clean latents that a predicted velocity points to: x_sigma - sigma * velocity."""
    return x_sigma - expand_like(sigma, x_sigma) * velocity


def expand_like(sigma: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(B,) -> (B, 1, 1, 1)."""
    return sigma.to(like.dtype).view(-1, *[1] * (like.ndim - 1))


def compute_loss(
    velocity: torch.Tensor,
    x_0: torch.Tensor,
    noise: torch.Tensor,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean squared error of the velocity.

    Args:
        velocity: (B, C, H, W), the model's output on the target's tokens.
        mask: (B, 1, H, W) weights >= 0 of the positions; the mean is taken over the weights, so a
            small region counts as much as a large one.

    Returns:
        One float32 loss per sample, (B,).
    """
    error = (velocity.float() - (noise.float() - x_0.float())).square()
    if mask is None:
        return error.flatten(1).mean(1)
    mask = mask.float().expand_as(error)
    return (error * mask).flatten(1).sum(1) / mask.flatten(1).sum(1)


def shift_sigma(t: torch.Tensor, mu: float) -> torch.Tensor:
    """e^mu / (e^mu + 1/t - 1): exponential time shift, written so that t = 0 gives 0."""
    shift = math.exp(mu)
    return shift * t / (1 + (shift - 1) * t)


def compute_mu(num_tokens: int) -> float:
    """The shift of the official schedule for a target of `num_tokens` (2 x 2 latent pixels each).

    References do not count (pipeline_qwenimage_edit_plus.py, `calculate_shift`).
    """
    (x_1, y_1), (x_2, y_2) = MU_POINTS
    return y_1 + (num_tokens - x_1) * (y_2 - y_1) / (x_2 - x_1)


def apply_schedule(t: torch.Tensor, schedule: str, num_tokens: int) -> torch.Tensor:
    """Times in [0, 1] -> the noise levels at which that program samples."""
    if schedule == "comfyui":
        return shift_sigma(t, COMFYUI_MU)
    if schedule != "diffusers":
        raise ConfigError(
            "unknown schedule {schedule!r}; expected one of {schedules}",
            schedule=schedule,
            schedules=", ".join(SCHEDULES),
        )
    return shift_sigma(t, compute_mu(num_tokens))


def build_sigmas(num_steps: int, schedule: str, num_tokens: int) -> torch.Tensor:
    """Levels of an Euler run, (num_steps + 1,), from 1 down to 0."""
    t = torch.linspace(1, 1 / num_steps, num_steps, dtype=torch.float64)
    sigmas = apply_schedule(t, schedule, num_tokens)
    if num_steps > 1:
        sigmas = stretch(sigmas, schedule, sigmas[-1].item())
    return torch.cat([sigmas, sigmas.new_zeros(1)]).float()


def stretch(sigmas: torch.Tensor, schedule: str, last: float) -> torch.Tensor:
    """Moves the level `last` to 0.02 and leaves 1 in place, as diffusers does and ComfyUI does not.

    FlowMatchEulerDiscreteScheduler.stretch_shift_to_terminal.
    """
    if schedule != "diffusers":
        return sigmas
    return 1 - (1 - sigmas) * (1 - SHIFT_TERMINAL) / (1 - last)


def choose_sigmas(
    u: torch.Tensor,
    sampling: str,
    *,
    mean: float = 0.0,
    std: float = 1.0,
    shift: float = 2.2,
    schedule: str = "comfyui",
    num_tokens: int = 4096,
    sigma_range: tuple[float, float] = (0.0, 1.0),
) -> torch.Tensor:
    """Noise levels from uniform numbers, of the same shape.

    Args:
        u: float64 in (0, 1).
        sampling: "uniform"; "logit-normal" of `mean` and `std` (Esser et al. 2024, section 3.1);
            "shift", a logit-normal moved by ln(`shift`), as musubi-tuner recommends with 2.2;
            "resolution-shift", the same with the official shift for `num_tokens`; "inference",
            the levels at which `schedule` samples, uniform in time.
        sigma_range: levels are mapped linearly onto this part of [0, 1].
    """
    low, high = sigma_range
    samplings: dict[str, Callable[[], torch.Tensor]] = {
        "uniform": lambda: u,
        "logit-normal": lambda: logit_normal(u, mean, std),
        "shift": lambda: logit_normal(u, mean + math.log(shift), std),
        "resolution-shift": lambda: logit_normal(u, mean + compute_mu(num_tokens), std),
        "inference": lambda: stretch(apply_schedule(u, schedule, num_tokens), schedule, 0.0),
    }
    if sampling not in samplings:
        raise ConfigError(
            "unknown sampling {sampling!r}; expected one of {samplings}",
            sampling=sampling,
            samplings=", ".join(SAMPLINGS),
        )
    return low + (high - low) * samplings[sampling]()


def logit_normal(u: torch.Tensor, mean: float, std: float) -> torch.Tensor:
    """The quantile function of sigmoid(mean + std * normal)."""
    return (mean + std * torch.special.ndtri(u)).sigmoid()


def weigh_none(sigma: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(sigma)


def weigh_sigma_sqrt(sigma: torch.Tensor) -> torch.Tensor:
    """1 / sigma^2 (diffusers' `compute_loss_weighting_for_sd3`), bounded near 0."""
    return sigma.clamp_min(MIN_WEIGHTED_SIGMA) ** -2


def weigh_cosmap(sigma: torch.Tensor) -> torch.Tensor:
    """2 / (pi * (1 - 2 sigma + 2 sigma^2)) (Esser et al. 2024, section 3.1)."""
    return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))


def weigh_bell(sigma: torch.Tensor) -> torch.Tensor:
    """exp(-2 (sigma - 1/2)^2) less its value at the ends, of mean 1 over [0, 1].

    DiffSynth's weighting (diffsynth/diffusion/flow_match.py) times 0.94: there the mean is 1 over
    the shifted levels of one schedule.
    """
    floor = math.exp(-0.5)
    mean = math.sqrt(math.pi / 2) * math.erf(math.sqrt(0.5)) - floor
    return ((-2 * (sigma - 0.5) ** 2).exp() - floor).clamp_min(0) / mean


WEIGHTINGS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "none": weigh_none,
    "sigma-sqrt": weigh_sigma_sqrt,
    "cosmap": weigh_cosmap,
    "bell": weigh_bell,
}


def weigh(sigma: torch.Tensor, weighting: str) -> torch.Tensor:
    """The loss weight of each level.

    Raises:
        ConfigError: no such weighting.
    """
    if weighting not in WEIGHTINGS:
        raise ConfigError(
            "unknown weighting {weighting!r}; expected one of {weightings}",
            weighting=weighting,
            weightings=", ".join(WEIGHTINGS),
        )
    return WEIGHTINGS[weighting](sigma)
