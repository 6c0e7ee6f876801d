"""check_finite on every dtype a file may have: by the values, whatever holds them."""

from __future__ import annotations

import pytest
import torch
from qwen_edit_lora.lora_core import (
    Adapter,
    DiffWeights,
    LohaWeights,
    LokrWeights,
    LoraWeights,
    NonFiniteWeightsError,
    read_state_dict,
)

TO_Q = "transformer_blocks.0.attn.to_q"
WHOLE = [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.bool]
needs_e8m0 = pytest.mark.skipif(
    not hasattr(torch, "float8_e8m0fnu"), reason="this PyTorch has no e8m0"
)

KINDS = {
    "LoRA": lambda draw: LoraWeights(draw(2, 6), draw(4, 2)),
    "LoHa": lambda draw: LohaWeights(draw(4, 2), draw(2, 6), draw(4, 2), draw(2, 6)),
    "LoKr": lambda draw: LokrWeights(w1=draw(2, 2), w2_a=draw(2, 2), w2_b=draw(2, 3)),
    "diff": lambda draw: DiffWeights(draw(4, 6)),
}


@pytest.mark.parametrize("dtype", WHOLE, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_integers_are_weights_like_their_values_in_float32(kind, dtype):
    def draw(*shape):
        generator = torch.Generator().manual_seed(sum(shape))
        return torch.randint(0, 100, shape, generator=generator).to(dtype)

    weights = KINDS[kind](draw)
    Adapter({TO_Q: weights}).check_finite()
    in_floats = weights.with_parts({name: t.float() for name, t in weights.parts.items()})
    assert torch.equal(weights.delta(), in_floats.delta())


def test_integers_whose_product_overflows_float32_are_refused():
    huge = torch.full((2, 2), -(2**63), dtype=torch.int64)
    weights = LohaWeights(huge, huge, huge, huge)
    with pytest.raises(NonFiniteWeightsError, match="exceeds the range of float32"):
        Adapter({TO_Q: weights}).check_finite()


@needs_e8m0
def test_nan_in_e8m0_is_found():
    codes = torch.full((4, 6), 127, dtype=torch.uint8)
    Adapter({TO_Q: DiffWeights(codes.view(torch.float8_e8m0fnu))}).check_finite()
    codes[1, 2] = 255
    with pytest.raises(NonFiniteWeightsError, match="holds NaN or Inf"):
        Adapter({TO_Q: DiffWeights(codes.view(torch.float8_e8m0fnu))}).check_finite()


def test_an_oft_without_alpha_is_not_said_to_do_nothing():
    report = read_state_dict({f"{TO_Q}.oft_blocks": torch.ones(2, 2, 2)}).report
    assert report.kinds == {"OFT": 1}
    assert not [finding for finding in report.findings if finding.kind == "alpha_zero"]
