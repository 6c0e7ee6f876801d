"""The sweep's float tensors are bit-identical to those of hand-wired graphs; cancelling a sweep.

In this process, since a server's images are rounded to 8 bits and its messages may lag behind.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from demo_base.prompts import load_tiny_base, node

pytestmark = pytest.mark.comfy

LORA = "sweep_bits.safetensors"
KSAMPLER = {"steps": 2, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
COND = {"positive": ["prompt", 0], "negative": ["prompt", 0]}


@pytest.fixture(scope="module", autouse=True)
def lora(demo_models: Any) -> Iterator[None]:
    from demo_base.adapters import make_adapter

    path = demo_models.root / "loras" / LORA
    make_adapter(path, demo_models.dit["2509_fp32"], rank=8, delta_std=0.3)
    yield
    path.unlink()


def base_graph(strength: float | None = None) -> dict[str, Any]:
    """What sweeps and hand-wired graphs have in common; with a strength also Apply."""
    apply = node("QwenEditLoraApply", model=["unet", 0], adapter=["load", 0], strength=strength)
    return {
        **load_tiny_base(),
        "prompt": node("CLIPTextEncode", clip=["clip", 0], text="red"),
        "other": node("CLIPTextEncode", clip=["clip", 0], text="blue"),
        "latent": node("EmptyLatentImage", width=64, height=48, batch_size=1),
        "load": node("QwenEditLoraLoad", lora_name=LORA),
        "euler": node("KSamplerSelect", sampler_name="euler"),
        "levels": node("BasicScheduler", model=["unet", 0], scheduler="beta", steps=3, denoise=1.0),
        **({} if strength is None else {"apply": apply}),
    }


def sweep_graph(**more: Any) -> dict[str, Any]:
    inputs = {
        **{"model": ["unet", 0], "adapter": ["load", 0], "seed": 1, "latent_image": ["latent", 0]},
        **KSAMPLER,
        **COND,
        "vae": ["vae", 0],
        **more,
    }
    inputs = {name: value for name, value in inputs.items() if value is not None}
    graph = {**base_graph(), "sweep": node("QwenEditLoraSweep", **inputs)}
    return {**graph, "end": node("PreviewImage", images=["sweep", 0])}


def hand_graph(sampler: Callable[[list], dict], strength: float | None) -> dict[str, Any]:
    """`sampler` builds the nodes that sample with a model; strength None leaves the LoRA away."""
    model = ["unet", 0] if strength is None else ["apply", 0]
    return {
        **base_graph(strength),
        **sampler(model),
        "decoded": node("VAEDecode", samples=["sampler", 0], vae=["vae", 0]),
        "end": node("PreviewImage", images=["decoded", 0]),
    }


def use_ksampler(seed: int) -> Callable[[list], dict]:
    inputs = {**KSAMPLER, **COND, "seed": seed, "latent_image": ["latent", 0]}
    return lambda model: {"sampler": node("KSampler", model=model, **inputs)}


def use_custom_sampler(seed: int, guide: Callable[[list], dict]) -> Callable[[list], dict]:
    links = {"noise": ["noise", 0], "guider": ["guider", 0], "sampler": ["euler", 0]}
    links |= {"sigmas": ["levels", 0], "latent_image": ["latent", 0]}
    return lambda model: {
        "noise": node("RandomNoise", noise_seed=seed),
        "guider": guide(model),
        "sampler": node("SamplerCustomAdvanced", **links),
    }


def guide_by_cfg(model: list) -> dict[str, Any]:
    links = {"positive": ["prompt", 0], "negative": ["other", 0]}
    return node("CFGGuider", model=model, cfg=2.5, **links)


def guide_alone(model: list) -> dict[str, Any]:
    return node("BasicGuider", model=model, conditioning=["prompt", 0])


@pytest.fixture
def run(executor: Any) -> Callable[[dict[str, Any], str], list]:
    """Runs a graph; returns the outputs of a node of it."""

    def run(graph: dict[str, Any], name: str) -> list:
        executor.execute(graph, "bits", {}, ["end"])
        assert executor.success, executor.status_messages[-1]
        return asyncio.run(executor.caches.outputs.get(name)).outputs

    return run


CUSTOM = {"sampler": ["euler", 0], "sigmas": ["levels", 0]}
PATHS = {
    "ksampler": ({}, use_ksampler),
    "cfg guider": (
        {**CUSTOM, "negative": ["other", 0], "cfg": 2.5},
        functools.partial(use_custom_sampler, guide=guide_by_cfg),
    ),
    "basic guider": (
        {**CUSTOM, "negative": None},
        functools.partial(use_custom_sampler, guide=guide_alone),
    ),
}


@pytest.mark.parametrize("path", PATHS)
def test_latents_and_images_equal_the_hand_wired_ones_bit_for_bit(path, run, executor):
    connected, use_sampler = PATHS[path]
    images, latents, _, strengths, _, seeds, _ = run(
        sweep_graph(strengths="-0.5, 0, 0.3, 1", seeds="1, 4", **connected), "sweep"
    )
    assert list(zip(seeds, strengths, strict=True)) == [
        (seed, strength) for seed in (1, 4) for strength in (0, -0.5, 0.3, 1)
    ]
    for seed, strength, image, latent in zip(seeds, strengths, images, latents, strict=True):
        executor.reset()  # otherwise the cache would return the sweep's own tensors
        graph = hand_graph(use_sampler(seed), strength or None)
        ((image_by_hand,),) = run(graph, "decoded")
        (latent_by_hand,) = asyncio.run(executor.caches.outputs.get("sampler")).outputs[0]
        assert latent_by_hand["samples"] is not latent["samples"]
        assert latent["samples"].dtype == image.dtype == torch.float32
        assert torch.equal(latent["samples"], latent_by_hand["samples"])
        assert torch.equal(image, image_by_hand)
    distinct = {tuple(latent["samples"].flatten().tolist()) for latent in latents}
    assert len(distinct) == 8


@pytest.fixture
def count_calls(comfyui: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Counts the model's calls, and interrupts during the one with number `interrupt_in`."""
    import comfy.model_base

    state = SimpleNamespace(calls=0, interrupt_in=0)
    original = comfy.model_base.QwenImage.apply_model

    def counted(self, *args, **kwargs):
        state.calls += 1
        if state.calls == state.interrupt_in:
            comfyui.model_management.interrupt_current_processing()
        return original(self, *args, **kwargs)

    monkeypatch.setattr(comfy.model_base.QwenImage, "apply_model", counted)
    return state


def test_after_a_cancel_no_further_step_begins_and_finished_cells_are_not_repeated(
    executor, count_calls, run
):
    executor.reset()
    graph = sweep_graph(strengths="0, 0.5, 1", steps=5, seed=9)
    count_calls.interrupt_in = 5 + 2  # the second step of the second image
    executor.execute(graph, "cancelled", {}, ["end"])
    assert not executor.success
    assert executor.status_messages[-1][0] == "execution_interrupted"
    assert count_calls.calls == 7  # a step of Euler is one call: the one that ran was the last
    count_calls.calls, count_calls.interrupt_in = 0, 0
    images, *_ = run(graph, "sweep")
    assert len(images) == 3
    assert count_calls.calls == 2 * 5
