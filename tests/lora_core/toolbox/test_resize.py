"""resize_adapter against the dense truth."""

from __future__ import annotations

import pytest
import torch
from dense_algebra import (
    COLUMNS,
    KINDS,
    ROWS,
    TO_K,
    TO_Q,
    check_equal,
    check_figures,
    compute_dense,
    compute_retained,
    make_adapter,
    make_loha,
    make_lokr,
    make_lora,
    truncate,
)
from qwen_edit_lora.lora_core import (
    ConfigError,
    DiffWeights,
    DoraWeights,
    LoraWeights,
    OftWeights,
    merge_adapters,
    resize_adapter,
)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("rank", [1, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_resize_gives_the_best_approximation_of_its_rank_and_its_true_energy(rank, dtype):
    modules = {TO_Q: make_lora(6, 3.0, dtype), TO_K: make_lora(9, None, dtype)}
    found = resize_adapter(make_adapter(modules), rank=rank)
    rounding = 10 * torch.finfo(dtype).eps
    for path, weights in modules.items():
        resized = found.adapter.modules[path]
        assert (resized.rank, resized.scale, resized.dtype) == (rank, 1.0, dtype)
        check_equal(compute_dense(resized), truncate(compute_dense(weights), rank), rounding)
    check_figures(found, {path: compute_dense(weights) for path, weights in modules.items()})


def test_the_two_factors_of_a_resized_module_are_balanced():
    weights = make_lora(6)
    skewed = LoraWeights(weights.lora_A * 1e3, weights.lora_B)
    resized = resize_adapter(make_adapter({TO_Q: skewed}), rank=3).adapter.modules[TO_Q]
    values = torch.linalg.svdvals(compute_dense(skewed))[:3].float()
    torch.testing.assert_close(resized.lora_A.norm(dim=1).square(), values)
    torch.testing.assert_close(resized.lora_B.norm(dim=0).square(), values)


@pytest.mark.parametrize("energy", [0.7, 0.9, 0.99, 0.9999])
def test_an_energy_threshold_picks_the_smallest_rank_that_keeps_it(energy):
    modules = {TO_Q: make_lora(12), TO_K: make_lora(5, 2.0)}
    found = resize_adapter(make_adapter(modules), energy=energy)
    for path, weights in modules.items():
        delta, rank = compute_dense(weights), found.adapter.modules[path].rank
        assert found.retained[path] >= energy
        assert rank == 1 or compute_retained(delta, truncate(delta, rank - 1)) < energy
    assert found.adapter.modules[TO_Q].rank > 1


def test_energy_1_drops_only_what_is_rounding():
    weights = make_lora(4)
    doubled = LoraWeights(weights.lora_A.repeat(2, 1), weights.lora_B.repeat(1, 2), alpha=8.0)
    found = resize_adapter(make_adapter({TO_Q: doubled}), energy=1.0)
    assert found.adapter.modules[TO_Q].rank == 4
    check_equal(compute_dense(found.adapter.modules[TO_Q]), compute_dense(doubled))


def test_with_rank_and_energy_the_rank_is_the_limit():
    adapter = make_adapter({TO_Q: make_lora(12)})
    free = resize_adapter(adapter, energy=0.9).adapter.modules[TO_Q].rank
    both = resize_adapter(adapter, rank=free - 1, energy=0.9).adapter.modules[TO_Q].rank
    assert both == free - 1
    assert resize_adapter(adapter, rank=free + 3, energy=0.9).adapter.modules[TO_Q].rank == free


def test_a_module_of_lower_rank_is_kept_bit_for_bit_and_never_padded():
    small = make_lora(3, alpha=7.0, dtype=torch.bfloat16)
    found = resize_adapter(make_adapter({TO_Q: small, TO_K: make_lora(12)}), rank=8)
    kept = found.adapter.modules[TO_Q]
    assert (kept.rank, kept.alpha, found.retained[TO_Q]) == (3, 7.0, 1.0)
    assert torch.equal(kept.lora_A, small.lora_A)
    assert found.adapter.modules[TO_K].rank == 8
    assert "modules small enough and unchanged: 1 of 2" in found.notes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [3, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_become_the_nearest_lora(kind, rank, dtype):
    weights = KINDS[kind]()
    weights = weights.with_parts({n: t.to(dtype) for n, t in weights.parts.items()})
    found = resize_adapter(make_adapter({TO_Q: weights}), rank=rank)
    resized = found.adapter.modules[TO_Q]
    assert (resized.kind, resized.dtype) == ("LoRA", dtype)
    delta = compute_dense(weights)
    best = compute_retained(delta, truncate(delta, rank))
    # the randomised SVD may lose a little; the reported loss stays correct
    slack = 0.01 if kind in ("wide LoHa", "diff") and rank == 3 else 0.0
    assert compute_retained(delta, compute_dense(resized)) >= best - slack - 1e-4
    check_figures(found, {TO_Q: delta})


def test_a_factor_in_fp8_becomes_bf16():
    weights = make_lora(6, None, torch.float8_e4m3fn)
    adapter = make_adapter({TO_Q: weights})
    delta = weights.lora_B.double() @ weights.lora_A.double()
    resized = resize_adapter(adapter, rank=3)
    check_equal(compute_dense(resized.adapter.modules[TO_Q]), truncate(delta, 3), 0.02)
    merged = merge_adapters([(adapter, 0.5), (make_adapter({TO_Q: weights}), 0.5)])
    check_equal(compute_dense(merged.adapter.modules[TO_Q]), delta)
    for found in (resized, merged):
        assert found.adapter.modules[TO_Q].dtype == torch.bfloat16


def test_a_loss_far_below_what_float32_resolves_is_still_measured():
    tail = torch.tensor([1.0, 1e-7, 1e-8], dtype=torch.float64)
    u = torch.linalg.qr(torch.randn(ROWS, 3).double())[0]
    v = torch.linalg.qr(torch.randn(COLUMNS, 3).double())[0]
    found = resize_adapter(make_adapter({TO_Q: LoraWeights(v.T, u * tail)}), rank=2)
    assert found.residual[TO_Q] == pytest.approx(1e-8, rel=1e-4)


def test_an_energy_of_kinds_without_factors_is_met_by_the_smallest_rank_too():
    for weights in (make_loha(30), make_lokr()):
        found = resize_adapter(make_adapter({TO_Q: weights}), energy=0.8)
        delta, rank = compute_dense(weights), found.adapter.modules[TO_Q].rank
        assert found.retained[TO_Q] >= 0.8 - 1e-6
        assert compute_retained(delta, truncate(delta, rank - 1)) < 0.8


def test_a_dora_keeps_its_magnitude_and_resizes_its_direction():
    direction, magnitude = make_lora(8, 4.0), torch.rand(ROWS)
    found = resize_adapter(make_adapter({TO_Q: DoraWeights(direction, magnitude)}), rank=2)
    resized = found.adapter.modules[TO_Q]
    assert torch.equal(resized.magnitude.flatten(), magnitude)
    delta = compute_dense(direction)
    check_equal(compute_dense(resized.direction), truncate(delta, 2))
    expected = compute_retained(delta, truncate(delta, 2))
    assert found.retained[TO_Q] == pytest.approx(expected, abs=1e-6)
    assert any("energies are those of the direction" in note for note in found.notes)


def test_biases_and_norms_pass_through_a_resize():
    lora, bias = make_lora(8), torch.randn(ROWS)
    modules = {
        TO_Q: LoraWeights(lora.lora_A, lora.lora_B, None, bias),
        "transformer_blocks.0.attn.norm_q": DiffWeights(torch.randn(COLUMNS)),
    }
    found = resize_adapter(make_adapter(modules), rank=2).adapter.modules
    assert torch.equal(found[TO_Q].bias_delta, bias)
    norm = found["transformer_blocks.0.attn.norm_q"]
    assert torch.equal(norm.delta(), modules["transformer_blocks.0.attn.norm_q"].delta())


def test_an_untrained_module_survives_a_resize_and_loses_nothing():
    zero = LoraWeights(torch.randn(8, COLUMNS), torch.zeros(ROWS, 8))
    found = resize_adapter(make_adapter({TO_Q: zero}), rank=2)
    assert compute_dense(found.adapter.modules[TO_Q]).abs().max() == 0
    assert found.total_retained == 1.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "neither rank nor energy; give one"),
        ({"rank": 0}, "rank is 0; expected a whole number of at least 1"),
        ({"rank": 2.5}, "rank is 2.5; expected a whole number"),
        ({"energy": 0.0}, "energy is 0.0; expected a share above 0 and up to 1"),
        ({"energy": 1.5}, "energy is 1.5; expected a share"),
        ({"energy": float("nan")}, "energy is nan; expected a share"),
    ],
)
def test_settings_out_of_range_are_refused_with_a_message(settings, message):
    with pytest.raises(ConfigError, match=message):
        resize_adapter(make_adapter({TO_Q: make_lora()}), **settings)


def test_resizing_an_oft_is_refused():
    adapter = make_adapter({TO_Q: OftWeights(torch.randn(48, 2, 2))})
    with pytest.raises(ConfigError, match=rf"{TO_Q} holds OFT weights.*no rank to lower; expected"):
        resize_adapter(adapter, rank=2)
