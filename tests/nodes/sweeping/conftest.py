"""Graphs of a sweep, and the LoRAs in them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from demo_base.prompts import load_tiny_base, node

LORA = "sweep_a.safetensors"
RUN = ("sweep_run/step-9.safetensors", "sweep_run/step-10.safetensors")
SETTINGS = {
    "steps": 2,
    "cfg": 1.0,
    "sampler_name": "euler",
    "scheduler": "simple",
    "denoise": 1.0,
}


@pytest.fixture(scope="module")
def loras(demo_models: Any) -> Iterator[None]:
    from demo_base.adapters import make_adapter

    for number, name in enumerate((LORA, *RUN)):
        path = demo_models.root / "loras" / name
        make_adapter(path, demo_models.dit["2509_fp32"], rank=8, delta_std=0.3, seed=number)
    yield
    for name in (LORA, *RUN):
        (demo_models.root / "loras" / name).unlink()


def base_graph(size: int = 64) -> dict[str, Any]:
    return {
        **load_tiny_base(),
        "prompt": node("TextEncodeQwenImageEditPlus", clip=["clip", 0], prompt="red"),
        "latent": node("EmptyLatentImage", width=size, height=size, batch_size=1),
        "load": node("QwenEditLoraLoad", lora_name=LORA),
    }


LINKS = {
    "positive": ["prompt", 0],
    "negative": ["prompt", 0],
    "latent_image": ["latent", 0],
    "vae": ["vae", 0],
}


def sweep_graph(strengths: str = "0, 0.5, 1", size: int = 64, **more: Any) -> dict[str, Any]:
    """A sweep whose images and labels are shown; None removes an input."""
    inputs = {
        "model": ["unet", 0],
        "adapter": ["load", 0],
        "strengths": strengths,
        "seed": 1,
        **SETTINGS,
        **LINKS,
        **more,
    }
    inputs = {name: value for name, value in inputs.items() if value is not None}
    return {
        **base_graph(size),
        "sweep": node("QwenEditLoraSweep", **inputs),
        "pictures": node("SaveImage", images=["sweep", 0], filename_prefix="sweep"),
        "labels": node("PreviewAny", source=["sweep", 2]),
    }


def read_labels(entry: dict[str, Any]) -> list[str]:
    return entry["outputs"]["labels"]["text"]


CUSTOM = {
    "euler": node("KSamplerSelect", sampler_name="euler"),
    "levels": node("BasicScheduler", model=["unet", 0], scheduler="beta", steps=3, denoise=1.0),
    "noise": node("RandomNoise", noise_seed=1),
}


def own_sampler_graph() -> dict[str, Any]:
    """The models in the user's own sampler, which ComfyUI runs once per cell."""
    graph = sweep_graph("0, 0.5", seeds="1, 2", **dict.fromkeys(LINKS))
    links = {name: link for name, link in LINKS.items() if name != "vae"}
    inputs = {**SETTINGS, **links, "model": ["sweep", 4], "seed": ["sweep", 5]}
    graph["own"] = node("KSampler", **inputs)
    graph["decoded"] = node("VAEDecode", samples=["own", 0], vae=["vae", 0])
    graph["pictures"] = node("SaveImage", images=["decoded", 0], filename_prefix="own")
    return graph
