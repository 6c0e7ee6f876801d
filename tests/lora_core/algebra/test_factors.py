"""Spectra and products from the factors alone, against dense float64 algebra."""

from __future__ import annotations

import pytest
import torch
from qwen_edit_lora.lora_core import LohaWeights, LokrWeights, LoraWeights, compute_delta
from qwen_edit_lora.lora_core.algebra.factors import (
    Factors,
    compute_inner_product,
    compute_singular_values,
    get_factors,
)

ROWS, COLUMNS, RANK = 48, 36, 8


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make_factors(spectrum: torch.Tensor) -> Factors:
    """Factors of a delta with exactly these singular values, badly balanced on purpose."""
    rank = len(spectrum)
    u = torch.linalg.qr(torch.randn(ROWS, rank, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(COLUMNS, rank, dtype=torch.float64))[0]
    mix = torch.randn(rank, rank, dtype=torch.float64)
    return Factors(torch.linalg.inv(mix) @ v.T * 1e3, u * spectrum @ mix / 1e3)


SPECTRA = {
    "even": torch.linspace(1, 2, RANK).flip(0).double(),
    "ill-conditioned": torch.logspace(0, -6, RANK).double(),
    "tiny": torch.logspace(-9, -12, RANK).double(),
}


@pytest.mark.parametrize("name", SPECTRA)
def test_singular_values_are_exact_down_to_a_millionth_of_the_largest(name):
    expected = SPECTRA[name]
    found = compute_singular_values(make_factors(expected))
    assert ((found - expected).abs() / expected).max() < 1e-6


def test_a_rank_deficient_delta_has_zeros_at_the_end_of_its_spectrum():
    factors = make_factors(SPECTRA["even"][:3])
    padded = Factors(
        torch.cat([factors.down, torch.zeros(5, COLUMNS, dtype=torch.float64)]),
        torch.cat([factors.up, torch.randn(ROWS, 5, dtype=torch.float64)], dim=1),
    )
    found = compute_singular_values(padded)
    torch.testing.assert_close(found[:3], SPECTRA["even"][:3], rtol=1e-9, atol=0)
    assert len(found) == 8
    assert found[3:].max() < 1e-12


def test_a_rank_above_the_layers_width_gives_as_many_values_as_the_layer_has():
    factors = Factors(torch.randn(50, COLUMNS).double(), torch.randn(ROWS, 50).double())
    expected = torch.linalg.svdvals(factors.to_dense())
    torch.testing.assert_close(compute_singular_values(factors), expected, rtol=1e-9, atol=1e-12)


def test_a_zero_delta_has_a_zero_spectrum():
    factors = Factors(torch.randn(RANK, COLUMNS).double(), torch.zeros(ROWS, RANK).double())
    assert torch.equal(compute_singular_values(factors), torch.zeros(RANK, dtype=torch.float64))


KINDS = {
    "LoRA": lambda: LoraWeights(torch.randn(4, COLUMNS), torch.randn(ROWS, 4), 3.0),
    "LoHa": lambda: LohaWeights(
        torch.randn(ROWS, 3), torch.randn(3, COLUMNS), torch.randn(ROWS, 3),
        torch.randn(3, COLUMNS), 2.0,
    ),
    "LoKr wide": lambda: LokrWeights(
        w1=torch.randn(3, 4), w2_a=torch.randn(16, 2), w2_b=torch.randn(2, 9), alpha=1.0
    ),
    "LoKr tall": lambda: LokrWeights(
        w1=torch.randn(4, 3), w2_a=torch.randn(12, 2), w2_b=torch.randn(2, 12), alpha=1.0
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_factors_of_every_kind_multiply_to_its_delta(kind):
    weights = KINDS[kind]()
    dense = get_factors(weights).to_dense()
    torch.testing.assert_close(dense.float(), compute_delta(weights), rtol=1e-4, atol=1e-5)


def test_kinds_whose_factors_would_cost_more_than_the_matrix_have_none():
    wide = LohaWeights(
        *(torch.randn(s) for s in ((ROWS, 6), (6, COLUMNS), (ROWS, 6), (6, COLUMNS)))
    )
    assert get_factors(wide) is None
    assert get_factors(LokrWeights(w1=torch.randn(4, 3), w2=torch.randn(12, 12))) is None


def test_inner_products_and_sums_need_no_equal_ranks():
    a, b = get_factors(KINDS["LoRA"]()), get_factors(KINDS["LoHa"]())
    expected = (a.to_dense() * b.to_dense()).sum().item()
    assert compute_inner_product(a, b) == pytest.approx(expected, rel=1e-9)
    total = a + b * -0.5
    torch.testing.assert_close(total.to_dense(), a.to_dense() - 0.5 * b.to_dense())
    assert total.inner == a.inner + b.inner


@pytest.mark.parametrize(("rows", "columns"), [(8, 6), (6, 8), (6, 6)])
def test_a_rank_above_the_sides_is_cut_to_what_the_delta_can_have(rows, columns):
    weights = LoraWeights(torch.randn(50, columns), torch.randn(rows, 50), 3.0)
    factors = get_factors(weights)
    assert factors.inner == min(rows, columns)
    dense = weights.scale * weights.lora_B.double() @ weights.lora_A.double()
    torch.testing.assert_close(factors.to_dense(), dense)
    values = torch.linalg.svdvals(dense)
    torch.testing.assert_close(compute_singular_values(factors), values)
