"""The estimate's arithmetic here; its 15 % where there is a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from qwen_edit_lora.lora_core import ConfigError
from qwen_edit_lora.lora_core.training import estimate
from qwen_edit_lora.lora_core.training.estimate import Measurement, estimate_run
from qwen_edit_lora.lora_core.training.session import open_session
from qwen_edit_lora.lora_core.training.trainer import train
from small_bases import TINY, write_base
from tiny import make_config, make_dataset, make_item


@pytest.fixture
def base(tmp_path):
    return write_base(tmp_path / "base.safetensors", 5, **TINY)


def test_figures_of_all_blocks_follow_from_one_and_two(tmp_path, base, monkeypatch):
    def measure(config, dataset, index, base, device, num_blocks):
        return Measurement(0.1 + 0.2 * num_blocks, 1000 + 300 * num_blocks)

    monkeypatch.setattr(estimate, "measure", measure)
    monkeypatch.setattr(estimate, "find_available", lambda device: 2700)
    changes = {"model.source": base, "optimizer.accumulation": 3, "steps": 10}
    dataset = make_dataset(tmp_path / "data", {"a": make_item(0)})
    found = estimate_run(make_config(tmp_path, **changes), dataset)
    assert found.longest_step_s == pytest.approx(3 * (0.1 + 0.2 * 5))
    assert found.seconds_per_step == pytest.approx(found.longest_step_s)
    assert found.total_s == pytest.approx(10 * found.longest_step_s)
    assert found.memory_bytes == 1000 + 300 * 5
    assert found.fits
    assert found.advice == ()


def test_what_does_not_fit_is_said_with_what_to_lower(tmp_path, base, monkeypatch):
    monkeypatch.setattr(
        estimate, "measure", lambda *arguments: Measurement(1.0, 2000 * arguments[-1])
    )
    monkeypatch.setattr(estimate, "find_available", lambda device: 10_000)
    changes = {"model.source": base, "data.batch_size": 2, "model.gradient_checkpointing": False}
    found = estimate_run(make_config(tmp_path, **changes), make_dataset(tmp_path / "data"))
    assert not found.fits  # exactly full is too full
    assert found.advice[:2] == (
        "set model.gradient_checkpointing to true",
        "set data.batch_size to 1 and raise optimizer.accumulation",
    )
    assert "does not fit: set model.gradient_checkpointing to true" in found.to_text()


def test_it_runs_on_the_first_blocks_of_the_file_and_counts_all_parameters(tmp_path, base):
    config = make_config(tmp_path, **{"model.source": base})
    items = {"small": make_item(0, (4, 4)), "large": make_item(1, (16, 16))}
    dataset = make_dataset(tmp_path / "data", items)
    found = estimate_run(config, dataset)
    session = open_session(config)
    assert found.num_parameters == session.injection.plan.num_parameters
    assert found.num_tokens == 8 * 8 + 4 * 4 + 5
    assert 0 < found.seconds_per_step < found.longest_step_s
    assert found.memory_bytes is None
    assert found.fits


def test_patterns_that_name_blocks_by_number_do_not_fail(tmp_path, base):
    changes = {"model.source": base, "lora.targets": ["transformer_blocks.4.attn.*"]}
    found = estimate_run(make_config(tmp_path, **changes), make_dataset(tmp_path / "data"))
    assert found.num_parameters > 0


def test_settings_it_does_not_know_are_refused(tmp_path, base):
    changes = {"model.source": base, "model.offload_blocks": 2}
    with pytest.raises(ConfigError, match="the estimate does not know offload_blocks"):
        estimate_run(make_config(tmp_path, **changes), make_dataset(tmp_path / "data"))


@pytest.mark.gpu
@pytest.mark.parametrize("storage", ["bf16", "fp8", "nf4"])
def test_memory_and_time_are_within_15_percent_of_a_run(tmp_path, storage):
    base = write_base(tmp_path / "base.safetensors", 8)
    item = make_item(0, (128, 128), ((128, 128),))
    item = replace(item, text=torch.randn(300, 3584))
    dataset = make_dataset(tmp_path / "data", {"a": item})
    changes = {"model.source": base, "model.device": "cuda", "model.storage": storage}
    changes |= {"model.compute_dtype": "bf16", "lora.rank": 16, "steps": 6}
    config = make_config(tmp_path, **changes, **{"saving.checkpoint_every": 100})
    found = estimate_run(config, dataset)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    session = open_session(config)
    torch.cuda.reset_peak_memory_stats()
    reports = list(train(config, session.model, session.injection, dataset))
    measured = torch.cuda.max_memory_allocated() - before
    assert found.memory_bytes == pytest.approx(measured, rel=0.15)
    seconds = sorted(report.seconds for report in reports)[len(reports) // 2]
    assert found.seconds_per_step == pytest.approx(seconds, rel=0.15)
