"""resize, merge and extract against the dense truth."""

from __future__ import annotations

import json

import pytest
import torch
from demo_base import dit
from qwen_edit_lora.lora_core import (
    Adapter,
    Composition,
    ConfigError,
    DiffWeights,
    DoraWeights,
    KeyFormatError,
    LohaWeights,
    LokrWeights,
    LoraWeights,
    ModuleWeights,
    NonFiniteWeightsError,
    OftWeights,
    ShapeError,
    extract_adapter,
    merge_adapters,
    read_adapter,
    resize_adapter,
    write_adapter,
)
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

ROWS, COLUMNS = 96, 80
TO_Q = "transformer_blocks.0.attn.to_q"
TO_K = "transformer_blocks.0.attn.to_k"
TO_V = "transformer_blocks.0.attn.to_v"


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make_lora(rank: int = 6, alpha: float | None = None, dtype=torch.float32) -> LoraWeights:
    decay = torch.logspace(0, -1.5, rank)
    lora_A, lora_B = torch.randn(rank, COLUMNS), torch.randn(ROWS, rank) * decay
    return LoraWeights(lora_A.to(dtype), lora_B.to(dtype), alpha)


def make_loha(rank: int) -> LohaWeights:
    shapes = ((ROWS, rank), (rank, COLUMNS)) * 2
    return LohaWeights(*(torch.randn(shape) for shape in shapes), alpha=2.0)


def make_lokr(alpha: float | None = None) -> LokrWeights:
    return LokrWeights(w1=torch.randn(4, 8), w2=torch.randn(24, 10), alpha=alpha)


def make_adapter(modules: dict[str, ModuleWeights], name: str = "adapter", **rest) -> Adapter:
    return Adapter(modules, name=name, **rest)


def compute_dense(weights: ModuleWeights) -> torch.Tensor:
    """float64, so that it can judge differences of 1e-7."""
    if isinstance(weights, LoraWeights):
        return weights.scale * weights.lora_B.double() @ weights.lora_A.double()
    return weights.delta().double()


def truncate(delta: torch.Tensor, rank: int) -> torch.Tensor:
    u, values, vh = torch.linalg.svd(delta, full_matrices=False)
    return u[:, :rank] * values[:rank] @ vh[:rank]


def compute_retained(delta: torch.Tensor, kept: torch.Tensor) -> float:
    return 1 - ((delta - kept).square().sum() / delta.square().sum()).item()


def check_equal(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-6) -> None:
    assert (found - expected).norm() <= tolerance * expected.norm()


def check_figures(found: Composition, deltas: dict[str, torch.Tensor]) -> None:
    """The reported energies are those of the stored tensors against the true deltas."""
    lost = energy = 0.0
    for path, delta in deltas.items():
        kept = compute_dense(found.adapter.modules[path])
        assert found.retained[path] == pytest.approx(compute_retained(delta, kept), abs=1e-6)
        residual = (delta - kept).norm().item()
        assert found.residual[path] == pytest.approx(
            residual, rel=1e-4, abs=1e-6 * delta.norm().item()
        )
        lost, energy = lost + residual**2, energy + delta.square().sum().item()
    assert found.total_retained == pytest.approx(1 - lost / energy, abs=1e-6)


# resize


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
    assert "1 of 2 modules were small enough and stay as they are" in found.notes


KINDS = {
    "LoHa with factors": lambda: make_loha(2),
    "wide LoHa": lambda: make_loha(30),
    "LoKr": make_lokr,
    "LoKr in parts": lambda: LokrWeights(
        w1=torch.randn(4, 8), w2_a=torch.randn(24, 2), w2_b=torch.randn(2, 10), alpha=1.0
    ),
    "wide LoKr": lambda: LokrWeights(
        w1=torch.randn(4, 8), w2_a=torch.randn(24, 9), w2_b=torch.randn(9, 10), alpha=2.0
    ),
    "diff": lambda: DiffWeights(torch.randn(ROWS, COLUMNS)),
}


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
    # the randomised route may lose a little; what it says of itself stays true
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
def test_settings_out_of_range_are_refused_in_a_sentence(settings, message):
    with pytest.raises(ConfigError, match=message):
        resize_adapter(make_adapter({TO_Q: make_lora()}), **settings)


def test_an_oft_has_no_rank_to_lower():
    adapter = make_adapter({TO_Q: OftWeights(torch.randn(48, 2, 2))})
    with pytest.raises(ConfigError, match=rf"{TO_Q} holds OFT weights.*no rank to lower; expected"):
        resize_adapter(adapter, rank=2)


# merge


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


# what every result is


def test_a_written_result_reads_back_with_equal_deltas_and_says_what_was_done(tmp_path):
    a = make_adapter({TO_Q: make_lora(4, 3.0)}, "a.safetensors", metadata={"note": "kept"})
    b = make_adapter({TO_Q: make_lora(5)}, "b.safetensors", metadata={"note": "kept", "b": "only"})
    merged = merge_adapters([(a, 0.3), (b, 1.2)])
    resized = resize_adapter(merged.adapter, rank=3)
    for found in (merged, resized):
        path = write_adapter(found.adapter, tmp_path / "result.safetensors")
        read = read_adapter(path)
        expected = compute_dense(found.adapter.modules[TO_Q])
        check_equal(compute_dense(read.modules[TO_Q]), expected, 1e-12)
    assert read.metadata["note"] == "kept"
    assert "b" not in read.metadata
    history = json.loads(read.metadata["qwen_edit_lora.history"])
    assert [step["did"] for step in history] == ["merge", "resize"]
    assert history[0]["of"] == [["a.safetensors", 0.3], ["b.safetensors", 1.2]]
    assert history[1]["retained"] == pytest.approx(resized.total_retained)


def test_the_report_of_a_result_speaks_of_the_result():
    weights = make_lora(8, 2.0, torch.bfloat16)
    metadata = {"sshs_model_hash": "of the old file", "lora_adapter_metadata": "{}"}
    adapter = make_adapter({TO_Q: weights, TO_K: make_loha(2)}, "old", metadata=metadata)
    found = resize_adapter(adapter, rank=3)
    report = found.adapter.report
    assert (report.num_modules, report.num_keys, report.num_matched_keys) == (2, 6, 6)
    assert (report.ranks, report.scales, report.kinds) == ({3: 2}, {1.0: 2}, {"LoRA": 2})
    assert "matched 2 modules, 6 of 6 keys" in found.to_text()
    assert f"{found.total_retained:.4%} of the energy kept" in found.to_text()
    assert set(found.adapter.metadata) == {"qwen_edit_lora.history"}
    assert json.loads(json.dumps(found.to_dict()))["total_retained"] == found.total_retained


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any operation inside returned."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple) else (result,):
            if isinstance(value, torch.Tensor):
                self.largest = max(self.largest, value.numel())
        return result


def test_plain_loras_are_resized_and_merged_without_a_tensor_of_the_modules_size():
    a, b = make_adapter({TO_Q: make_lora(6)}), make_adapter({TO_Q: make_lora(4)})
    for work in (
        lambda: resize_adapter(a, rank=3),
        lambda: resize_adapter(a, energy=0.9),
        lambda: merge_adapters([(a, 0.3), (b, 0.7)]),
        lambda: merge_adapters([(a, 1.0), (b, 1.0)], rank=5),
    ):
        with LargestTensor() as seen:
            work()
        assert ROWS * 3 <= seen.largest < ROWS * COLUMNS / 2


def test_progress_is_told_and_a_stop_is_heard():
    adapter = make_adapter({TO_Q: make_lora(), TO_K: make_lora()})
    base = {f"{path}.weight": torch.zeros(ROWS, COLUMNS) for path in adapter}
    tuned = {key: torch.randn(ROWS, COLUMNS) for key in base}
    for name, work in {
        "resize": lambda **options: resize_adapter(adapter, rank=2, **options),
        "merge": lambda **options: merge_adapters([(adapter, 1.0)], **options),
        "extraction": lambda **options: extract_adapter(base, tuned, 2, **options),
    }.items():
        told = []
        work(progress=lambda done, total, told=told: told.append((done, total)))
        assert told == [(0, 2), (1, 2), (2, 2)]
        answers = iter([False, True])
        with pytest.raises(InterruptedError, match=f"{name} was stopped after 1 of 2 modules"):
            work(should_stop=lambda answers=answers: next(answers))


# extract


def make_models(
    rank: int, dtype=torch.float32, shape: tuple[int, int] = (ROWS, COLUMNS)
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A base, the base plus deltas of that rank in float32, and the deltas."""
    base, tuned, deltas = {}, {}, {}
    for path in (TO_Q, TO_K):
        u, v = torch.randn(shape[0], rank), torch.randn(rank, shape[1])
        base[f"{path}.weight"] = torch.randn(shape).to(dtype)
        deltas[path] = (u * torch.logspace(0, -1, rank)) @ v * 1e-2
        tuned[f"{path}.weight"] = base[f"{path}.weight"].float() + deltas[path]
    return base, tuned, deltas


@pytest.mark.parametrize("shape", [(ROWS, COLUMNS), (200, 260)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extract_recovers_a_difference_of_known_rank(dtype, shape):
    base, tuned, deltas = make_models(4, dtype, shape)
    found = extract_adapter(base, tuned, rank=4)
    for path, delta in deltas.items():
        assert found.adapter.modules[path].rank == 4
        check_equal(compute_dense(found.adapter.modules[path]), delta.double(), 1e-4)
        assert found.retained[path] == pytest.approx(1, abs=1e-7)


@pytest.mark.parametrize("shape", [(ROWS, COLUMNS), (200, 260)])
def test_what_extract_leaves_out_is_measured_and_near_the_least_possible(shape):
    base, tuned, deltas = make_models(24, shape=shape)
    found = extract_adapter(base, tuned, rank=6)
    true = {path: (tuned[f"{path}.weight"] - base[f"{path}.weight"]).double() for path in deltas}
    check_figures(found, true)
    for path, delta in true.items():
        best = (delta - truncate(delta, 6)).norm().item()
        assert best * (1 - 1e-6) <= found.residual[path] <= best * 1.01
        missing = delta - compute_dense(found.adapter.modules[path])
        assert torch.linalg.matrix_norm(missing, 2) <= found.residual[path]


def test_a_bf16_pair_gives_a_bf16_adapter_of_measured_energy():
    base, tuned, _ = make_models(4, torch.bfloat16)
    tuned = {key: tensor.bfloat16() for key, tensor in tuned.items()}
    found = extract_adapter(base, tuned, rank=4)
    assert found.adapter.modules[TO_Q].dtype == torch.bfloat16
    check_figures(
        found, {path: (tuned[f"{path}.weight"].double() - base[f"{path}.weight"].double())
                for path in (TO_Q, TO_K)},
    )  # fmt: skip
    assert 0.9 < found.total_retained < 1


def test_an_fp8_model_gives_a_bf16_adapter():
    base, tuned, _ = make_models(2)
    tuned = {key: tensor.to(torch.float8_e4m3fn) for key, tensor in tuned.items()}
    found = extract_adapter(base, tuned, rank=70)
    assert found.adapter.modules[TO_Q].dtype == torch.bfloat16
    true = {p: tuned[f"{p}.weight"].double() - base[f"{p}.weight"].double() for p in (TO_Q, TO_K)}
    check_figures(found, true)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
@pytest.mark.parametrize("storage", ["fp8", "fp8_scaled"])
def test_extract_reads_fp8_files_by_their_true_values(tmp_path, storage, prefix):
    base, _, deltas = make_models(4)
    base = {key: tensor * 0.05 for key, tensor in base.items()}
    stored = dit.store_as(base, storage)
    if storage == "fp8_scaled":
        acting = {
            f"{p}.weight": stored[f"{p}.weight"].float() * stored[f"{p}.weight_scale"]
            for p in deltas
        }
    else:
        acting = {f"{p}.weight": stored[f"{p}.weight"].float() for p in deltas}
    tuned = {f"{path}.weight": acting[f"{path}.weight"] + delta for path, delta in deltas.items()}
    save_file({prefix + key: t for key, t in stored.items()}, tmp_path / "base.safetensors")
    save_file(tuned, tmp_path / "tuned.safetensors")
    found = extract_adapter(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", 4)
    for path, delta in deltas.items():
        check_equal(compute_dense(found.adapter.modules[path]), delta.double(), 1e-4)
    assert found.adapter.name == "tuned.safetensors - base.safetensors"


def test_linears_that_do_not_differ_are_left_out_and_counted():
    base, tuned, _ = make_models(2)
    tuned[f"{TO_K}.weight"] = base[f"{TO_K}.weight"].clone()
    base[f"{TO_V}.bias"], tuned[f"{TO_V}.bias"] = torch.zeros(4), torch.ones(4)
    found = extract_adapter(base, tuned, rank=2)
    assert list(found.adapter.modules) == [TO_Q]
    assert found.notes == ("1 of 2 Linears do not differ",)


def test_extract_gives_the_same_result_twice_and_leaves_the_random_state_alone():
    base, tuned, _ = make_models(30, shape=(200, 260))
    state = torch.get_rng_state()
    first, second = (extract_adapter(base, tuned, rank=6).adapter.modules[TO_Q] for _ in range(2))
    assert torch.equal(first.lora_A, second.lora_A)
    assert torch.equal(torch.get_rng_state(), state)


def test_models_that_do_not_fit_are_refused_by_the_names_of_their_modules():
    base, tuned, _ = make_models(2)
    with pytest.raises(ConfigError, match="hold the same weights in all 2 Linears"):
        extract_adapter(base, base, rank=2)
    less = {f"{TO_Q}.weight": tuned[f"{TO_Q}.weight"]}
    with pytest.raises(KeyFormatError, match=rf"lacks 1 of the 2 Linears of .*{TO_K}; expected"):
        extract_adapter(base, less, rank=2)
    with pytest.raises(KeyFormatError, match=rf"lacks 1 of the 2 Linears of .*{TO_K}; expected"):
        extract_adapter(less, tuned, rank=2)
    other = tuned | {f"{TO_K}.weight": torch.randn(8, 8)}
    with pytest.raises(ShapeError, match=rf"{TO_K} \(8, 8\) against \(96, 80\); expected two"):
        extract_adapter(base, other, rank=2)
    packed = tuned | {f"{TO_K}.weight": torch.ones(ROWS, COLUMNS, dtype=torch.uint8)}
    with pytest.raises(ConfigError, match=rf"stores {TO_K} as uint8; expected bf16"):
        extract_adapter(base, packed, rank=2)
    broken = tuned | {f"{TO_K}.weight": torch.full((ROWS, COLUMNS), float("nan"))}
    with pytest.raises(NonFiniteWeightsError, match=f"{TO_K} differs by NaN or Inf"):
        extract_adapter(base, broken, rank=2)
    with pytest.raises(ConfigError, match="rank is 0"):
        extract_adapter(base, tuned, rank=0)
