"""Attack findings: `python -m lora_core sample --adapter` applies less than Apply Edit LoRA."""

from __future__ import annotations

import pytest
import torch
from qwen_edit_lora.lora_core import Adapter, LoraError, LoraWeights
from qwen_edit_lora.lora_core.training.sampling.sampling import applied


class Tiny(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.img_in = torch.nn.Linear(6, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.img_in(x)


def run(weights: LoraWeights) -> torch.Tensor:
    torch.manual_seed(0)
    model, x = Tiny(), torch.randn(1, 6)
    with torch.no_grad():
        base = model(x)
        with applied(model, Adapter({"img_in": weights}, name="a"), 1.0):
            return model(x) - base


def make(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_a_change_of_the_bias_is_applied_too():
    """As in ComfyUI (diff_b) and in PEFT (lora_bias); refusing it is right as well."""
    plain = run(LoraWeights(make(2, 6), make(12, 2)))
    bias = make(12)
    try:
        found = run(LoraWeights(make(2, 6), make(12, 2), bias_delta=bias))
    except LoraError:
        return
    assert torch.allclose(found - plain, bias.expand_as(found), atol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(bad):
    lora_B = make(12, 2)
    lora_B[0, 0] = bad
    with pytest.raises(LoraError):
        run(LoraWeights(make(2, 6), lora_B))


@pytest.mark.parametrize(
    ("lora_A", "lora_B"), [((2, 7), (12, 2)), ((2, 6), (1, 2)), ((2, 6), (5, 2))]
)
def test_weights_of_other_sizes_than_the_module_are_refused(lora_A, lora_B):
    """(1, 2) would even broadcast over all outputs, and no one would see it."""
    with pytest.raises(LoraError):
        run(LoraWeights(make(*lora_A), make(*lora_B)))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, torch.float8_e4m3fn], ids=str)
def test_weights_of_any_dtype_are_applied_as_their_values(dtype):
    lora_A, lora_B = (make(2, 6) * 3).to(dtype), (make(12, 2) * 3).to(dtype)
    expected = run(LoraWeights(lora_A.float(), lora_B.float()))
    assert torch.allclose(run(LoraWeights(lora_A, lora_B)), expected, atol=1e-4)
