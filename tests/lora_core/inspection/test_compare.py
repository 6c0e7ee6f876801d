"""compare_adapters against dense float64 algebra."""

from __future__ import annotations

import json
from collections.abc import Iterable

import pytest
import torch
from dense_algebra import (
    COLUMNS,
    ROWS,
    TO_K,
    TO_Q,
    TO_V,
    LargestTensor,
    compute_dense,
    make_adapter,
)
from qwen_edit_lora.lora_core import (
    Adapter,
    Comparison,
    DiffWeights,
    DoraWeights,
    LohaWeights,
    LokrWeights,
    LoraWeights,
    ModuleWeights,
    NonFiniteWeightsError,
    OftWeights,
    compare_adapters,
)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make_lora(rank: int = 4, alpha: float | None = None, dtype=torch.float32) -> LoraWeights:
    lora_A, lora_B = torch.randn(rank, COLUMNS), torch.randn(ROWS, rank) / 10
    return LoraWeights(lora_A.to(dtype), lora_B.to(dtype), alpha)


def concatenate(adapter: Adapter, paths: Iterable[str]) -> torch.Tensor:
    """The adapter as one vector; zeros where it lacks a module."""
    zeros = torch.zeros(ROWS, COLUMNS, dtype=torch.float64)
    deltas = [compute_dense(adapter.modules[p]) if p in adapter.modules else zeros for p in paths]
    return torch.cat([delta.reshape(-1) for delta in deltas])


def compute_dense_overlap(a: torch.Tensor, b: torch.Tensor, i: int, j: int) -> tuple[float, float]:
    (u_a, _, vh_a), (u_b, _, vh_b) = (torch.linalg.svd(x, full_matrices=False) for x in (a, b))
    left = (u_a[:, :i].T @ u_b[:, :j]).square().sum() / min(i, j)
    right = (vh_a[:i] @ vh_b[:j].T).square().sum() / min(i, j)
    return left.item(), right.item()


def count_energy_90(delta: torch.Tensor) -> int:
    held = torch.linalg.svdvals(delta).square().cumsum(0)
    return int((held < 0.9 * held[-1]).sum()) + 1


def check_relation(found, a: torch.Tensor, b: torch.Tensor) -> None:
    a, b = a.reshape(-1), b.reshape(-1)
    cosine = (a @ b / (a.norm() * b.norm())).item()
    assert found.cosine == pytest.approx(cosine, rel=1e-9, abs=1e-12)
    assert found.norm_a == pytest.approx(a.norm().item(), rel=1e-9)
    assert found.norm_ratio == pytest.approx((b.norm() / a.norm()).item(), rel=1e-9)
    assert found.drift == pytest.approx(((b - a).norm() / a.norm()).item(), rel=1e-9)
    assert found.norm_sum == pytest.approx((a + b).norm().item(), rel=1e-9)


@pytest.mark.parametrize(("rank_a", "rank_b"), [(4, 4), (4, 9), (90, 3)])
def test_metrics_of_a_module_equal_dense_algebra_at_any_ranks(rank_a, rank_b):
    a, b = make_lora(rank_a, alpha=3.0), make_lora(rank_b)
    dense_a, dense_b = compute_dense(a), compute_dense(b)
    found = compare_adapters(make_adapter({TO_Q: a}), make_adapter({TO_Q: b})).modules[TO_Q]
    check_relation(found, dense_a, dense_b)
    true_ranks = [min(rank, COLUMNS) for rank in (rank_a, rank_b)]
    assert [found.overlap.rank_a, found.overlap.rank_b] == true_ranks
    left, right = compute_dense_overlap(dense_a, dense_b, *true_ranks)
    assert found.overlap.left == pytest.approx(left, abs=1e-9)
    assert found.overlap.right == pytest.approx(right, abs=1e-9)
    ranks_90 = [count_energy_90(dense_a), count_energy_90(dense_b)]
    assert [found.overlap_90.rank_a, found.overlap_90.rank_b] == ranks_90
    left, right = compute_dense_overlap(dense_a, dense_b, *ranks_90)
    assert found.overlap_90.left == pytest.approx(left, abs=1e-9)
    assert found.overlap_90.right == pytest.approx(right, abs=1e-9)


def make_spectrum(spectrum: torch.Tensor) -> LoraWeights:
    """A LoRA with these singular values, in float64 and badly balanced."""
    u = torch.linalg.qr(torch.randn(ROWS, len(spectrum), dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(COLUMNS, len(spectrum), dtype=torch.float64))[0]
    mix = torch.randn(len(spectrum), len(spectrum), dtype=torch.float64)
    return LoraWeights(torch.linalg.inv(mix) @ v.T * 1e3, u * spectrum @ mix / 1e3)


@pytest.mark.parametrize("smallest", [1e-2, 3e-6])
def test_subspaces_of_ill_conditioned_factors_are_those_of_the_dense_delta(smallest):
    spectrum = torch.logspace(0, torch.tensor(smallest).log10().item(), 6).double()
    a, b = make_spectrum(spectrum), make_lora(5)
    found = compare_adapters(make_adapter({TO_Q: a}), make_adapter({TO_Q: b})).modules[TO_Q]
    left, right = compute_dense_overlap(compute_dense(a), compute_dense(b), 6, 5)
    assert found.overlap.rank_a == 6
    assert found.overlap.left == pytest.approx(left, rel=1e-6)
    assert found.overlap.right == pytest.approx(right, rel=1e-6)


def test_directions_from_rounding_do_not_count():
    lora_A = torch.randn(2, COLUMNS)
    weights = LoraWeights(torch.cat([lora_A, lora_A]), torch.randn(ROWS, 4))
    adapter = make_adapter({TO_Q: weights})
    found = compare_adapters(adapter, make_adapter({TO_Q: make_lora(3)})).modules[TO_Q]
    assert (found.rank_a, found.overlap.rank_a) == (4, 2)


def test_overall_metrics_are_those_of_the_concatenated_deltas():
    a = make_adapter({TO_Q: make_lora(4), TO_K: make_lora(2, alpha=8.0)})
    b = make_adapter({TO_K: make_lora(5), TO_V: make_lora(3)})
    found = compare_adapters(a, b)
    assert (found.only_in_a, found.only_in_b) == ((TO_Q,), (TO_V,))
    assert list(found.modules) == [TO_K]
    paths = (TO_Q, TO_K, TO_V)
    check_relation(found, concatenate(a, paths), concatenate(b, paths))


def test_the_same_adapter_has_cosine_1_no_drift_and_full_overlap():
    adapter = make_adapter({TO_Q: make_lora(4), TO_K: make_lora(3)})
    found = compare_adapters(adapter, adapter)
    assert found.cosine == pytest.approx(1, abs=1e-12)
    assert found.norm_ratio == pytest.approx(1, abs=1e-12)
    assert found.drift == pytest.approx(0, abs=1e-12)
    assert found.conflict == 0
    assert found.overlap.left == pytest.approx(1, abs=1e-12)
    assert found.overlap_90.right == pytest.approx(1, abs=1e-12)


def test_a_negated_adapter_has_cosine_minus_1_and_cancels_entirely():
    weights = make_lora()
    negated = LoraWeights(weights.lora_A, -weights.lora_B)
    found = compare_adapters(make_adapter({TO_Q: weights}), make_adapter({TO_Q: negated}))
    assert found.cosine == pytest.approx(-1, abs=1e-12)
    assert found.drift == pytest.approx(2, rel=1e-12)
    assert found.conflict == pytest.approx(1, abs=1e-12)
    assert found.norm_sum == pytest.approx(0, abs=1e-6 * found.norm_a)


def test_adapters_on_orthogonal_outputs_have_cosine_0_and_no_overlap_there():
    basis = torch.linalg.qr(torch.randn(ROWS, 7))[0]
    lora_A = torch.randn(4, COLUMNS)
    a, b = LoraWeights(lora_A, basis[:, :4]), LoraWeights(lora_A[:3], basis[:, 4:])
    found = compare_adapters(make_adapter({TO_Q: a}), make_adapter({TO_Q: b}))
    assert found.cosine == pytest.approx(0, abs=1e-6)
    assert found.overlap.left == pytest.approx(0, abs=1e-6)
    assert found.overlap.right == pytest.approx(1, abs=1e-6)


def test_two_random_adapters_overlap_by_chance():
    pairs = [(make_lora(8), make_lora(12)) for _ in range(20)]
    a = make_adapter({f"transformer_blocks.{i}.attn.to_q": a for i, (a, _) in enumerate(pairs)})
    b = make_adapter({f"transformer_blocks.{i}.attn.to_q": b for i, (_, b) in enumerate(pairs)})
    overlap = compare_adapters(a, b).overlap
    assert overlap.left_by_chance == pytest.approx(12 / ROWS)
    assert overlap.right_by_chance == pytest.approx(12 / COLUMNS)
    assert overlap.left == pytest.approx(overlap.left_by_chance, rel=0.1)
    assert overlap.right == pytest.approx(overlap.right_by_chance, rel=0.1)


@pytest.mark.parametrize("step", [1e-3, 1e-7, 1e-10])
def test_drift_between_nearly_equal_checkpoints_keeps_its_digits(step):
    lora_A, lora_B = torch.randn(4, COLUMNS).double(), torch.randn(ROWS, 4).double()
    moved = lora_B + step * torch.randn(ROWS, 4).double()
    a, b = LoraWeights(lora_A, lora_B), LoraWeights(lora_A, moved)
    expected = ((moved - lora_B) @ lora_A).norm() / (lora_B @ lora_A).norm()
    found = compare_adapters(make_adapter({TO_Q: a}), make_adapter({TO_Q: b}))
    assert found.drift == pytest.approx(expected.item(), rel=1e-4)


def test_conflict_is_the_energy_that_the_weaker_loses_along_the_stronger():
    strong, other = make_lora(2), make_lora(2)
    weak = LoraWeights(
        torch.cat([strong.lora_A, other.lora_A]),
        torch.cat([-0.2 * strong.lora_B, 0.1 * other.lora_B], dim=1),
    )
    a, b = compute_dense(strong).reshape(-1), compute_dense(weak).reshape(-1)
    along = (b @ a / (a @ a)) * a  # the component of the weaker, which points backwards
    expected = ((along @ along) / (b @ b)).item()
    found = compare_adapters(make_adapter({TO_Q: strong}), make_adapter({TO_Q: weak}))
    assert found.conflict == pytest.approx(expected, rel=1e-9)
    assert 0.3 < expected < 0.95
    swapped = compare_adapters(make_adapter({TO_Q: weak}), make_adapter({TO_Q: strong}))
    assert swapped.conflict == pytest.approx(expected, rel=1e-9)


def test_agreement_in_one_module_does_not_hide_conflict_in_another():
    q, k = make_lora(), make_lora()
    negated = LoraWeights(k.lora_A, -k.lora_B)
    found = compare_adapters(
        make_adapter({TO_Q: q, TO_K: k}), make_adapter({TO_Q: q, TO_K: negated})
    )
    square_q, square_k = (compute_dense(w).square().sum().item() for w in (q, k))
    assert found.conflict == pytest.approx(square_k / (square_q + square_k), rel=1e-9)


def make_kinds() -> dict[str, tuple[ModuleWeights, ModuleWeights]]:
    def loha(rank: int) -> LohaWeights:
        shapes = ((ROWS, rank), (rank, COLUMNS)) * 2
        return LohaWeights(*(torch.randn(shape) for shape in shapes), alpha=2.0)

    def lokr(p: int, q: int) -> LokrWeights:
        return LokrWeights(w1=torch.randn(p, q), w2=torch.randn(ROWS // p, COLUMNS // q))

    def wide_lokr() -> LokrWeights:
        w2_a, w2_b = torch.randn(24, 9), torch.randn(9, 20)
        return LokrWeights(w1=torch.randn(4, 4), w2_a=w2_a, w2_b=w2_b, alpha=2.0)

    return {
        "LoHa with factors": (loha(2), make_lora()),
        "wide LoHa": (loha(30), make_lora()),
        "LoKr of one split": (lokr(4, 4), lokr(4, 4)),
        "LoKr, scaled": (wide_lokr(), wide_lokr()),
        "LoKr of two splits": (lokr(4, 4), lokr(8, 2)),
        "LoKr and LoRA": (lokr(4, 4), make_lora()),
        "diff": (DiffWeights(torch.randn(ROWS, COLUMNS)), make_lora()),
        "norm": (DiffWeights(torch.randn(ROWS)), DiffWeights(torch.randn(ROWS))),
    }


@pytest.mark.parametrize("kind", make_kinds())
def test_every_additive_kind_compares_by_its_true_delta(kind):
    a, b = make_kinds()[kind]
    found = compare_adapters(make_adapter({TO_Q: a}), make_adapter({TO_Q: b}))
    dense_a, dense_b = a.delta().double().reshape(-1), b.delta().double().reshape(-1)
    assert found.norm_a == pytest.approx(dense_a.norm().item(), rel=1e-5)
    assert found.drift == pytest.approx(
        ((dense_b - dense_a).norm() / dense_a.norm()).item(), rel=1e-5
    )
    cosine = torch.dot(dense_a, dense_b) / (dense_a.norm() * dense_b.norm())
    assert found.cosine == pytest.approx(cosine.item(), abs=1e-6)
    assert (found.overlap is None) == ("factors" not in kind)


def test_the_drift_of_a_lokr_keeps_its_digits_too():
    w1, w2 = torch.randn(4, 4).double(), torch.randn(24, 20).double()
    step_1, step_2 = 1e-7 * w1.abs(), 1e-7 * (w2 + torch.randn(24, 20))
    a, b = LokrWeights(w1=w1, w2=w2), LokrWeights(w1=w1 + step_1, w2=w2 + step_2)
    difference = torch.kron(step_1, w2) + torch.kron(w1, step_2)  # and a share of 1e-7 more
    expected = (difference.norm() / torch.kron(w1, w2).norm()).item()
    found = compare_adapters(make_adapter({TO_Q: a}), make_adapter({TO_Q: b}))
    assert found.drift == pytest.approx(expected, rel=1e-6)


def make_dora() -> DoraWeights:
    return DoraWeights(make_lora(), torch.rand(ROWS))


OBSTACLES = {
    "DoRA": (make_dora, "the delta of DoRA weights depends on the base weight"),
    "OFT": (lambda: OftWeights(torch.randn(48, 2, 2)), "the delta of OFT weights depends on"),
    "bias": (lambda: DiffWeights(None, torch.randn(ROWS)), "it holds a bias only"),
    "shape": (
        lambda: LoraWeights(torch.randn(2, COLUMNS + 1), torch.randn(ROWS, 2)),
        f"it is ({ROWS}, {COLUMNS + 1}) in a but ({ROWS}, {COLUMNS}) in b",
    ),
}


@pytest.mark.parametrize("name", OBSTACLES)
def test_what_cannot_be_compared_is_listed_with_its_reason_and_excluded_from_metrics(name):
    build, reason = OBSTACLES[name]
    a = make_adapter({TO_Q: build(), TO_K: make_lora()})
    b = make_adapter({TO_Q: make_lora(), TO_K: make_lora()})
    found = compare_adapters(a, b)
    assert list(found.modules) == [TO_K]
    assert found.not_comparable[TO_Q].startswith(reason)
    assert found.norm_b == pytest.approx(compute_dense(b.modules[TO_K]).norm().item(), rel=1e-9)
    assert "Warning: 1 module left out of the comparison" in found.to_text()


def test_an_untrained_adapter_gives_no_cosine_instead_of_a_wrong_one():
    zero = LoraWeights(torch.randn(4, COLUMNS), torch.zeros(ROWS, 4))
    found = compare_adapters(make_adapter({TO_Q: zero}), make_adapter({TO_Q: make_lora()}))
    module = found.modules[TO_Q]
    assert (module.cosine, module.norm_ratio, module.drift, module.overlap) == (None,) * 4
    assert found.conflict is None
    assert "cosine undefined (a delta is zero)" in found.to_text()


def test_adapters_without_a_common_module_are_independent():
    found = compare_adapters(make_adapter({TO_Q: make_lora()}), make_adapter({TO_K: make_lora()}))
    assert (found.cosine, found.conflict, found.overlap) == (0, None, None)
    assert found.drift == pytest.approx(found.norm_if_independent / found.norm_a, rel=1e-12)


def test_non_finite_weights_are_refused_by_name():
    bad = LoraWeights(torch.full((2, COLUMNS), float("nan")), torch.randn(ROWS, 2))
    with pytest.raises(NonFiniteWeightsError, match=r"broken holds NaN or Inf in .*to_q"):
        compare_adapters(make_adapter({TO_Q: make_lora()}), make_adapter({TO_Q: bad}, "broken"))


def compare_two() -> Comparison:
    a = make_adapter({TO_Q: make_lora(), TO_K: make_lora()}, "first.safetensors")
    b = make_adapter({TO_Q: make_lora(8), TO_V: make_lora()}, "second.safetensors")
    return compare_adapters(a, b)


def test_the_result_is_plain_json():
    found = compare_two()
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert data["cosine"] == found.cosine
    assert data["only_in_b"] == [TO_V]
    assert data["modules"][TO_Q]["overlap_90"]["left"] == found.modules[TO_Q].overlap_90.left
    assert data["modules"][TO_Q]["rank_b"] == 8


def test_the_text_states_the_same_metrics():
    found = compare_two()
    text = found.to_text()
    assert "a: first.safetensors; b: second.safetensors" in text
    assert "1 module compared, 1 only in a, 1 only in b" in text
    assert f"cosine {found.cosine:.3g}" in text
    assert f"only in b: {TO_V}" in text


def test_plain_loras_are_compared_without_a_tensor_of_the_modules_size():
    with LargestTensor() as seen:
        compare_two()
    assert ROWS * 4 <= seen.largest <= ROWS * 16 < ROWS * COLUMNS


def test_progress_is_reported_and_a_stop_is_obeyed():
    a = make_adapter({TO_Q: make_lora(), TO_K: make_lora()})
    reported = []
    compare_adapters(a, a, progress=lambda done, total: reported.append((done, total)))
    assert reported == [(0, 2), (1, 2), (2, 2)]
    answers = iter([False, True])
    with pytest.raises(InterruptedError, match="comparison was stopped after 1 of 2 modules"):
        compare_adapters(a, a, should_stop=lambda: next(answers))
