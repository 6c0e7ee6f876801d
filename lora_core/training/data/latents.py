"""The statistics of the VAE's latents, which the transformer expects removed.

Numbers: diffusers' AutoencoderKLQwenImage config and ComfyUI's latent_formats.Wan21, which agree.
Caches hold latents as the VAE gives them ("raw"); what the transformer sees is normalised.
"""

from __future__ import annotations

import torch

NUM_CHANNELS = 16
PIXELS_PER_LATENT = 8
#: What decoding takes of a VAE's file: ComfyUI's names and diffusers'.
DECODER_KEYS = ("decoder.", "conv2.", "post_quant_conv.")

_MEAN = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
_STD = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)


def normalize(raw: torch.Tensor) -> torch.Tensor:
    """(..., 16, h, w) as the VAE gives it -> what the transformer is trained on, in float32."""
    mean, std = get_statistics(raw)
    return (raw.float() - mean) / std


def denormalize(latents: torch.Tensor) -> torch.Tensor:
    """The inverse of `normalize`: what the VAE decodes."""
    mean, std = get_statistics(latents)
    return latents.float() * std + mean


def get_statistics(like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (NUM_CHANNELS, 1, 1)
    return (
        torch.tensor(_MEAN, device=like.device).view(shape),
        torch.tensor(_STD, device=like.device).view(shape),
    )


def count_target_tokens(height: int, width: int) -> int:
    """Tokens of latents of that size; odd sides are padded to whole patches."""
    return -(-height // 2) * -(-width // 2)
