"""The trainer's forward pass compared with ComfyUI's own, on the same file."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from qwen_edit_lora.lora_core.training.model.loading import load_transformer
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.comfy

TOLERANCE = 1e-5
TEXT_WIDTH = 64
SIZES = {
    "no reference": ((8, 8), ()),
    "same size": ((8, 12), ((8, 12),)),
    "smaller": ((12, 8), ((4, 6),)),
    "larger than the target": ((8, 8), ((20, 14),)),
    "two": ((8, 8), ((8, 8), (6, 10))),
    "three of different sizes": ((10, 8), ((8, 8), (16, 4), (2, 2))),
    "odd patch counts": ((10, 14), ((6, 10),)),
    "odd sides": ((9, 11), ((7, 5), (13, 8))),
    "odd sides, no reference": ((5, 7), ()),
    "wide": ((4, 30), ((30, 4),)),
}


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def run_comfyui(model: Any, latents, references, text, mask, sigma) -> torch.Tensor:
    # ComfyUI widens a boolean or integer mask; its own conditioning sends integers.
    with torch.inference_mode():
        out = model.model.diffusion_model(
            latents[:, :, None],
            sigma,
            text,
            attention_mask=None if mask is None else mask.long(),
            ref_latents=[reference[:, :, None] for reference in references] or None,
        )
    return out[:, :, 0].clone()


@pytest.fixture(params=["2509", "2511"])
def both(request: Any, load_base: Any, demo_models: Any) -> SimpleNamespace:
    """The same weights in ComfyUI and in the trainer."""
    name = f"{request.param}_fp32"
    trained = load_transformer(demo_models.dit[name], "fp32", compute_dtype=torch.float32)
    return SimpleNamespace(comfyui=load_base(name), trained=trained, variant=request.param)


@pytest.mark.parametrize("case", SIZES)
def test_forward_equals_comfyuis(case, both):
    size, reference_sizes = SIZES[case]
    latents = draw(2, 16, *size)
    references = [draw(2, 16, *s, seed=i + 1) for i, s in enumerate(reference_sizes)]
    text, sigma = draw(2, 11, TEXT_WIDTH, seed=9), torch.tensor([0.7003, 0.123])

    expected = run_comfyui(both.comfyui, latents, references, text, None, sigma)
    with torch.no_grad():
        found = both.trained(latents, references, text, None, sigma)
    assert found.shape == latents.shape
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


def test_forward_with_padded_text_equals_comfyuis(both):
    latents, references = draw(2, 16, 8, 8), [draw(2, 16, 10, 6, seed=1)]
    text, sigma = draw(2, 11, TEXT_WIDTH, seed=9), torch.tensor([0.9, 0.3])
    mask = torch.ones(2, 11, dtype=torch.bool)
    mask[1, 6:] = False

    expected = run_comfyui(both.comfyui, latents, references, text, mask, sigma)
    with torch.no_grad():
        found = both.trained(latents, references, text, mask, sigma)
        unmasked = both.trained(latents, references, text, None, sigma)
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)
    assert (found - unmasked)[1].abs().max() > 100 * TOLERANCE


def test_the_marker_in_the_file_controls_zero_timestep_references(both):
    assert both.trained.zero_cond_t == (both.variant == "2511")


@pytest.mark.parametrize("name", ["2509_fp8", "2511_fp8_scaled", "2511_bf16"])
def test_every_storage_of_a_file_is_decoded_as_in_comfyui(name, comfyui, demo_models):
    with torch.inference_mode():
        model = comfyui.sd.load_diffusion_model(
            str(demo_models.dit[name]), {"dtype": torch.float32}
        )
    trained = load_transformer(demo_models.dit[name], "as stored", compute_dtype=torch.float32)
    latents, references = draw(1, 16, 8, 8), [draw(1, 16, 6, 10, seed=1)]
    text, sigma = draw(1, 11, TEXT_WIDTH, seed=9), torch.tensor([0.6])
    expected = run_comfyui(model, latents, references, text, None, sigma)
    with torch.no_grad():
        found = trained(latents, references, text, None, sigma)
    # Rounding of ours and ComfyUI's from float64 is 1e-5 to 4e-5 here: these weights, made to edit,
    # answer with numbers up to 5.
    scale = expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE * max(1.0, scale))


def write_int8(source: Path, path: Path, dense: Path, **options: Any) -> None:
    """The blocks' matrices as ComfyUI quantises them; dense: as it reads them back."""
    from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor

    layout = QUANT_ALGOS["int8_tensorwise"]["comfy_tensor_layout"]
    note = {"format": "int8_tensorwise", **{k: v for k, v in options.items() if "convrot" in k}}
    coded = torch.tensor(list(json.dumps(note).encode()), dtype=torch.uint8)
    widened = load_file(source)
    entries = dict(widened)
    for key, tensor in widened.items():
        if "transformer_blocks" in key and tensor.ndim == 2:
            quantised = QuantizedTensor.from_float(entries.pop(key), layout, **options)
            entries |= quantised.state_dict(key)
            entries[f"{key.removesuffix('weight')}comfy_quant"] = coded.clone()
            widened[key] = quantised.dequantize().contiguous()
    save_file(entries, path)
    save_file(widened, dense)


@pytest.mark.parametrize("group", [0, 4, 16])
def test_an_int8_base_rotated_or_not_matches_comfyui_in_every_block(
    group, comfyui, demo_models, tmp_path
):
    """Kept as stored, with only the input rotated, and widened, with the weight rotated back."""
    path, dense = tmp_path / "int8.safetensors", tmp_path / "dense.safetensors"
    rotation = {"convrot": True, "convrot_groupsize": group} if group else {}
    write_int8(demo_models.dit["2511_fp32"], path, dense, per_channel=True, **rotation)
    latents, references = draw(1, 16, 8, 8), [draw(1, 16, 6, 10, seed=1)]
    text, sigma = draw(1, 11, TEXT_WIDTH, seed=9), torch.tensor([0.6])
    expected, of_codes = (
        run_comfyui(
            comfyui.sd.load_diffusion_model(str(file), {"dtype": torch.float32}),
            *(latents, references, text, None, sigma),
        )
        for file in (dense, path)
    )
    scale = expected.abs().max().item()
    # ComfyUI's product of codes rounds its input to int8 as well; ours does not.
    assert (of_codes - expected).norm() < 0.01 * expected.norm()
    for storage in ("as stored", "fp32"):
        trained = load_transformer(path, storage, compute_dtype=torch.float32)
        with torch.no_grad():
            found = trained(latents, references, text, None, sigma)
        torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE * max(1.0, scale))


def test_forward_in_bf16_differs_from_comfyuis_by_rounding_only(load_base, demo_models):
    comfyui = load_base("2511_bf16")
    path = demo_models.dit["2511_bf16"]
    inputs = (
        draw(1, 16, 8, 8).bfloat16(),
        [draw(1, 16, 6, 10, seed=1).bfloat16()],
        draw(1, 11, TEXT_WIDTH, seed=9).bfloat16(),
    )
    sigma = torch.tensor([0.6])
    expected = run_comfyui(comfyui, *inputs, None, sigma).float()
    with torch.no_grad():
        found = load_transformer(path)(*inputs, None, sigma)
        exact = load_transformer(path, compute_dtype=torch.float32)(*inputs, None, sigma)
    assert found.dtype == torch.bfloat16
    rounding = (expected - exact).norm()
    assert 0 < (found.float() - exact).norm() < 1.5 * rounding
