"""Samplers, single model calls, and decoded latents."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import torch

from .models import ModelPatcher


def list_samplers() -> list[str]:
    return list(comfy.samplers.KSampler.SAMPLERS)


def list_schedulers() -> list[str]:
    return list(comfy.samplers.KSampler.SCHEDULERS)


class _PredictionSampler(comfy.samplers.Sampler):
    """Stands in for a sampler: one model call per sigma, each on the latent noised to it."""

    def __init__(self, record: Callable[[int, torch.Tensor, torch.Tensor], None]):
        self.record = record

    def sample(
        self,
        model_wrap: Any,
        sigmas: torch.Tensor,
        extra_args: dict[str, Any],
        callback: Any,
        noise: torch.Tensor,
        latent_image: torch.Tensor | None = None,
        *_: Any,
        **__: Any,
    ) -> torch.Tensor:
        sampling = model_wrap.inner_model.model_sampling
        for index, sigma in enumerate(sigmas):
            comfy.model_management.throw_exception_if_processing_interrupted()
            x = sampling.noise_scaling(sigma, noise, latent_image)
            denoised = model_wrap(x, sigma.expand(len(x)), **extra_args)
            self.record(index, x, denoised)
        return noise


def predict(
    model: ModelPatcher,
    positive: Any,
    latent: Mapping[str, Any],
    sigmas: list[float],
    seed: int,
    record: Callable[[int, torch.Tensor, torch.Tensor], None],
) -> None:
    """Calls the model once per sigma like a sampler at cfg 1, without sampling.

    Args:
        record: gets (index of the sigma, x, denoised), both float32 on the model's device.
    """
    samples = comfy.sample.fix_empty_latent_channels(
        model,
        latent["samples"],
        latent.get("downscale_ratio_spacial"),
        latent.get("downscale_ratio_temporal"),
    )
    noise = comfy.sample.prepare_noise(samples, seed, latent.get("batch_index"))
    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds({"positive": positive})
    guider.sample(noise, samples, _PredictionSampler(record), torch.tensor(sigmas), seed=seed)


def add_block_recorder(model: ModelPatcher, record: Callable[[int, torch.Tensor], None]) -> None:
    """`record` gets (block, image tokens) after each block of this clone.

    The tokens are (batch, tokens, width), without those of text and references. ComfyUI runs a
    Qwen-Image-2.1 without its prefix cache as long as this clone is recorded.
    """

    def watch_double(values: dict[str, Any]) -> dict[str, Any]:
        tokens = values["img"]
        references = values["transformer_options"].get("reference_image_num_tokens", ())
        record(values["block_index"], tokens[:, : tokens.shape[1] - sum(references)])
        return values

    def watch_single(values: dict[str, Any]) -> dict[str, Any]:
        # One sequence: text, references, target; one token per pixel of the latent x.
        rows, columns = values["x"].shape[-2:]
        record(values["block_index"], values["img"][:, -rows * columns :])
        return values

    # A model calls only the kind that its blocks are: Qwen-Image double, Qwen-Image-2.1 single.
    model.set_model_double_block_patch(watch_double)
    model.set_model_patch(watch_single, "single_block")


def decode_latents(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Latents as encoded by the VAE -> images (n, height, width, channels) in [0, 1].

    Qwen-Image: (1, 16, 1, H, W), 3 channels. Qwen-Image-2.1: (1, 64, H, W), 4 channels, with alpha.
    """
    images = vae.decode(latents)
    return images.reshape(-1, *images.shape[-3:])
