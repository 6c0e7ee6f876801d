"""Sweep, grid and effect on a 2.1: 4-D latents, images with alpha, single blocks."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from demo_base import dit_21
from demo_base.prompts import load_tiny_base, node
from qwen_edit_lora.lora_core import write_adapter
from qwen_edit_lora.lora_core.adapter.strengths import Strengths

from .test_apply import build_adapter

pytestmark = pytest.mark.comfy

LORA, TURBO = "sweep_21.safetensors", "turbo_21.safetensors"
BASE = "tiny_21_fused.safetensors"
SIGMAS = (0.8, 0.3)


@pytest.fixture(scope="module", autouse=True)
def files(demo_models: Any, files_21: dict[str, Path]) -> Iterator[None]:
    base = demo_models.root / "diffusion_models" / BASE
    shutil.copyfile(files_21["fused"], base)
    loras = [demo_models.root / "loras" / name for name in (LORA, TURBO)]
    for seed, path in enumerate(loras):
        write_adapter(build_adapter(seed=1000 * seed), path)
    yield
    for path in (base, *loras):
        path.unlink()


class TinyVae:
    """4-D latents at 1/16 of the size to images with alpha, by fixed weights."""

    def decode(self, samples: torch.Tensor) -> torch.Tensor:
        assert samples.ndim == 4
        weights = torch.randn(4, samples.shape[1], generator=torch.Generator().manual_seed(1))
        images = torch.einsum("kc,nchw->nhwk", weights / 8, samples).sigmoid()
        return images.repeat_interleave(16, 1).repeat_interleave(16, 2)


class LoadTinyVae:
    RETURN_TYPES, FUNCTION, CATEGORY = ("VAE",), "load", "tests"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {}}

    def load(self) -> tuple[TinyVae]:
        return (TinyVae(),)


@pytest.fixture
def run(executor: Any, comfyui: Any, monkeypatch: Any) -> Callable[[dict[str, Any], str], list]:
    """Runs a graph; returns the outputs of a node of it."""
    monkeypatch.setitem(comfyui.nodes.NODE_CLASS_MAPPINGS, "LoadTinyVae", LoadTinyVae)

    def run(graph: dict[str, Any], name: str) -> list:
        executor.execute(graph, "sweep_21", {}, ["end"])
        assert executor.success, executor.status_messages[-1]
        return asyncio.run(executor.caches.outputs.get(name)).outputs

    return run


def base_graph() -> dict[str, Any]:
    """The turbo LoRA stays below what is swept."""
    return {
        **load_tiny_base(),
        "unet": node("UNETLoader", unet_name=BASE, weight_dtype="default"),
        "vae": node("LoadTinyVae"),
        "prompt": node("CLIPTextEncode", clip=["clip", 0], text="red"),
        "latent": node("EmptyLatentImage", width=256, height=192, batch_size=1),
        "load": node("QwenEditLoraLoad", lora_name=LORA),
        "load turbo": node("QwenEditLoraLoad", lora_name=TURBO),
        "turbo": node(
            "QwenEditLoraApply", model=["unet", 0], adapter=["load turbo", 0], strength=0.5
        ),
        "euler": node("KSamplerSelect", sampler_name="euler"),
        "sigmas": node("BasicScheduler", model=["unet", 0], scheduler="simple", steps=2, denoise=1),
    }


def sweep_graph(**more: Any) -> dict[str, Any]:
    inputs = {
        **{"model": ["turbo", 0], "adapter": ["load", 0], "strengths": "0, 1", "seed": 1},
        **{"steps": 2, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0},
        **{"positive": ["prompt", 0], "negative": ["prompt", 0], "latent_image": ["latent", 0]},
        **{"vae": ["vae", 0], **more},
    }
    return {
        **base_graph(),
        "sweep": node("QwenEditLoraSweep", **inputs),
        "end": node(
            "QwenEditLoraSweepGrid",
            images=["sweep", 0],
            labels=["sweep", 2],
            filename_prefix="sweep_21",
        ),
    }


@pytest.mark.parametrize("custom", [{}, {"sampler": ["euler", 0], "sigmas": ["sigmas", 0]}])
def test_a_sweep_keeps_the_turbo_lora_and_equals_a_hand_wired_graph(custom, run, executor):
    graph = sweep_graph(**custom)
    images, latents, *_ = run(graph, "sweep")
    assert [latent["samples"].shape for latent in latents] == [(1, dit_21.CHANNELS, 12, 16)] * 2
    assert [image.shape for image in images] == [(1, 192, 256, 4)] * 2
    executor.reset()
    by_hand = {
        **base_graph(),
        "apply": node("QwenEditLoraApply", model=["turbo", 0], adapter=["load", 0], strength=1.0),
        "sampler": node(
            "KSampler",
            model=["apply", 0],
            positive=["prompt", 0],
            negative=["prompt", 0],
            latent_image=["latent", 0],
            seed=1,
            steps=2,
            cfg=1.0,
            sampler_name="euler",
            scheduler="simple",
            denoise=1.0,
        ),
        "decoded": node("VAEDecode", samples=["sampler", 0], vae=["vae", 0]),
        "end": node("PreviewImage", images=["decoded", 0]),
    }
    ((image,),) = run(by_hand, "decoded")
    assert torch.equal(images[1], image)
    assert not torch.equal(images[0], image)


def test_the_grid_measures_images_with_alpha(run):
    _, sheet, differences, _, _, figures = run(sweep_graph(), "end")
    measured = json.loads(figures[0])
    assert measured["size"] == [256, 192]
    zero, one = measured["cells"]
    assert zero["change"]["whole"]["rms"] == 0 < one["change"]["whole"]["rms"]
    assert sheet[0].shape[-1] == differences[0].shape[-1] == 3


def test_the_effect_is_that_of_the_target_alone_block_by_block(
    load_21, conditioning_21, apply_ours, comfyui
):
    import comfy.sample
    import comfy.samplers
    from qwen_edit_lora.nodes.sweeping.effect_measure import measure_effect

    base, adapter = load_21("fused"), build_adapter()
    latent = torch.randn(1, dit_21.CHANNELS, 8, 6, generator=torch.Generator().manual_seed(8))
    with torch.inference_mode():
        effect = measure_effect(
            base, adapter, conditioning_21, {"samples": latent}, (0.0, 0.5), SIGMAS, seed=5
        )

    def sample_once(model: Any, sigma: float) -> tuple[torch.Tensor, list[torch.Tensor]]:
        tokens: list[torch.Tensor] = []
        hooks = [
            # The target is last: 8 x 6 tokens after 9 of text and 6 x 8 of the reference.
            block.register_forward_hook(lambda m, i, o: tokens.append(o[:, 9 + 48 :].clone()))
            for block in model.model.diffusion_model.transformer_blocks
        ]
        euler, noise = comfy.samplers.sampler_object("euler"), comfy.sample.prepare_noise(latent, 5)
        levels, text = torch.tensor([sigma, 0.0]), conditioning_21
        with torch.inference_mode():
            result = comfy.sample.sample_custom(
                model, noise, 1.0, euler, levels, text, text, latent, seed=5
            )
        for hook in hooks:
            hook.remove()
        x = sigma * noise + (1 - sigma) * latent
        return x - result, tokens

    blocks = [0.0] * dit_21.NUM_BLOCKS
    found = effect.strengths[1]
    for index, sigma in enumerate(SIGMAS):
        without, tokens = sample_once(base, sigma)
        velocity, changed = sample_once(apply_ours(base, adapter, 0.5), sigma)
        expected = (velocity - without).norm() / without.norm()
        assert found.outputs[index] == pytest.approx(expected.item(), rel=1e-3)
        assert all(one.shape == (1, 48, dit_21.WIDTH) for one in changed)
        for block, (a, b) in enumerate(zip(tokens, changed, strict=True)):
            blocks[block] += ((b - a).norm() / a.norm()).item() ** 2
    expected = [(square / len(SIGMAS)) ** 0.5 for square in blocks]
    assert found.blocks == pytest.approx(expected, rel=1e-3)
    assert min(found.blocks) > 0.001


def test_strengths_auto_measures_halves_of_a_fused_weight(base_21, load_21):
    from qwen_edit_lora.nodes.sweeping.strengths import resolve_strengths

    halves = [path for path in dit_21.list_linears() if path.endswith(("gate_layer", "mlp.proj"))]
    adapter = build_adapter(halves)
    expected, _ = resolve_strengths("auto", load_21("split"), [adapter])
    found, _ = resolve_strengths("auto", base_21, [adapter])
    assert found == pytest.approx(expected, rel=0.02)
    assert not Strengths(found[-1]).is_zero


def test_each_half_of_gate_up_has_the_norm_of_its_split_weight(base_21, load_21, ours):
    split = load_21("split")
    layout = ours.matching.find_layout(base_21.model.diffusion_model)
    for path in dit_21.list_linears():
        found = ours.host.measure_weight(base_21, layout.find_place(path)).value
        expected = ours.host.measure_weight(split, ours.host.Place(path)).value
        assert found == pytest.approx(expected, rel=0.01)
