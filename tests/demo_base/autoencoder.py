"""The demo base's VAE: ComfyUI's WanVAE, 12 instead of 96 channels wide.

The encoder is constructed (components.py); the decoder is trained to invert it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from .components import (
    LATENT_CHANNELS,
    LATENT_MEAN,
    LATENT_STD,
    compute_components,
    craft_decoder,
    craft_encoder,
    craft_latents,
)
from .photographs import read_pictures, sample_crops

VAE_WIDTH = 12
STEPS = 4000
LATENT_NOISE = 0.05  # of the latents in training, for the sampler's own errors


def make_vae(device: str = "meta", width: int = VAE_WIDTH) -> torch.nn.Module:
    """The Wan VAE that Qwen-Image uses (comfy/sd.py), narrow."""
    from comfy.ldm.wan.vae import WanVAE

    with torch.device(device):
        return WanVAE(
            dim=width,
            z_dim=LATENT_CHANNELS,
            dim_mult=[1, 2, 4, 4],
            num_res_blocks=2,
            attn_scales=[],
            temperal_downsample=[False, True, True],
        )


def make_random_weights(width: int) -> dict[str, torch.Tensor]:
    """Of a VAE that nobody trained, whose latents and images are finite and no constants."""
    generator = torch.Generator().manual_seed(width)
    weights = {}
    for name, tensor in make_vae(width=width).state_dict().items():
        if tensor.ndim == 1 or name.endswith("gamma"):
            weights[name] = torch.full(tensor.shape, float(name.endswith("gamma")))
        else:
            noise = torch.randn(tensor.shape, generator=generator)
            weights[name] = noise / tensor[0].numel() ** 0.5
    return weights


def use_images(module: torch.nn.Module) -> None:
    """Makes a WanVAE run its convolutions in two dimensions: a single frame needs no third."""
    from comfy.ldm.wan.vae import CausalConv3d

    def forward(conv: Any, frames: torch.Tensor, **_: Any) -> torch.Tensor:
        kernel, padding = conv.weight[:, :, -1], conv.padding[1:]
        return F.conv2d(frames[:, :, 0], kernel, conv.bias, padding=padding).unsqueeze(2)

    for conv in module.modules():
        if isinstance(conv, CausalConv3d):
            conv.forward = partial(forward, conv)


def craft_vae() -> tuple[torch.nn.Module, list[torch.Tensor]]:
    """A float32 WanVAE on the CPU before its decoder's training, and the training images."""
    pictures = read_pictures()
    components = compute_components(pictures)
    vae = make_vae("cpu").requires_grad_(False)
    state_dict = vae.state_dict()
    craft_encoder(state_dict, components.matrices)
    craft_latents(state_dict, components)
    craft_decoder(state_dict, pictures, components)
    for tensor in state_dict.values():
        tensor.copy_(tensor.bfloat16())  # as stored in the file
    return vae, pictures


def encode(vae: torch.nn.Module, pictures: torch.Tensor) -> torch.Tensor:
    """Images (n, 3, height, width) in [-1, 1] to latents normalised as the DiT sees them."""
    raw = vae.encode(pictures.unsqueeze(2)).squeeze(2)
    return (raw - LATENT_MEAN[:, None, None]) / LATENT_STD[:, None, None]


def decode(vae: torch.nn.Module, latents: torch.Tensor) -> torch.Tensor:
    """The reverse of `encode`, not clamped."""
    raw = latents * LATENT_STD[:, None, None] + LATENT_MEAN[:, None, None]
    return vae.decode(raw.unsqueeze(2)).squeeze(2)


def compute_psnr(pictures: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio of each image in dB, (n,); values in [-1, 1]."""
    error = (pictures - others.clamp(-1, 1)).square().flatten(1).mean(1)
    return 10 * torch.log10(4 / error)


def train_decoder(
    vae: torch.nn.Module,
    pictures: list[torch.Tensor],
    *,
    steps: int = STEPS,
    batch: int = 12,
    learning_rate: float = 7e-4,
    report: Callable[[int, float], None],
) -> None:
    """Trains `decoder.*` and `conv2` in place; `report(step, loss)` is called after every step."""
    generator = torch.Generator().manual_seed(3)
    trained = {
        key: parameter.requires_grad_()
        for key, parameter in vae.named_parameters()
        if key.startswith(("decoder.", "conv2."))
        and not any(part in key for part in ("time_conv", "to_qkv", "proj", "middle.1."))
    }
    optimizer = torch.optim.Adam(trained.values(), lr=learning_rate, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=steps + 1, pct_start=0.05
    )
    for step in range(1, steps + 1):
        crops = sample_crops(pictures, batch, generator)
        with torch.no_grad():
            latents = encode(vae, crops)
            latents += LATENT_NOISE * torch.randn(latents.shape, generator=generator)
        loss = (decode(vae, latents) - crops).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        schedule.step()
        report(step, loss.item())
    vae.requires_grad_(False)
