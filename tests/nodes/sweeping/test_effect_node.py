"""Effect compared with ComfyUI's own sampler: one-step Euler sampling gives the same result."""

from __future__ import annotations

import json
import urllib.error
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from demo_base.dit import WIDTH
from demo_base.prompts import node

pytestmark = pytest.mark.comfy

SIGMAS = (0.8, 0.3)


@pytest.fixture
def measure(comfyui: SimpleNamespace) -> Any:
    from qwen_edit_lora.lora_core import read_adapter
    from qwen_edit_lora.nodes.sweeping import effect_measure

    def measure(model, path, strengths, latent=None, positive=None, **options):
        with torch.inference_mode():
            return effect_measure.measure_effect(
                model,
                read_adapter(path),
                positive or build_prompt(),
                latent or build_latent(),
                strengths,
                SIGMAS,
                **options,
            )

    return measure


def build_prompt() -> list:
    generator = torch.Generator().manual_seed(7)
    reference = torch.randn(1, 16, 1, 8, 8, generator=generator)
    tokens = torch.randn(1, 12, 64, generator=generator)
    return [[tokens, {"reference_latents": [reference]}]]


def build_latent() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(8)
    return {"samples": torch.randn(1, 16, 1, 8, 8, generator=generator)}


def sample_once(model: Any, sigma: float, seed: int) -> tuple[torch.Tensor, torch.Tensor, list]:
    """(x, denoised) in the model's own latent space, and each block's image tokens."""
    import comfy.sample
    import comfy.samplers

    latent = build_latent()["samples"]
    noise = comfy.sample.prepare_noise(latent, seed)
    tokens: list[torch.Tensor] = []
    blocks = model.model.diffusion_model.transformer_blocks
    hooks = [
        # A block returns (text, image); the target's tokens are the first 4 x 4.
        b.register_forward_hook(lambda m, i, o: tokens.append(o[1][:, :16].clone()))
        for b in blocks
    ]
    with torch.inference_mode():
        result = comfy.sample.sample_custom(
            model,
            noise,
            1.0,
            comfy.samplers.sampler_object("euler"),
            torch.tensor([sigma, 0.0]),
            build_prompt(),
            build_prompt(),
            latent,
            seed=seed,
        )
    for hook in hooks:
        hook.remove()
    denoised = model.model.process_latent_in(result)
    return sigma * noise + (1 - sigma) * model.model.process_latent_in(latent), denoised, tokens


def test_the_change_is_that_of_a_one_step_sampling(measure, base, make_lora, apply_ours):
    path = make_lora("a", delta_std=0.2)
    effect = measure(base, path, (0.0, 0.5, -1.0), seed=5)
    assert [found.strength for found in effect.strengths] == [0.0, 0.5, -1.0]
    blocks = {strength: [0.0, 0.0] for strength in (0.5, -1.0)}
    for index, sigma in enumerate(SIGMAS):
        x, without, tokens = sample_once(base, sigma, 5)
        for found in effect.strengths[1:]:
            _, denoised, changed = sample_once(apply_ours(base, path, found.strength), sigma, 5)
            expected = (denoised - without).norm() / (x - without).norm()
            assert found.outputs[index] == pytest.approx(expected.item(), rel=1e-3)
            assert found.outputs[index] > 0.01
            for block, (a, b) in enumerate(zip(tokens, changed, strict=True)):
                blocks[found.strength][block] += ((b - a).norm() / a.norm()).item() ** 2
    for found in effect.strengths[1:]:
        expected = [(square / len(SIGMAS)) ** 0.5 for square in blocks[found.strength]]
        assert found.blocks == pytest.approx(expected, rel=1e-3)


def test_an_effect_costs_one_model_call_per_strength_and_sigma(
    measure, base, make_lora, monkeypatch
):
    model_class, sizes = type(base.model), []
    original = model_class.apply_model

    def counted(self, x, *args, **kwargs):
        sizes.append(len(x))
        return original(self, x, *args, **kwargs)

    monkeypatch.setattr(model_class, "apply_model", counted)
    path = make_lora("a", delta_std=0.2)
    measure(base, path, (0.0, 0.5, 1.0))
    assert sizes == [1] * 3 * len(SIGMAS)
    sizes.clear()
    measure(base, path, (0.5, 1.0))  # the reference at 0 is always measured
    assert sizes == [1] * 3 * len(SIGMAS)


def test_strength_0_has_exactly_no_change_and_another_seed_another_result(measure, base, make_lora):
    path = make_lora("a", delta_std=0.2)
    effect = measure(base, path, (0.0, 1.0), seed=1)
    assert effect.strengths[0].outputs == (0.0, 0.0)
    assert effect.strengths[0].blocks == (0.0, 0.0)
    assert measure(base, path, (0.0, 1.0), seed=1) == effect
    assert measure(base, path, (0.0, 1.0), seed=2) != effect


def test_a_lora_whose_b_is_zero_has_no_effect(measure, base, make_lora):
    effect = measure(base, make_lora("zero", delta_std=0.0), (0.0, 1.0, 4.0))
    assert all(found.change == 0 for found in effect.strengths)
    assert effect.judge().startswith("no effect")


def test_an_exploding_lora_collapses(measure, base, make_lora):
    effect = measure(base, make_lora("huge", delta_std=1e30), (0.0, 1e-30, 1.0))
    assert effect.judge().startswith("collapses at strength 1:")


@pytest.mark.parametrize("storage", ["2509_bf16", "2509_fp8", "2511_fp8_scaled"])
def test_every_storage_and_an_empty_latent_can_be_measured(storage, measure, load_base, make_lora):
    latent = {"samples": torch.zeros(1, 4, 8, 8), "downscale_ratio_spacial": 8}
    effect = measure(load_base(storage), make_lora("a", delta_std=0.2), (0.0, 1.0), latent)
    assert effect.strengths[0].change == 0
    assert 0.01 < effect.strengths[1].change < 10
    assert len(effect.strengths[1].blocks) == 2


def test_modules_that_cannot_run_on_the_side_path_are_merged(measure, base, make_lora):
    from safetensors.torch import load_file, save_file

    path = make_lora("dora", delta_std=0.2)
    tensors = load_file(path)
    stem = "diffusion_model.transformer_blocks.0.attn.to_q"
    tensors[f"{stem}.dora_scale"] = torch.full((WIDTH, 1), 0.5)
    save_file(tensors, path)
    before = {key: value.cpu().clone() for key, value in base.model.state_dict().items()}
    effect = measure(base, path, (0.0, 1.0))
    assert effect.strengths[1].change > 0.01
    assert measure(base, path, (0.0,)).strengths[0].change == 0
    after = base.model.state_dict()
    assert all(torch.equal(before[key], after[key].cpu()) for key in before)


def test_nothing_stays_on_the_model(measure, base, make_lora, sample):
    before = sample(base)
    measure(base, make_lora("a", delta_std=0.2), (0.0, 1.0))
    assert torch.equal(sample(base), before)
    assert [m for m in base.model.modules() if "forward" in m.__dict__] == []
    assert "patches" not in base.model_options["transformer_options"]


def test_an_interrupt_between_two_calls_stops_the_measurement(
    measure, base, make_lora, comfyui, monkeypatch
):
    calls = []
    model_class = type(base.model)
    original = model_class.apply_model

    def counted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            comfyui.model_management.interrupt_current_processing()
        return original(self, *args, **kwargs)

    monkeypatch.setattr(model_class, "apply_model", counted)
    with pytest.raises(comfyui.model_management.InterruptProcessingException):
        measure(base, make_lora("a", delta_std=0.2), (0.0, 0.5, 1.0, 2.0))
    assert len(calls) == 3
    assert [m for m in base.model.modules() if "forward" in m.__dict__] == []


def test_only_some_tokens_of_a_large_image_are_kept(measure, base, make_lora, monkeypatch):
    from qwen_edit_lora.nodes.sweeping import effect_measure

    path = make_lora("a", delta_std=0.2)
    every = measure(base, path, (0.0, 1.0)).strengths[1]
    monkeypatch.setattr(effect_measure, "MAX_TOKENS", 5)
    some = measure(base, path, (0.0, 1.0)).strengths[1]
    assert some.outputs == every.outputs
    assert some.blocks != every.blocks
    assert some.blocks == pytest.approx(every.blocks, rel=0.5)


# --- through the HTTP API ------------------------------------------------------------------------


def build_graph(lora_name: str, **more: Any) -> dict[str, Any]:
    return {
        "unet": node("UNETLoader", unet_name="tiny_fp32_2509.safetensors", weight_dtype="default"),
        "clip": node(
            "CLIPLoader",
            clip_name="qwen_2.5_vl_7b_fp8_scaled.safetensors",
            type="qwen_image",
            device="default",
        ),
        "prompt": node("TextEncodeQwenImageEditPlus", clip=["clip", 0], prompt="red"),
        "latent": node("EmptyLatentImage", width=64, height=64, batch_size=1),
        "load": node("QwenEditLoraLoad", lora_name=lora_name),
        "effect": node(
            "QwenEditLoraEffect",
            model=["unet", 0],
            adapter=["load", 0],
            positive=["prompt", 0],
            latent_image=["latent", 0],
            **{"strengths": "0, 1, 2", "seed": 3, **more},
        ),
        "json": node("PreviewAny", source=["effect", 1]),
        "plot": node("SaveImage", images=["effect", 2], filename_prefix="effect"),
    }


def test_the_node_gives_report_json_and_plot(server, demo_models):
    graph = build_graph(demo_models.lora.name, sigmas="0.7")
    entry = server.run_prompt(graph)
    (report,) = entry["outputs"]["effect"]["qwen_edit_lora_report"]
    assert "sigma 0.7" in report
    found = json.loads(entry["outputs"]["json"]["text"][0])
    assert [row["strength"] for row in found["strengths"]] == [0, 1, 2]
    assert found["strengths"][0]["change"] == 0
    assert 0 < found["strengths"][1]["change"] < found["strengths"][2]["change"]
    assert server.images(entry)[0].startswith(b"\x89PNG")


def test_the_strengths_it_chooses_are_those_of_the_sweep(server, demo_models):
    graph = build_graph(demo_models.lora.name, sigmas="0.7", points=4)
    sampling = {"steps": 1, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple"}
    graph["sweep"] = node(
        "QwenEditLoraSweep",
        **{name: graph["effect"]["inputs"][name] for name in ("model", "adapter", "positive")},
        **{"negative": ["prompt", 0], "latent_image": ["latent", 0], "strengths": ["effect", 3]},
        **{"seed": 3, "denoise": 1.0, **sampling},
    )
    graph["swept"] = node("PreviewAny", source=["sweep", 2])
    graph["chosen"] = node("PreviewAny", source=["effect", 3])
    outputs = server.run_prompt(graph)["outputs"]
    (chosen,) = outputs["chosen"]["text"]
    assert outputs["effect"]["qwen_edit_lora_report"][0].endswith(f"for a sweep: {chosen}")
    assert outputs["swept"]["text"] == [f"strength={text} seed=3" for text in chosen.split(", ")]
    curve = [
        (e["strength"], e["change"]) for e in json.loads(outputs["json"]["text"][0])["strengths"]
    ]
    from qwen_edit_lora.lora_core.sweep.strength_choice import choose_by_change

    assert [float(text) for text in chosen.split(", ")] == list(choose_by_change(curve, 4))


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ({"strengths": "0..2"}, "strengths is '0..2'; expected finite numbers"),
        ({"sigmas": "0, 0.5"}, "sigmas holds 0; expected up to 16 numbers above 0"),
        ({"sigmas": "", "strengths": "1"}, "sigmas is empty; expected finite numbers"),
    ],
)
def test_invalid_texts_are_refused_before_anything_runs(inputs, sentence, server, demo_models):
    with pytest.raises(urllib.error.HTTPError) as refused:
        server.post("/prompt", {"prompt": build_graph(demo_models.lora.name, **inputs)})
    (error,) = json.loads(refused.value.read())["node_errors"]["effect"]["errors"]
    assert sentence in error["details"]
