"""Overhead of a sweep beyond sampling, counted in this process with ComfyUI's own executor."""

from __future__ import annotations

import asyncio
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from demo_base.prompts import load_tiny_base, node

pytestmark = pytest.mark.comfy

LORA = "sweep_costs.safetensors"
STRENGTHS = "0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 2"


@pytest.fixture(scope="module")
def lora(demo_models: Any) -> Iterator[str]:
    from demo_base.adapters import make_adapter

    path = demo_models.root / "loras" / LORA
    make_adapter(path, demo_models.dit["2509_fp32"], rank=8, delta_std=0.1)
    yield LORA
    path.unlink()


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch, comfyui: SimpleNamespace) -> Counter:
    """Counts calls of the real functions: files opened, weights patched, banks built, samplings."""
    from qwen_edit_lora.lora_core.disk import safetensors_file
    from qwen_edit_lora.nodes import load
    from qwen_edit_lora.nodes.patching import bank

    calls: Counter = Counter()

    def watch(owner: Any, name: str, what: str) -> None:
        original = getattr(owner, name)

        @functools.wraps(original)
        def counted(*args: Any, **kwargs: Any) -> Any:
            calls[what] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    watch(safetensors_file, "safe_open", "files mapped")
    watch(load, "read_adapter", "files read")
    watch(bank.Bank, "__init__", "banks built")
    watch(comfyui.lora, "calculate_weight", "weights patched")
    watch(comfyui.nodes, "common_ksampler", "samplings")
    watch(comfyui.nodes.VAEDecode, "decode", "decodings")
    return calls


def build_graph(strengths: str, **more: Any) -> dict[str, Any]:
    return {
        **load_tiny_base(),
        "prompt": node("CLIPTextEncode", clip=["clip", 0], text="red"),
        "latent": node("EmptyLatentImage", width=64, height=64, batch_size=1),
        "load": node("QwenEditLoraLoad", lora_name=LORA),
        "sweep": node(
            "QwenEditLoraSweep",
            model=["unet", 0],
            adapter=["load", 0],
            strengths=strengths,
            positive=["prompt", 0],
            negative=["prompt", 0],
            latent_image=["latent", 0],
            vae=["vae", 0],
            **{"seed": 1, "steps": 1, "cfg": 1.0, "sampler_name": "euler", "denoise": 1.0},
            scheduler="simple",
            **more,
        ),
        "pictures": node("PreviewImage", images=["sweep", 0]),
    }


@pytest.fixture
def run(executor: Any) -> Callable[[dict[str, Any]], list]:
    """Runs a graph; returns the outputs of its sweep."""

    def run(graph: dict[str, Any]) -> list:
        executor.execute(graph, "test", {}, ["pictures"])
        assert executor.success, executor.status_messages[-1]
        return asyncio.run(executor.caches.outputs.get("sweep")).outputs

    return run


def test_a_sweep_reads_the_file_once_and_touches_no_weight(run, executor, count, lora):
    executor.reset()
    images, latents, labels, *_ = run(build_graph(STRENGTHS))
    assert len(images) == len(latents) == len(labels) == 8
    assert count["files read"] == count["files mapped"] == count["banks built"] == 1
    assert count["weights patched"] == 0
    assert count["samplings"] == count["decodings"] == 8

    count.clear()
    run(build_graph(STRENGTHS + ", 3"))
    assert count == {"samplings": 1, "decodings": 1}


def test_the_counters_register_the_native_loader(run, count, lora):
    graph = build_graph("0, 1")
    graph["native"] = node(
        "LoraLoaderModelOnly", model=["unet", 0], lora_name=LORA, strength_model=0.5
    )
    graph["sweep"]["inputs"]["model"] = ["native", 0]
    run(graph)
    assert count["weights patched"] > 0


def test_all_64_images_are_on_comfyuis_intermediate_device(run, comfyui, lora):
    images, latents, *_ = run(build_graph("0:6.3:0.1"))
    place = comfyui.model_management.intermediate_device()
    assert place.type == "cpu"
    assert {image.device for image in images} == {place}
    assert {latent["samples"].device for latent in latents} == {place}
    # One image each, not a batch that grows.
    assert {tuple(image.shape) for image in images} == {(1, 64, 64, 3)}
    assert len({image.data_ptr() for image in images}) == 64
    assert {image.untyped_storage().nbytes() for image in images} == {64 * 64 * 3 * 4}


def test_the_shared_model_is_as_before_the_sweep(run, executor, lora):
    graph = build_graph("0, 2")
    run(graph)
    (model,) = asyncio.run(executor.caches.outputs.get("unet")).outputs[0]
    assert [m for m in model.model.modules() if "forward" in m.__dict__] == []
    assert model.model_options["transformer_options"] == {}
    before = {k: v.cpu().clone() for k, v in model.model.state_dict().items()}
    run(build_graph("0, 2, 3"))
    after = model.model.state_dict()
    assert all(torch.equal(before[key], after[key].cpu()) for key in before)
