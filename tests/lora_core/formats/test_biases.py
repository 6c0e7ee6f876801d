"""Changes of a bias: their shapes, both of their spellings at once, and norms, which have none."""

from __future__ import annotations

import pytest
import torch
from qwen_edit_lora.lora_core import (
    DiffWeights,
    DoraWeights,
    KeyFormatError,
    LohaWeights,
    LokrWeights,
    LoraWeights,
    OftWeights,
    ShapeError,
    read_state_dict,
)

TO_Q = "transformer_blocks.0.attn.to_q"
NORM = "transformer_blocks.0.attn.norm_q"
WRONG = [(3,), (8,), (4, 1), (1, 4), (4, 4), (1,), ()]

KINDS = {
    "LoRA": lambda bias: LoraWeights(torch.ones(2, 6), torch.ones(4, 2), bias_delta=bias),
    "LoHa": lambda bias: LohaWeights(
        *(torch.ones(4, 2), torch.ones(2, 6)) * 2, alpha=1.0, bias_delta=bias
    ),
    "LoKr": lambda bias: LokrWeights(w1=torch.ones(2, 2), w2=torch.ones(2, 3), bias_delta=bias),
    "DoRA": lambda bias: DoraWeights(
        LoraWeights(torch.ones(2, 6), torch.ones(4, 2), bias_delta=bias), torch.ones(4)
    ),
    "OFT": lambda bias: OftWeights(torch.zeros(2, 2, 2), bias_delta=bias),
    "diff": lambda bias: DiffWeights(torch.ones(4, 6), bias),
    "norm": lambda bias: DiffWeights(torch.ones(4), bias),
}


@pytest.mark.parametrize("shape", WRONG, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_bias_of_another_shape_than_the_outputs_is_refused(kind, shape):
    assert KINDS[kind](torch.ones(4)).bias_delta.shape == (4,)
    with pytest.raises(ShapeError):
        KINDS[kind](torch.ones(shape))


@pytest.mark.parametrize("shape", WRONG, ids=str)
@pytest.mark.parametrize("ending", [".diff_b", ".lora_B.bias"])
def test_a_file_with_a_bias_of_another_shape_is_refused_in_a_sentence(
    ending, shape, make_state_dict
):
    state_dict = make_state_dict("ai-toolkit", [TO_Q])
    key = f"diffusion_model.{TO_Q}{ending}"
    assert read_state_dict(state_dict | {key: torch.ones(4)}).modules[TO_Q].bias_delta is not None
    with pytest.raises(ShapeError, match=r"to_q: its change of the bias is .*expected \(4,\)"):
        read_state_dict(state_dict | {key: torch.ones(shape)})


@pytest.mark.parametrize("shape", [(4, 1), (1, 4), (4, 4), ()], ids=str)
def test_a_bias_alone_is_a_vector(shape):
    with pytest.raises(ShapeError):
        read_state_dict({f"{TO_Q}.diff_b": torch.ones(shape)})


def test_two_changes_of_one_bias_are_added(make_state_dict):
    state_dict = make_state_dict("ai-toolkit", [TO_Q], rank=2, alpha=1.0)
    state_dict[f"diffusion_model.{TO_Q}.lora_B.bias"] = torch.full((4,), 3.0)
    state_dict[f"diffusion_model.{TO_Q}.diff_b"] = torch.arange(4.0)
    weights = read_state_dict(state_dict).modules[TO_Q]
    scale = weights.scale
    assert torch.equal(weights.bias_delta, scale * 3.0 + torch.arange(4.0))


@pytest.mark.parametrize(("weight", "bias"), [(".diff", ".diff_b"), (".w_norm", ".b_norm")])
@pytest.mark.parametrize("path", [NORM, "txt_norm"])
def test_a_bias_of_a_norm_is_reported_as_left_out(path, weight, bias):
    state_dict = {path + weight: torch.ones(4), path + bias: torch.ones(4)}
    adapter = read_state_dict(state_dict)
    assert set(adapter.modules[path].parts) == {"diff"}
    (dropped,) = adapter.report.unmatched
    assert (dropped.key, "norms have none" in dropped.reason) == (path + bias, True)
    assert any("norms have none" in text for text in adapter.report.warnings)


def test_a_file_of_norm_biases_alone_is_refused_with_the_reason():
    with pytest.raises(KeyFormatError, match="norms have none"):
        read_state_dict({f"{NORM}.diff_b": torch.ones(4)})
