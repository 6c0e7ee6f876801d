"""Adapters of unusual shapes and dtypes, applied: refused before sampling, or their float twins."""

from __future__ import annotations

import itertools

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
    compute_delta,
    read_state_dict,
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


#: Endings of a module's two factors, each of which ComfyUI reads.
SPELLINGS = (
    *((".lora_down.weight", ".lora_up.weight"), ("_lora.down.weight", "_lora.up.weight")),
    *((".lora_A.weight", ".lora_B.weight"), (".lora.down.weight", ".lora.up.weight")),
    *((".lora_A", ".lora_B"), (".lora_A.default.weight", ".lora_B.default.weight")),
    (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
)


def make_two_pairs(stem: str):
    """Two whole LoRAs of one module, in each two spellings."""
    first = (draw(2, WIDTH), draw(WIDTH, 2))
    second = (draw(3, WIDTH) + 1, draw(WIDTH, 3))
    return {
        f"{a[0]} and {b[0]}": dict(
            zip((stem + end for end in (*a, *b)), (*first, *second), strict=True)
        )
        for a, b in itertools.combinations(SPELLINGS, 2)
    }


def make_odd_files():
    """Files with more than their modules need, as leftovers of conversions and merges."""
    stem = f"diffusion_model.{PATH}"
    second = stem.replace("s.0.", "s.00.")
    quarter = WIDTH // 4
    return {
        "a whole LoKr factor and its product": {
            f"{stem}.lokr_w1_a": draw(4, 3),
            f"{stem}.lokr_w1_b": draw(3, 4),
            f"{stem}.lokr_w2": draw(quarter, quarter),
            f"{stem}.lokr_w2_a": draw(quarter, 1),
            f"{stem}.lokr_w2_b": draw(1, quarter),
            f"{stem}.alpha": torch.tensor(3.0),
        },
        "a factor next to a pair": {
            f"{stem}.lora_A.weight": draw(2, WIDTH),
            f"{stem}.lora_down.weight": draw(2, WIDTH) + 1,
            f"{stem}.lora_up.weight": draw(WIDTH, 2),
        },
        **make_two_pairs(stem),
        "a block number with leading zeros": {
            f"{stem}.lora_A.weight": draw(2, WIDTH),
            f"{stem}.lora_B.weight": draw(WIDTH, 2),
            f"{second}.lora_A.weight": draw(2, WIDTH) + 1,
            f"{second}.lora_B.weight": draw(WIDTH, 2),
        },
    }


@pytest.mark.parametrize("case", make_odd_files())
def test_a_file_with_more_than_its_modules_need_acts_as_in_comfyui(case, comfyui, load_base):
    import comfy.lora

    state_dict = {key: tensor.float() for key, tensor in make_odd_files()[case].items()}
    key_map = comfy.lora.model_lora_keys_unet(load_base("2509_fp32").model, {})
    patches = comfy.lora.load_lora(state_dict, key_map)
    key = f"diffusion_model.{PATH}.weight"
    assert list(patches) == [key]
    zeros = torch.zeros(WIDTH, WIDTH)
    expected = comfy.lora.calculate_weight([(1.0, patches[key], 1.0, None, None)], zeros, key)
    adapter = read_state_dict(state_dict)
    assert list(adapter.modules) == [PATH]
    assert worst(compute_delta(adapter.modules[PATH]), expected) < 1e-5
    assert adapter.report.unmatched or adapter.report.duplicates
