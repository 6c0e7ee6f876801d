"""Samples on disk: latents as the VAE encodes them, and PNG images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ...disk.own_folders import make_own_folder
from ...disk.writing import explain, write_then_rename
from ...errors import FileError
from ..data.latents import denormalize


def write_latents(latents: torch.Tensor, stem: Path) -> Path:
    """Normalised (1, 16, H, W) -> STEM.safetensors with the raw `samples` (1, 16, 1, H, W)."""
    samples = denormalize(latents)[:, :, None].cpu().contiguous()
    path = stem.with_name(f"{stem.name}.safetensors")
    return write(path, lambda temporary: save_file({"samples": samples}, temporary))


def write_image(image: torch.Tensor, stem: Path) -> Path:
    """(3, H, W) in [0, 1] -> STEM.png."""
    from PIL import Image

    pixels = (image.permute(1, 2, 0) * 255).round().byte().cpu().numpy()
    path = stem.with_name(f"{stem.name}.png")
    return write(path, lambda temporary: Image.fromarray(pixels).save(temporary, "png"))


def write(path: Path, save: Callable[[Path], object]) -> Path:
    try:
        make_own_folder(path.parent)  # no more: a job's folder may have been moved away
        write_then_rename(path, save)
    except (OSError, SafetensorError) as e:
        raise FileError(
            "{path} cannot be written: {reason}.", path=path.name, reason=explain(e)
        ) from None
    return path
