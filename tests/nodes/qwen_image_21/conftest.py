"""A tiny Qwen-Image-2.1 in each layout of its files, loaded and sampled by ComfyUI's own code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from demo_base import dit_21


@pytest.fixture(scope="session")
def files_21(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Layout -> file of the same weights."""
    folder = tmp_path_factory.mktemp("qwen_image_21")
    return {
        layout: dit_21.write_dit(folder / f"tiny_{layout}.safetensors", layout)
        for layout in dit_21.LAYOUTS
    }


@pytest.fixture
def load_21(comfyui: SimpleNamespace, files_21: dict[str, Path]) -> Callable[[str], Any]:
    """Loads a tiny 2.1 like the stock UNETLoader: "split", "fused" or "int8_convrot"."""

    def load(layout: str) -> Any:
        with torch.inference_mode():
            return comfyui.sd.load_diffusion_model(str(files_21[layout]))

    return load


@pytest.fixture(params=dit_21.LAYOUTS)
def base_21(request: pytest.FixtureRequest, load_21: Callable[[str], Any]) -> Any:
    return load_21(request.param)


@pytest.fixture
def conditioning_21() -> Any:
    """9 tokens of text with one reference of 6 x 8 after the fourth."""
    generator = torch.Generator().manual_seed(7)
    reference = torch.randn(1, dit_21.CHANNELS, 6, 8, generator=generator)
    tokens = torch.randn(1, 9, dit_21.TEXT_WIDTH, generator=generator)
    return [[tokens, {"reference_latents": [reference], "image_slots": [4]}]]


@pytest.fixture
def sample_21(comfyui: SimpleNamespace, conditioning_21: Any) -> Callable[..., torch.Tensor]:
    """Two Euler steps with one reference: MODEL -> latent (1, 64, 8, 6)."""

    def run(model: Any, seed: int = 3, steps: int = 2) -> torch.Tensor:
        with torch.inference_mode():
            latent = {"samples": torch.zeros(1, dit_21.CHANNELS, 8, 6)}
            options = (seed, steps, 1.0, "euler", "simple", conditioning_21, conditioning_21)
            (result,) = comfyui.nodes.common_ksampler(model, *options, latent)
        return result["samples"].clone()

    return run
