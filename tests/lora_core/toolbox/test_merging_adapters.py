"""merge_adapters against the dense truth."""

from __future__ import annotations

import pytest
import torch
from dense_algebra import (
    COLUMNS,
    KINDS,
    ROWS,
    TO_K,
    TO_Q,
    TO_V,
    check_equal,
    check_figures,
    compute_dense,
    make_adapter,
    make_lokr,
    make_lora,
    truncate,
)
from qwen_edit_lora.lora_core import (
    ConfigError,
    DiffWeights,
    DoraWeights,
    LokrWeights,
    LoraWeights,
    NonFiniteWeightsError,
    OftWeights,
    ShapeError,
    merge_adapters,
)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_a_merge_adds_the_weighted_deltas_of_different_ranks_and_targets():
    a = make_adapter({TO_Q: make_lora(4, 3.0), TO_K: make_lora(2)})
    b = make_adapter({TO_Q: make_lora(7), TO_V: make_lora(5, 1.0)})
    found = merge_adapters([(a, 0.8), (b, -0.35)])
    modules = found.adapter.modules
    expected = {
        TO_Q: 0.8 * compute_dense(a.modules[TO_Q]) - 0.35 * compute_dense(b.modules[TO_Q]),
        TO_K: 0.8 * compute_dense(a.modules[TO_K]),
        TO_V: -0.35 * compute_dense(b.modules[TO_V]),
    }
    assert {path: weights.rank for path, weights in modules.items()} == {TO_Q: 11, TO_K: 2, TO_V: 5}
    for path, delta in expected.items():
        check_equal(compute_dense(modules[path]), delta)
    assert found.total_retained == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("strength", [1.0, 0.3])
def test_a_merge_at_one_common_scale_keeps_every_bit_of_a_bf16_file(strength):
    a, b = make_lora(4, 2.0, torch.bfloat16), make_lora(6, 3.0, torch.bfloat16)
    found = merge_adapters(
        [(make_adapter({TO_Q: a}), strength), (make_adapter({TO_Q: b}), strength)]
    )
    merged = found.adapter.modules[TO_Q]
    assert merged.dtype == torch.bfloat16
    assert torch.equal(merged.lora_A, torch.cat([a.lora_A, b.lora_A]))
    assert torch.equal(merged.lora_B, torch.cat([a.lora_B, b.lora_B], dim=1))
    check_equal(compute_dense(merged), strength * (compute_dense(a) + compute_dense(b)))
    assert found.retained[TO_Q] == 1.0


def test_rounding_that_a_bf16_merge_cannot_avoid_is_measured():
    a, b = make_lora(4, 2.0, torch.bfloat16), make_lora(6, 3.7, torch.bfloat16)
    found = merge_adapters([(make_adapter({TO_Q: a}), 0.77), (make_adapter({TO_Q: b}), 0.3)])
    delta = 0.77 * compute_dense(a) + 0.3 * compute_dense(b)
    check_figures(found, {TO_Q: delta})
    kept = compute_dense(found.adapter.modules[TO_Q])
    lost = ((delta - kept).square().sum() / delta.square().sum()).item()
    assert 1 - found.retained[TO_Q] == pytest.approx(lost, rel=1e-3)
    assert 1e-8 < lost < 1e-4


@pytest.mark.parametrize("rank", [2, 6])
def test_a_merge_to_a_rank_is_the_best_approximation_of_the_sum(rank):
    a, b = make_adapter({TO_Q: make_lora(4)}), make_adapter({TO_Q: make_lora(5)})
    found = merge_adapters([(a, 1.0), (b, 0.5)], rank=rank)
    delta = compute_dense(a.modules[TO_Q]) + 0.5 * compute_dense(b.modules[TO_Q])
    assert found.adapter.modules[TO_Q].rank == rank
    check_equal(compute_dense(found.adapter.modules[TO_Q]), truncate(delta, rank))
    check_figures(found, {TO_Q: delta})


def test_a_single_adapter_at_strength_1_is_copied():
    modules = {
        TO_Q: make_lora(4, 3.0, torch.bfloat16),
        TO_K: DoraWeights(make_lora(2), torch.rand(ROWS)),
        TO_V: OftWeights(torch.randn(48, 2, 2)),
    }
    found = merge_adapters([(make_adapter(modules), 1.0)]).adapter.modules
    for path, weights in modules.items():
        assert found[path].kind == weights.kind
        assert found[path].alpha == weights.alpha
        for name, tensor in weights.parts.items():
            assert torch.equal(found[path].part(name).flatten(), tensor.flatten())


SINGLES = {
    **KINDS,
    "LoRA": lambda: make_lora(3, 2.0),
    "LoKr, alpha of no meaning": lambda: make_lokr(1e10),
}


@pytest.mark.parametrize("strength", [0.4, -1.5])
@pytest.mark.parametrize("kind", SINGLES)
def test_a_module_of_one_adapter_keeps_its_kind_at_any_strength(kind, strength):
    weights = SINGLES[kind]()
    found = merge_adapters([(make_adapter({TO_Q: weights}), strength)]).adapter.modules[TO_Q]
    assert found.kind == weights.kind
    check_equal(compute_dense(found), strength * compute_dense(weights))


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_add_to_a_lora(kind):
    a, b = KINDS[kind](), make_lora(3)
    shares = [(make_adapter({TO_Q: a}), 0.7), (make_adapter({TO_Q: b}), -2.0)]
    delta = 0.7 * compute_dense(a) - 2 * compute_dense(b)
    if kind in ("wide LoHa", "LoKr", "wide LoKr"):
        with pytest.raises(
            ConfigError, match=rf"{TO_Q} holds Lo.. weights without low-rank .*rank"
        ):
            merge_adapters(shares)
        found = merge_adapters(shares, rank=60)
        kept = compute_dense(found.adapter.modules[TO_Q])
        check_equal(kept, truncate(delta, 60), 1e-5)
    else:
        found = merge_adapters(shares)
        check_equal(compute_dense(found.adapter.modules[TO_Q]), delta)
    check_figures(found, {TO_Q: delta})


def test_biases_add_with_their_strengths():
    q, bias = make_lora(), torch.randn(ROWS)
    a = make_adapter({TO_Q: LoraWeights(q.lora_A, q.lora_B, None, bias)})
    b = make_adapter({TO_Q: DiffWeights(None, torch.ones(ROWS))})
    merged = merge_adapters([(a, 0.5), (b, 2.0)]).adapter.modules[TO_Q]
    torch.testing.assert_close(merged.bias_delta, 0.5 * bias + 2)
    check_equal(compute_dense(merged), 0.5 * compute_dense(q))
    alone = merge_adapters([(a, -0.5)]).adapter.modules[TO_Q]
    torch.testing.assert_close(alone.bias_delta, -0.5 * bias)


def test_strength_0_counts_as_absent():
    a, b = make_adapter({TO_Q: make_lora(4)}), make_adapter({TO_Q: make_lora(5), TO_K: make_lora()})
    modules = merge_adapters([(a, 1.0), (b, 0.0)]).adapter.modules
    assert list(modules) == [TO_Q]
    assert modules[TO_Q].rank == 4


@pytest.mark.parametrize("strengths", [(1.0, 1.0), (0.5, 0.0)])
def test_a_dora_cannot_be_summed_or_weakened(strengths):
    a = make_adapter({TO_Q: DoraWeights(make_lora(), torch.rand(ROWS))})
    b = make_adapter({TO_Q: make_lora()})
    with pytest.raises(ConfigError, match=rf"{TO_Q} holds DoRA weights, which cannot be .*leave"):
        merge_adapters([(a, strengths[0]), (b, strengths[1])])


def test_a_merge_of_nothing_or_of_other_models_is_refused():
    a = make_adapter({TO_Q: make_lora()}, "mine")
    with pytest.raises(ConfigError, match="nothing to merge"):
        merge_adapters([(a, 0.0)])
    with pytest.raises(ConfigError, match="mine has strength inf; expected a finite number"):
        merge_adapters([(a, float("inf"))])
    other = make_adapter({TO_Q: LoraWeights(torch.randn(2, 8), torch.randn(8, 2))}, "theirs")
    with pytest.raises(ShapeError, match=r"\(96, 80\) in mine, \(8, 8\) in theirs; expected one"):
        merge_adapters([(a, 1.0), (other, 1.0)])
    bad = LoraWeights(torch.full((2, COLUMNS), float("inf")), torch.randn(ROWS, 2))
    with pytest.raises(NonFiniteWeightsError, match="holds NaN or Inf"):
        merge_adapters([(make_adapter({TO_Q: bad}), 1.0)])


def test_a_rank_far_above_the_sides_merges_at_what_the_delta_can_have():
    weights = LoraWeights(torch.randn(4000, 8), torch.randn(8, 4000) / 60)
    adapter = make_adapter({TO_Q: weights})
    merged = merge_adapters([(adapter, 1.0), (adapter, -0.5)]).adapter.modules[TO_Q]
    assert merged.rank == 16
    check_equal(compute_dense(merged), 0.5 * compute_dense(weights))


@pytest.mark.parametrize("strength", [1e300, -2e4, float("inf"), float("nan")])
def test_a_strength_beyond_any_use_is_refused(strength):
    with pytest.raises(ConfigError, match="expected a finite number up to 10,000"):
        merge_adapters([(make_adapter({TO_Q: make_lora()}), strength)])


def test_a_sum_without_an_exact_rank_is_refused_before_a_matrix_is_made(monkeypatch):
    def refuse(self, base_weight=None):
        raise AssertionError("the whole matrix was made")

    monkeypatch.setattr(LokrWeights, "delta", refuse)
    adapter = make_adapter({TO_Q: make_lokr()})
    with pytest.raises(ConfigError, match="give a rank to cut it to"):
        merge_adapters([(adapter, 1.0), (make_adapter({TO_Q: make_lora()}), 1.0)])
