"""Trains the demo base's DiT to reproduce its first reference for any prompt."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import dit
from .autoencoder import encode
from .photographs import read_pictures, sample_crops

STEPS = 1500
BATCH = 4
NUM_CROPS = 256
CROP = 160  # pixels
SIDES = (8, 12, 16, 20)  # of the target, in latent pixels
LONGEST_PROMPT = 60  # tokens


def build_dit(state_dict: dict[str, torch.Tensor]) -> Any:
    """The engine's own model with these weights, float32 on the CPU.

    Not ComfyUI's class, whose rotary embedding has no gradient.
    """
    import tempfile

    from qwen_edit_lora.lora_core.training.model.loading import load_transformer

    with tempfile.TemporaryDirectory() as folder:
        path = dit.write_dit(Path(folder) / "dit.safetensors", "2509", "fp32", state_dict)
        return load_transformer(path, "fp32", compute_dtype=torch.float32)


def make_latents(vae: nn.Module) -> torch.Tensor:
    """Random crops of the VAE's photographs as latents, (NUM_CROPS, 16, CROP / 8, CROP / 8)."""
    generator = torch.Generator().manual_seed(6)
    crops = sample_crops(read_pictures(), NUM_CROPS, generator, CROP)
    with torch.no_grad():
        return torch.cat([encode(vae, part) for part in crops.split(16)])


def draw_text(count: int, generator: torch.Generator) -> torch.Tensor:
    """Random prompts, (count, tokens, TEXT_WIDTH), as similar as an encoder's tokens."""
    length = int(torch.randint(1, LONGEST_PROMPT, (1,), generator=generator))
    shared = torch.randn(count, 1, dit.TEXT_WIDTH, generator=generator)
    return shared + torch.randn(count, length, dit.TEXT_WIDTH, generator=generator)


def train_copying(
    model: Any,
    latents: torch.Tensor,
    *,
    steps: int = STEPS,
    learning_rate: float = 3e-4,
    report: Callable[[int, float], None],
) -> None:
    """Flow matching with the first reference as the target, in place.

    `latents` are (count, 16, height, width), normalised, at least SIDES large. Every other step
    runs as 2511, whose references are at timestep 0. A velocity's error is weighted by sigma: the
    nearer the end, the more it exaggerates the error of the image.
    """
    generator = torch.Generator().manual_seed(4)

    def choose(*options: Any) -> Any:
        return options[int(torch.randint(len(options), (1,), generator=generator))]

    def draw_images(height: int, width: int) -> torch.Tensor:
        chosen = torch.randint(len(latents), (BATCH,), generator=generator)
        top = choose(*range(latents.shape[2] - height + 1))
        left = choose(*range(latents.shape[3] - width + 1))
        contrast = 0.5 + torch.rand(BATCH, 1, 1, 1, generator=generator)
        return contrast * latents[chosen, :, top : top + height, left : left + width]

    model.requires_grad_()
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=steps + 1, pct_start=0.1
    )
    for step in range(1, steps + 1):
        model.zero_cond_t = step % 2 == 0
        target = draw_images(choose(*SIDES), choose(*SIDES))
        others = [draw_images(choose(*SIDES), choose(*SIDES)) for _ in range(choose(0, 0, 0, 1, 2))]
        noise = torch.randn(target.shape, generator=generator)
        sigma = 0.02 + 0.98 * torch.rand(BATCH, generator=generator)
        wide = sigma.view(-1, 1, 1, 1)
        noisy = (1 - wide) * target + wide * noise
        text = draw_text(BATCH, generator)
        velocity = model(noisy, [target, *others], text, None, sigma)
        loss = (wide * (velocity - (noise - target)).square()).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        report(step, loss.item())
    model.requires_grad_(False)
