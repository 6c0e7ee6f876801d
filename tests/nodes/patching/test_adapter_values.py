"""Adapters of unusual shapes and dtypes, applied: refused before sampling, or their float twins."""

from __future__ import annotations

import pytest
import torch
from demo_base.dit import WIDTH
from qwen_edit_lora.lora_core import (
    Adapter,
    ConfigError,
    DiffWeights,
    LohaWeights,
    LokrWeights,
    LoraWeights,
    ShapeError,
)

from ..conftest import worst

pytestmark = pytest.mark.comfy

PATH = "transformer_blocks.0.attn.to_q"


def draw(*shape: int) -> torch.Tensor:
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(sum(shape)))


KINDS = {
    "LoRA": lambda: LoraWeights(draw(2, WIDTH), draw(WIDTH, 2), 0.02, draw(WIDTH)),
    "LoHa": lambda: LohaWeights(
        draw(WIDTH, 2), draw(2, WIDTH), draw(WIDTH, 2), draw(2, WIDTH), alpha=0.02
    ),
    "LoKr": lambda: LokrWeights(
        w1=draw(4, 4), w2_a=draw(WIDTH // 4, 2), w2_b=draw(2, WIDTH // 4), alpha=0.02
    ),
    "diff": lambda: DiffWeights(draw(WIDTH, WIDTH), draw(WIDTH)),
}


@pytest.mark.parametrize("length", [1, 3, WIDTH - 1, 2 * WIDTH])
@pytest.mark.parametrize("mode", ["auto", "merge"])
def test_a_bias_alone_of_another_length_is_refused_before_sampling(
    mode, length, load_base, apply_ours
):
    adapter = Adapter({PATH: DiffWeights(bias_delta=torch.ones(length))}, name="short")
    with pytest.raises(ShapeError, match=rf"{PATH} is \({WIDTH},\) in the model.*\({length},\)"):
        apply_ours(load_base("2509_fp32"), adapter, 1.0, mode)


@pytest.mark.parametrize("mode", ["side path", "merge"])
def test_a_bias_alone_of_the_right_length_is_applied(mode, load_base, apply_ours, sample):
    model = load_base("2509_fp32")
    adapter = Adapter({PATH: DiffWeights(bias_delta=torch.ones(WIDTH))}, name="bias")
    assert worst(sample(apply_ours(model, adapter, 1.0, mode)), sample(model)) > 1e-4


@pytest.mark.parametrize("mode", ["side path", "merge"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_integers_act_as_their_values_in_float32(kind, dtype, mode, load_base, apply_ours, sample):
    model, weights = load_base("2509_fp32"), KINDS[kind]()
    found = []
    for target in (dtype, torch.float32):
        parts = {name: tensor.to(target) for name, tensor in weights.parts.items()}
        adapter = Adapter({PATH: weights.with_parts(parts)}, name=kind)
        found.append(sample(apply_ours(model, adapter, 0.3, mode)))
    assert torch.equal(*found)
    assert worst(found[0], sample(model)) > 1e-4


def test_a_bias_is_never_merged_into_a_module_without_one(load_base, apply_ours):
    model = load_base("2509_fp32")
    model.model.diffusion_model.get_submodule(PATH).bias = None
    adapter = Adapter({PATH: DiffWeights(bias_delta=torch.ones(WIDTH))}, name="bias")
    with pytest.raises(ConfigError, match=r"to_q\.bias, without a weight or bias"):
        apply_ours(model, adapter, 1.0, "merge")
