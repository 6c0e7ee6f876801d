"""The side path under both of ComfyUI's patchers; on a GPU the second is dynamic VRAM itself."""

from __future__ import annotations

import pytest
import torch
from demo_base.dit import WIDTH
from qwen_edit_lora.lora_core import (
    Adapter,
    DiffWeights,
    LohaWeights,
    LokrWeights,
    LoraWeights,
    compute_delta,
)

from ..conftest import worst

pytestmark = pytest.mark.comfy

ROUNDING = 1e-5
PATH = "transformer_blocks.0.img_mlp.net.0.proj"  # large enough to be paged
ROWS, COLUMNS = 4 * WIDTH, WIDTH


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


KINDS = {
    "LoRA": lambda: LoraWeights(draw(128, COLUMNS), draw(ROWS, 128, seed=1), 64.0, draw(ROWS)),
    "LoKr": lambda: LokrWeights(w1=draw(4, 1), w2=draw(COLUMNS, COLUMNS, seed=1)),
    "LoHa": lambda: LohaWeights(
        *(draw(ROWS, 16), draw(16, COLUMNS, seed=1)),
        *(draw(ROWS, 16, seed=2), draw(16, COLUMNS, seed=3)),
    ),
    "diff": lambda: DiffWeights(draw(ROWS, COLUMNS), draw(ROWS, seed=1)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_side_path_equals_a_patch_and_leaves_the_base_bit_identical(
    kind, patcher, load_base, sample, apply_ours
):
    model, weights = load_base("2509_fp32"), KINDS[kind]()
    assert model.is_dynamic() == (patcher == "dynamic")
    before = sample(model)
    applied = apply_ours(model, Adapter({PATH: weights}, name=kind), 0.7, "side path")
    found = sample(applied)
    patched = model.clone()
    patches = {f"diffusion_model.{PATH}.weight": ("diff", (compute_delta(weights),))}
    if weights.bias_delta is not None:
        patches[f"diffusion_model.{PATH}.bias"] = ("diff", (weights.bias_delta,))
    patched.add_patches(patches, 0.7)
    assert worst(found, sample(patched)) < ROUNDING
    assert worst(found, before) > 100 * ROUNDING
    assert torch.equal(sample(applied), found)
    assert torch.equal(sample(model), before)


@pytest.mark.parametrize("storage", ["2509_bf16", "2509_fp8", "2511_fp8_scaled"])
def test_every_storage_keeps_its_bits_under_a_side_path(
    storage, patcher, load_base, sample, make_lora, apply_ours
):
    model = load_base(storage)
    before = sample(model)
    for strength in (0.5, 1.0):  # the second one changes a number only
        found = sample(apply_ours(model, make_lora("a"), strength))
        assert torch.isfinite(found).all()
        assert worst(found, before) > 1e-2
    assert torch.equal(sample(model), before)


def test_whole_loras_stacked_equal_two_loaders(
    patcher, load_base, sample, make_lora, apply_native, apply_ours
):
    model = load_base("2509_fp32")
    first, second = make_lora("a", seed=1, rank=4), make_lora("b", seed=2, rank=7)
    expected = sample(apply_native(apply_native(model, first, 0.7), second, -0.5))
    found = sample(apply_ours(apply_ours(model, first, 0.7), second, -0.5))
    assert worst(found, expected) < ROUNDING
