"""The dtype of a result: wide enough for its values, whatever dtype came in."""

from __future__ import annotations

import pytest
import torch
from dense_algebra import COLUMNS, ROWS, TO_Q, check_equal, compute_dense, make_adapter, truncate
from qwen_edit_lora.lora_core import (
    DiffWeights,
    LohaWeights,
    LokrWeights,
    LoraWeights,
    ShapeError,
    merge_adapters,
    resize_adapter,
)

WHOLE = [torch.int8, torch.uint8, torch.int16, torch.int32, torch.bool]
TO_Q_SHAPE = (ROWS, COLUMNS)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def draw_whole(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    low = -3 if dtype in (torch.int8, torch.int16, torch.int32) else 0
    return torch.randint(low, 4, shape).to(dtype)


@pytest.mark.parametrize("dtype", WHOLE, ids=str)
def test_a_resized_integer_diff_is_the_best_approximation_of_its_rank(dtype):
    weights = DiffWeights(draw_whole(24, 20, dtype=dtype))
    (resized,) = resize_adapter(make_adapter({TO_Q: weights}), rank=8).adapter.modules.values()
    assert (resized.rank, resized.dtype) == (8, torch.float32)
    check_equal(compute_dense(resized), truncate(compute_dense(weights), 8), 1e-5)


@pytest.mark.parametrize("dtype", WHOLE, ids=str)
@pytest.mark.parametrize("kind", ["LoRA", "LoKr", "diff"])
def test_integer_weights_at_another_strength_are_not_truncated(kind, dtype):
    def draw(*shape):
        return draw_whole(*shape, dtype=dtype)

    weights = {
        "LoRA": lambda: LoraWeights(draw(4, COLUMNS), draw(ROWS, 4), 3.0, draw(ROWS)),
        "LoKr": lambda: LokrWeights(w1=draw(4, 8), w2=draw(24, 10), bias_delta=draw(ROWS)),
        "diff": lambda: DiffWeights(draw(*TO_Q_SHAPE), draw(ROWS)),
    }[kind]()
    for strength in (0.3, -1.0):
        merged = merge_adapters([(make_adapter({TO_Q: weights}), strength)])
        (found,) = merged.adapter.modules.values()
        check_equal(compute_dense(found), strength * compute_dense(weights), 1e-6)
        check_equal(found.bias_delta.double(), strength * weights.bias_delta.double(), 1e-6)


@pytest.mark.parametrize("dtype", WHOLE, ids=str)
def test_a_sum_with_integers_is_not_truncated(dtype):
    one = DiffWeights(draw_whole(*TO_Q_SHAPE, dtype=dtype), draw_whole(ROWS, dtype=dtype))
    other = LoraWeights(torch.randn(4, COLUMNS), torch.randn(ROWS, 4), bias_delta=torch.rand(ROWS))
    adapters = [(make_adapter({TO_Q: one}), 0.3), (make_adapter({TO_Q: other}, "other"), 0.7)]
    (found,) = merge_adapters(adapters).adapter.modules.values()
    expected = 0.3 * compute_dense(one) + 0.7 * compute_dense(other)
    check_equal(compute_dense(found), expected, 1e-6)
    expected = 0.3 * one.bias_delta.double() + 0.7 * other.bias_delta.double()
    check_equal(found.bias_delta.double(), expected, 1e-6)


@pytest.mark.skipif(not hasattr(torch, "float8_e8m0fnu"), reason="this PyTorch has no e8m0")
@pytest.mark.parametrize("strength", [0.7, -1.0])
def test_powers_of_two_at_another_strength_keep_their_sign_and_their_value(strength):
    diff = torch.randint(120, 130, TO_Q_SHAPE, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    merged = merge_adapters([(make_adapter({TO_Q: DiffWeights(diff)}), strength)])
    (found,) = merged.adapter.modules.values()
    check_equal(compute_dense(found), strength * diff.double(), 0.004)  # bf16


@pytest.mark.parametrize("kind", ["LoHa", "wide LoHa", "LoKr"])
def test_a_result_that_overflows_fp16_is_written_in_float32(kind):
    rank = 30 if kind == "wide LoHa" else 2
    if kind == "LoKr":
        parts = {"w1": torch.randn(4, 8), "w2_a": torch.randn(24, 2), "w2_b": torch.randn(2, 10)}
        weights = LokrWeights(**{name: t.half() for name, t in parts.items()}, alpha=1e10)
    else:
        shapes = ((ROWS, rank), (rank, COLUMNS)) * 2
        weights = LohaWeights(*(torch.randn(shape).half() for shape in shapes), alpha=1e10)
    adapter = make_adapter({TO_Q: weights})
    composition = resize_adapter(adapter, rank=6)  # by an exact SVD in every kind
    (resized,) = composition.adapter.modules.values()
    composition.adapter.check_finite()
    check_equal(compute_dense(resized), truncate(compute_dense(weights), 6), 1e-3)
    lora = LoraWeights(torch.randn(2, COLUMNS).half(), torch.randn(ROWS, 2).half())
    adapters = [(adapter, 1.0), (make_adapter({TO_Q: lora}, "other"), 1.0)]
    merged = merge_adapters(adapters, rank=3).adapter
    merged.check_finite()


def test_a_diff_that_overflows_fp16_is_written_in_float32():
    diff = DiffWeights(torch.full(TO_Q_SHAPE, 6e4, dtype=torch.float16))
    adapters = [(make_adapter({TO_Q: diff}), 1.0), (make_adapter({TO_Q: diff}, "other"), 1.0)]
    for pairs in (adapters, [(adapters[0][0], 2.0)]):
        (found,) = merge_adapters(pairs).adapter.modules.values()
        assert torch.equal(found.delta(), 2 * diff.delta())


def test_biases_of_two_lengths_are_not_broadcast():
    lora = LoraWeights(torch.ones(2, 6), torch.ones(4, 2), bias_delta=torch.ones(4))
    short = DiffWeights(bias_delta=torch.ones(1))
    adapters = [make_adapter({TO_Q: lora}), make_adapter({TO_Q: short}, "other")]
    with pytest.raises(ShapeError, match="expected one shape"):
        merge_adapters([(adapter, 1.0) for adapter in adapters])
