"""`applied`: what an adapter adds to a model while sampling, and what is refused."""

from __future__ import annotations

import pytest
import torch
from qwen_edit_lora.lora_core import Adapter, ConfigError, LoraWeights, ShapeError
from qwen_edit_lora.lora_core.errors import NonFiniteWeightsError
from qwen_edit_lora.lora_core.training.sampling.sampling import applied


class Tiny(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.img_in = torch.nn.Linear(6, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.img_in(x)


def run(weights: LoraWeights, strength: float = 1.0) -> torch.Tensor:
    """What the adapter adds to the model's output."""
    torch.manual_seed(0)
    model, x = Tiny(), torch.randn(1, 6)
    with torch.no_grad():
        base = model(x)
        with applied(model, Adapter({"img_in": weights}, name="a"), strength):
            return model(x) - base


def make(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("strength", [1.0, -0.5])
def test_a_change_of_the_bias_is_applied_too(strength):
    """As in ComfyUI (diff_b) and in PEFT (lora_bias)."""
    plain = run(LoraWeights(make(2, 6), make(12, 2)), strength)
    bias = make(12)
    found = run(LoraWeights(make(2, 6), make(12, 2), bias_delta=bias), strength)
    assert torch.allclose(found - plain, strength * bias.expand_as(found), atol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["lora_A", "lora_B", "bias_delta"])
def test_weights_that_are_not_finite_are_refused(bad, part):
    parts = {"lora_A": make(2, 6), "lora_B": make(12, 2), "bias_delta": make(12)}
    parts[part].view(-1)[0] = bad
    with pytest.raises(NonFiniteWeightsError, match="a holds NaN or Inf"):
        run(LoraWeights(**parts))


@pytest.mark.parametrize("strength", [float("nan"), float("inf")])
def test_a_strength_that_is_not_finite_is_refused(strength):
    with pytest.raises(ConfigError, match="expected a finite number"):
        run(LoraWeights(make(2, 6), make(12, 2)), strength)


@pytest.mark.parametrize(
    ("lora_A", "lora_B"), [((2, 7), (12, 2)), ((2, 6), (1, 2)), ((2, 6), (5, 2))]
)
def test_weights_of_other_sizes_than_the_module_are_refused(lora_A, lora_B):
    """(1, 2) would broadcast over all outputs."""
    with pytest.raises(ShapeError, match="img_in is 12 x 6 there, and the adapter was made for"):
        run(LoraWeights(make(*lora_A), make(*lora_B)))


def test_a_lora_on_a_module_that_is_no_linear_is_refused():
    model = torch.nn.Sequential(torch.nn.LayerNorm(6))
    adapter = Adapter({"0": LoraWeights(make(2, 6), make(6, 2))}, name="a")
    with pytest.raises(ShapeError, match="0 is no Linear there"), applied(model, adapter):
        pass


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, torch.float8_e4m3fn], ids=str)
def test_weights_of_any_dtype_are_applied_as_their_values(dtype):
    lora_A, lora_B = (make(2, 6) * 3).to(dtype), (make(12, 2) * 3).to(dtype)
    expected = run(LoraWeights(lora_A.float(), lora_B.float()))
    assert torch.allclose(run(LoraWeights(lora_A, lora_B)), expected, atol=1e-4)
