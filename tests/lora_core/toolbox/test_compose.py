"""Properties of every resized, merged or extracted adapter."""

from __future__ import annotations

import json

import pytest
import torch
from dense_algebra import (
    COLUMNS,
    ROWS,
    TO_K,
    TO_Q,
    LargestTensor,
    check_equal,
    compute_dense,
    make_adapter,
    make_loha,
    make_lora,
)
from qwen_edit_lora.lora_core import (
    extract_adapter,
    merge_adapters,
    read_adapter,
    resize_adapter,
    write_adapter,
)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


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


def test_the_report_of_a_result_describes_the_result():
    weights = make_lora(8, 2.0, torch.bfloat16)
    metadata = {"sshs_model_hash": "of the old file", "lora_adapter_metadata": "{}"}
    adapter = make_adapter({TO_Q: weights, TO_K: make_loha(2)}, "old", metadata=metadata)
    found = resize_adapter(adapter, rank=3)
    report = found.adapter.report
    assert (report.num_modules, report.num_keys, report.num_matched_keys) == (2, 6, 6)
    assert (report.ranks, report.scales, report.kinds) == ({3: 2}, {1.0: 2}, {"LoRA": 2})
    assert "matched 2 modules, 6 of 6 keys" in found.to_text()
    assert f"{100 * found.total_retained:.3g} % of the energy kept" in found.to_text()
    assert set(found.adapter.metadata) == {"qwen_edit_lora.history"}
    assert json.loads(json.dumps(found.to_dict()))["total_retained"] == found.total_retained


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


def test_progress_is_reported_and_a_stop_is_obeyed():
    adapter = make_adapter({TO_Q: make_lora(), TO_K: make_lora()})
    base = {f"{path}.weight": torch.zeros(ROWS, COLUMNS) for path in adapter}
    tuned = {key: torch.randn(ROWS, COLUMNS) for key in base}
    for name, work in {
        "resize": lambda **options: resize_adapter(adapter, rank=2, **options),
        "merge": lambda **options: merge_adapters([(adapter, 1.0)], **options),
        "extraction": lambda **options: extract_adapter(base, tuned, 2, **options),
    }.items():
        reported = []
        work(progress=lambda done, total, reported=reported: reported.append((done, total)))
        assert reported == [(0, 2), (1, 2), (2, 2)]
        answers = iter([False, True])
        with pytest.raises(InterruptedError, match=f"{name} was stopped after 1 of 2 modules"):
            work(should_stop=lambda answers=answers: next(answers))
