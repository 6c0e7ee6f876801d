"""Every statistic of an inspection against dense float64, and the verdicts' thresholds."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from qwen_edit_lora.lora_core import (
    TARGET_PRESETS,
    Adapter,
    DiffWeights,
    DoraWeights,
    LohaWeights,
    LokrWeights,
    LoraWeights,
    ModuleWeights,
    NonFiniteWeightsError,
    OftWeights,
    compare_adapters,
    compute_delta,
    merge_adapters,
    resize_adapter,
)
from qwen_edit_lora.lora_core.inspection.inspection import inspect_adapter, inspect_module
from qwen_edit_lora.lora_core.threads import map_in_threads

ROWS, COLUMNS = 96, 60
TO_Q = "transformer_blocks.0.attn.to_q"


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape) * 0.03


def make(kind: str) -> ModuleWeights:
    lora = LoraWeights(draw(6, COLUMNS), draw(ROWS, 6), 3.0)
    if kind == "LoRA":
        return lora
    if kind == "LoRA bf16":
        return LoraWeights(draw(6, COLUMNS).bfloat16(), draw(ROWS, 6).bfloat16(), 3.0)
    if kind == "rank-deficient":
        lora_B = draw(ROWS, 6)
        lora_B[:, 3:] = lora_B[:, :3]
        return LoraWeights(draw(6, COLUMNS), lora_B, 6.0)
    if kind == "LoHa":
        return LohaWeights(draw(ROWS, 3), draw(3, COLUMNS), draw(ROWS, 3), draw(3, COLUMNS), 1.0)
    if kind == "LoHa of high rank":
        return LohaWeights(draw(ROWS, 9), draw(9, COLUMNS), draw(ROWS, 9), draw(9, COLUMNS), 1.0)
    if kind == "LoKr":
        return LokrWeights(w1=draw(4, 6), w2=draw(24, 10))
    if kind == "LoKr factorised":
        return LokrWeights(w1=draw(4, 6), w2_a=draw(24, 2), w2_b=draw(2, 10), alpha=1.0)
    if kind == "diff":
        return DiffWeights(draw(ROWS, COLUMNS))
    return DoraWeights(lora, draw(ROWS, 1))


KINDS = ["LoRA", "LoRA bf16", "rank-deficient", "LoHa", "LoHa of high rank", "LoKr"]
KINDS += ["LoKr factorised", "diff", "DoRA"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_statistic_equals_dense_float64(kind):
    weights = make(kind)
    direction = weights.direction if kind == "DoRA" else weights
    dense = compute_delta(direction).double()
    if isinstance(direction, LoraWeights):
        dense = direction.scale * direction.lora_B.double() @ direction.lora_A.double()
    found = inspect_module(weights, exact=True)
    values = torch.linalg.svdvals(dense)
    shares = values / values.sum()
    shares = shares[shares > 1e-15]
    expected = {
        "mean": dense.mean(),
        "std": dense.std(correction=0),
        "frobenius": dense.norm(),
        "spectral": values[0],
        "effective_rank": torch.exp(-(shares * shares.log()).sum()),
        "stable_rank": dense.square().sum() / values[0] ** 2,
        "row_norm_min": dense.norm(dim=1).min(),
        "row_norm_max": dense.norm(dim=1).max(),
        "column_norm_min": dense.norm(dim=0).min(),
        "column_norm_max": dense.norm(dim=0).max(),
        "abs_max": dense.abs().max(),
    }
    for name, value in expected.items():
        assert getattr(found, name) == pytest.approx(value.item(), rel=2e-6), name
    assert found.fraction_below_1e6 == pytest.approx(
        (dense.abs() < 1e-6).double().mean().item(), abs=2 / dense.numel()
    )
    kept = [v for v in values.tolist() if v > 1e-6 * values[0].item()]
    assert list(found.singular_values[: len(kept)]) == pytest.approx(kept, rel=1e-6)
    energy = values.square().cumsum(0) / values.square().sum()
    assert found.energy_rank_90 == int((energy < 0.9).sum()) + 1
    assert found.energy_rank_99 == int((energy < 0.99).sum()) + 1
    assert found.is_direction_only == (kind == "DoRA")


@pytest.mark.parametrize(("size", "tolerance"), [(512, 5e-6), (1024, 1e-3)])
def test_quantiles_are_those_of_the_entries(size, tolerance):
    weights = LoraWeights(draw(16, size), draw(512, 16))
    dense = (weights.lora_B.double() @ weights.lora_A.double()).abs().flatten().numpy()
    for quantile, value in inspect_module(weights, exact=True).quantiles.items():
        assert value == pytest.approx(np.quantile(dense, quantile), rel=tolerance), quantile


def test_the_histogram_counts_every_entry_once():
    weights = make("LoRA")
    dense = compute_delta(weights).double().abs()
    histogram = inspect_module(weights, exact=True).histogram
    assert sum(entries for _, entries in histogram) == dense.numel()
    for (low, entries), (high, _) in itertools.pairwise(histogram):
        inside = ((dense >= low) & (dense < high)).sum().item()
        assert abs(entries - inside) <= 2 or high / low > 1.3  # a gap of empty bins


def test_dead_rows_and_columns_are_counted():
    lora_A, lora_B = draw(4, COLUMNS), draw(ROWS, 4)
    lora_A[:, :5], lora_B[7:10] = 0, 0
    found = inspect_module(LoraWeights(lora_A, lora_B), exact=False)
    assert (found.num_dead_rows, found.num_dead_columns) == (3, 5)
    assert found.row_norm_min == 0


def test_a_default_inspection_scans_no_entries():
    found = inspect_adapter(Adapter({TO_Q: make("LoRA")}))
    assert found.abs_max is None
    assert found.modules[TO_Q].histogram is None
    assert not found.is_exact


def make_adapter(std: float, num_blocks: int = 3, **zero: tuple[str, ...]) -> Adapter:
    """Deltas of this std in all modules of the full preset, zero in `zero["paths"]`."""
    modules = {}
    for block in range(num_blocks):
        for name in TARGET_PRESETS["full"]:
            path = f"transformer_blocks.{block}.{name}"
            lora_B = torch.randn(64, 16) * std / 4
            if path in zero.get("paths", ()):
                lora_B.zero_()
            modules[path] = LoraWeights(torch.randn(16, 64), lora_B)
    return Adapter(modules, name="made")


def test_the_adapters_statistics_are_those_of_all_entries_together():
    adapter = make_adapter(3e-4)
    dense = torch.cat([compute_delta(w).double().flatten() for w in adapter.modules.values()])
    found = inspect_adapter(adapter, exact=True)
    assert found.mean == pytest.approx(dense.mean().item(), rel=1e-6)
    assert found.std == pytest.approx(dense.std(correction=0).item(), rel=1e-6)
    assert found.abs_max == pytest.approx(dense.abs().max().item(), rel=1e-6)
    below = (dense.abs() < 1e-6).double().mean().item()
    assert found.fraction_below_1e6 == pytest.approx(below, rel=0.02)


def test_the_seed_statistics_are_dense_small_and_healthy():
    (sentence,) = inspect_adapter(make_adapter(2.86e-4), exact=True).verdict
    assert sentence.startswith("dense, small, healthy: std 2.8")
    assert "known-good LoRAs: 0.0001 to 0.001" in sentence
    fraction = inspect_adapter(make_adapter(2.86e-4), exact=True).fraction_below_1e6
    assert 0.002 < fraction < 0.004  # the question: about 0.3 %


@pytest.mark.parametrize(
    ("std", "word"),
    [(5e-2, "saturated"), (3e-3, "strong"), (3e-5, "faint"), (3e-6, "very faint")],
)
def test_the_size_is_judged_by_its_std(std, word):
    assert inspect_adapter(make_adapter(std)).verdict[-1].startswith(f"{word}: std")


def test_where_some_modules_were_not_scanned_the_verdict_tells_no_fraction():
    found = inspect_adapter(make_adapter(3e-4), exact=True)
    path, module = next(iter(found.modules.items()))
    unscanned = replace(module, abs_max=None, fraction_below_1e6=None)
    (finding,) = replace(found, modules={**found.modules, path: unscanned}).findings
    assert finding.kind == "healthy"
    assert "largest entry" in finding.text
    assert "below 1e-6" not in finding.text


@pytest.mark.parametrize("value", [1.0, -1.0, 0.05])
def test_a_delta_that_is_the_same_everywhere_is_as_large_as_its_entries(value):
    found = inspect_adapter(Adapter({TO_Q: DiffWeights(torch.full((8, 8), value))}))
    (finding,) = found.findings
    assert (finding.kind, finding.severity) == ("saturated", "warning")
    assert f"root mean square {abs(value):.2e}" in finding.text


def test_the_verdict_has_a_kind_and_a_severity_for_each_sentence():
    found = inspect_adapter(make_adapter(3e-4))
    assert [(f.kind, f.severity) for f in found.findings] == [("healthy", "note")]
    assert tuple(f.text for f in found.findings) == found.verdict
    assert found.to_dict()["findings"] == [
        {"kind": "healthy", "severity": "note", "text": found.verdict[0], "count": None}
    ]
    (untrained,) = inspect_adapter(make_adapter(0.0)).findings
    assert (untrained.kind, untrained.severity, untrained.count) == ("untrained", "error", 36)


@pytest.mark.parametrize(
    ("lora_B", "alpha"),
    [(1.0, 1e300), (1e30, 1e20), (1e300, 1.0), (3e38, 1e10)],
)
def test_a_delta_beyond_float32_is_non_finite_in_every_tool(lora_B, alpha):
    dtype = torch.float64 if lora_B > 1e38 else torch.float32
    weights = LoraWeights(torch.ones(2, 8, dtype=dtype), torch.full((8, 2), lora_B, dtype=dtype))
    adapter = Adapter({TO_Q: weights.with_alpha(alpha)}, name="huge")
    found = inspect_adapter(adapter, exact=True)
    assert (found.non_finite, len(found.modules)) == ((TO_Q,), 0)
    for work in (
        lambda: compare_adapters(adapter, adapter),
        lambda: resize_adapter(adapter, rank=1),
        lambda: merge_adapters([(adapter, 1.0), (adapter, 1.0)]),
    ):
        with pytest.raises(NonFiniteWeightsError, match="exceeds the range of float32"):
            work()


def test_large_and_small_factors_that_multiply_to_a_sane_delta_are_inspected():
    weights = LoraWeights(torch.full((2, 8), 1e20), torch.full((8, 2), 1e-24), 2.0)
    found = inspect_adapter(Adapter({TO_Q: weights}))
    assert found.modules[TO_Q].mean == pytest.approx(2e-4)


def test_an_untrained_adapter_is_reported_as_untrained_only():
    adapter = make_adapter(0.0)
    (sentence,) = inspect_adapter(adapter).verdict
    assert "untrained: the delta of all 36 modules is exactly 0" in sentence
    assert inspect_adapter(adapter).modules[TO_Q].is_untrained


def test_the_last_blocks_text_side_is_inert_not_dead():
    inert = ("attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2", "attn.add_q_proj")
    adapter = make_adapter(3e-4, paths=tuple(f"transformer_blocks.2.{name}" for name in inert))
    first, last = inspect_adapter(adapter).verdict
    assert first.startswith("inert, not broken: 4 modules of block 2")
    assert last.startswith("dense, small, healthy")


@pytest.mark.parametrize(
    ("num_dead", "word"), [(2, "dead modules: 2 of 36"), (12, "partly trained: 12 of 36")]
)
def test_modules_that_were_left_out_are_named(num_dead, word):
    adapter = make_adapter(3e-4)
    paths = tuple(adapter.modules)[:num_dead]
    verdict = inspect_adapter(make_adapter(3e-4, paths=paths)).verdict
    assert verdict[0].startswith(word)
    assert paths[0] in verdict[0]


def test_a_wrong_alpha_and_a_collapsed_rank_are_named_with_their_values():
    adapter = make_adapter(3e-4)
    scaled = {p: w.with_alpha(16 * 1000.0) for p, w in adapter.modules.items()}
    verdict = inspect_adapter(Adapter(scaled, name="scaled")).verdict
    assert any(s.startswith("scale: alpha / rank is 1000, outside") for s in verdict)
    flat = {
        path: LoraWeights(w.lora_A, torch.outer(torch.randn(64), torch.randn(16)) * 1e-4)
        for path, w in adapter.modules.items()
    }
    verdict = inspect_adapter(Adapter(flat, name="flat")).verdict
    assert any("the effective rank is below 5 % of the rank (for example 1.0 of 16)" in s
               for s in verdict)  # fmt: skip


def test_non_finite_modules_are_named_and_do_not_spoil_the_rest():
    adapter = make_adapter(3e-4)
    broken = LoraWeights(torch.full((2, 8), float("nan")), torch.ones(8, 2))
    found = inspect_adapter(Adapter({**adapter.modules, TO_Q: broken}, name="broken"))
    assert found.non_finite == (TO_Q,)
    assert found.verdict[0].startswith(f"non-finite: NaN or Inf in 1 module ({TO_Q})")
    assert found.std == pytest.approx(3e-4, rel=0.1)


def test_what_cannot_be_inspected_is_listed_with_its_reason():
    adapter = Adapter(
        {TO_Q: OftWeights(draw(4, 8, 8)), "transformer_blocks.0.attn.norm_q": DiffWeights(draw(8))}
    )
    found = inspect_adapter(adapter)
    assert "an OFT rotates the base weight" in found.skipped[TO_Q]
    assert found.verdict == ("nothing to judge: no module of this adapter has a delta of its own",)


def test_an_inspection_can_be_watched_and_stopped():
    adapter, seen = make_adapter(3e-4), []
    inspect_adapter(adapter, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 36) for done in range(37)]
    answers = iter([False, False, False, True])
    with pytest.raises(InterruptedError):
        inspect_adapter(adapter, exact=True, should_stop=lambda: next(answers, True))


def test_modules_are_inspected_side_by_side_and_reported_in_order():
    adapter = make_adapter(3e-4)
    num_threads = torch.get_num_threads()
    found = inspect_adapter(adapter, exact=True)
    assert list(found.modules) == list(adapter.modules)
    for path, weights in adapter.modules.items():
        assert found.modules[path].to_dict() == inspect_module(weights, exact=True).to_dict()
    assert torch.get_num_threads() == num_threads


def test_the_first_failure_stops_the_other_threads():
    asked = []

    def fail(item, should_stop):
        asked.append(item)
        raise ValueError(f"item {item}")

    with pytest.raises(ValueError, match="item 0"):
        map_in_threads(fail, range(1000), None, None, "test")
    assert len(asked) < 1000


def test_threads_compute_in_the_callers_autograd_mode():
    with torch.inference_mode():
        made, _ = map_in_threads(lambda item, _: torch.ones(item), [2, 3], None, None, "test")
    assert made.is_inference()
    made, _ = map_in_threads(lambda item, _: torch.ones(item), [2, 3], None, None, "test")
    assert not made.is_inference()


def test_an_inspection_is_json():
    text = json.dumps(inspect_adapter(make_adapter(3e-4), exact=True).to_dict())
    assert json.loads(text)["modules"][TO_Q]["rank"] == 16


def test_a_lokrs_entries_are_looked_at_without_its_matrix(monkeypatch):
    weights = LokrWeights(w1=draw(40, 30), w2=draw(24, 20).bfloat16())
    dense = DiffWeights(compute_delta(weights))
    expected = inspect_module(dense, exact=True)

    def refuse(self, base_weight=None):
        raise AssertionError("the whole matrix was made")

    monkeypatch.setattr(LokrWeights, "delta", refuse)
    found = inspect_module(weights, exact=True)
    names = ("abs_max", "fraction_below_1e6", "quantiles", "histogram")
    assert all(getattr(found, name) == getattr(expected, name) for name in names)
    assert abs(found.fraction_below_std - expected.fraction_below_std) < 1e-6


@pytest.mark.parametrize("kind", ["LoRA", "DoRA"])
def test_a_base_with_nan_is_reported_and_gives_no_statistics(kind):
    base = {f"{TO_Q}.weight": torch.full((ROWS, COLUMNS), float("nan"))}
    found = inspect_adapter(Adapter({TO_Q: make(kind)}), base)
    assert found.modules == {}
    assert "base" in found.skipped[TO_Q]
    assert "NaN or Inf" in found.skipped[TO_Q]
