"""The estimate's arithmetic, and its 15 % on a CPU's memory; time too where there is a GPU.

`benchmarks/estimate.py` compares its time on a CPU with runs: here the machine is shared.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from qwen_edit_lora.lora_core import ConfigError
from qwen_edit_lora.lora_core.training.config.config_files import config_to_dict
from qwen_edit_lora.lora_core.training.estimate import estimate, probe
from qwen_edit_lora.lora_core.training.estimate.estimate import (
    HOST_MARGIN,
    MARGIN,
    count_frozen_bytes,
    estimate_micro_step_s,
    estimate_run,
    estimate_transient_bytes,
)
from qwen_edit_lora.lora_core.training.estimate.probe import LinearFit, Measurement
from qwen_edit_lora.lora_core.training.machine.memory import CLEAR_REFS, MemoryMeter
from qwen_edit_lora.lora_core.training.run.session import open_session
from qwen_edit_lora.lora_core.training.run.trainer import train
from qwen_edit_lora.lora_core.training.sampling.image_decoder import DECODING_BYTES
from small_bases import TINY, write_base
from tiny import make_config, make_dataset, make_item

GIB = 2**30
ROOT = Path(__file__).resolve().parents[4]


@pytest.fixture
def base(tmp_path):
    return write_base(tmp_path / "base.safetensors", 5, **TINY)


def make_measurement(seconds, size, **changes) -> Measurement:
    """A measurement of n blocks: `seconds` and `size` are (fixed, per block)."""
    return Measurement(
        **{
            "micro_step_s": LinearFit(*seconds),
            "optimizer_s": LinearFit(0.0, 0.01),
            "compile_s": 0.0,
            "transient_bytes": LinearFit(*size),
            "update_bytes": LinearFit(0, 0),
            "gap_bytes": LinearFit(0, 0),
            "loading_bytes": 0,
            "block_bytes": 1000,
            "other_bytes": 500,
            "process_bytes": 70,
            "gradient_checkpointing": True,
            "trained_bytes": 0.0,
            **changes,
        }
    )


def make_estimate(**changes) -> estimate.Estimate:
    figures = dict.fromkeys(("seconds_per_step", "longest_step_s", "total_s"), 0)
    sizes = dict.fromkeys(("memory_bytes", "num_parameters", "num_tokens"), 0)
    sizes["available_bytes"] = 20 * GIB
    return estimate.Estimate(device="cuda", **{**figures, **sizes, **changes})


def test_values_for_all_blocks_are_extrapolated_from_few(tmp_path, base, monkeypatch):
    found = make_measurement((0.1, 0.2), (50, 10**7), trained_bytes=16.0)
    monkeypatch.setattr(estimate, "measure_blocks", lambda *arguments: found)
    changes = {"model.source": base, "optimizer.accumulation": 3, "steps": 10}
    dataset = make_dataset(tmp_path / "data", {"a": make_item(0)})
    found = estimate_run(make_config(tmp_path, **changes), dataset)
    assert found.longest_step_s == pytest.approx(3 * (0.1 + 0.2 * 5) + 0.01 * 5)
    assert found.seconds_per_step == pytest.approx(found.longest_step_s)
    assert found.total_s == pytest.approx(10 * found.longest_step_s)
    expected = 70 + 500 + 5 * 1000 + 50 + 5 * 10**7 + 16 * found.num_parameters
    assert found.memory_bytes == expected
    assert found.fits
    assert found.advice == ()


@pytest.mark.parametrize(
    ("device", "micro_step_s", "on_device"),
    [
        ("cpu", 0.1 + 3 * 0.2 + 2 * 0.5, 5),  # copies and products take turns
        ("cuda", max(0.1 + 5 * 0.2, 0.1 + 2 * 0.5), 3),
    ],
)
def test_offloaded_blocks_cost_time_and_copies(device, micro_step_s, on_device):
    resident = make_measurement((0.1, 0.2), (50, 300))
    offloaded = make_measurement((0.0, 0.5), (2050, 300))
    device = torch.device(device)
    assert estimate_micro_step_s(resident, offloaded, 5, 2, device) == pytest.approx(micro_step_s)
    assert estimate_transient_bytes(resident, offloaded, 5, 2) == 50 + 5 * 300 + 2000
    assert count_frozen_bytes(resident, 5, 2, device) == 500 + on_device * 1000


def test_the_prior_and_compiling_are_part_of_the_time(tmp_path, base, monkeypatch):
    found = make_measurement((0.1, 0.2), (50, 300), compile_s=40.0)
    monkeypatch.setattr(estimate, "measure_blocks", lambda *arguments: found)
    dataset = make_dataset(tmp_path / "data", {"a": make_item(0)})
    changes = {"model.source": base, "data.prior": str(dataset.folder), "steps": 10}
    found = estimate_run(make_config(tmp_path, **changes), dataset)
    assert found.longest_step_s == pytest.approx(2 * (0.1 + 0.2 * 5) + 0.01 * 5)
    assert found.total_s == pytest.approx(10 * found.longest_step_s + 40)
    assert "compiling: 40 s once, part of the total time" in found.to_text()


def test_what_does_not_fit_is_reported_with_what_to_lower(tmp_path, base, monkeypatch):
    found = make_measurement((0, 1.0), (0, 10**7), other_bytes=0, process_bytes=0)
    monkeypatch.setattr(estimate, "measure_blocks", lambda *arguments: found)
    monkeypatch.setattr(MemoryMeter, "find_available", lambda self: 5 * (10**7 + 1000))
    changes = {"model.source": base, "data.batch_size": 2, "model.gradient_checkpointing": False}
    found = estimate_run(make_config(tmp_path, **changes), make_dataset(tmp_path / "data"))
    assert not found.fits  # exactly full is too full
    assert found.advice[:2] == (
        "set model.gradient_checkpointing to true",
        "set data.batch_size to 1 and raise optimizer.accumulation",
    )
    assert "does not fit: set model.gradient_checkpointing to true" in found.to_text()


def test_a_margin_of_what_is_free_is_left_and_not_a_share_of_the_device():
    found = make_estimate(memory_bytes=10 * GIB, available_bytes=10 * GIB + MARGIN)
    assert found.fits
    assert not replace(found, available_bytes=10 * GIB + MARGIN - 1).fits
    assert "memory: 10 GiB of 10.5 GiB free on cuda" in found.to_text()
    assert replace(found, available_bytes=None).fits


def test_offloaded_blocks_need_free_main_memory(tmp_path, base, monkeypatch):
    found = make_estimate(offloaded_bytes=13 * GIB, host_available_bytes=13 * GIB + HOST_MARGIN)
    assert found.fits
    assert "offloaded to main memory: 13 GiB of 15 GiB free" in found.to_text()
    short = replace(found, host_available_bytes=13 * GIB + HOST_MARGIN - 1)
    assert short.fits_device
    assert not short.fits
    assert replace(short, offloaded_bytes=0).fits
    # On a CPU they are part of the process's own memory.
    monkeypatch.setattr(estimate, "find_free_host_memory", lambda: 0)
    measured = make_measurement((0.1, 0.2), (50, 300))
    monkeypatch.setattr(estimate, "measure_blocks", lambda *arguments: measured)
    config = make_config(tmp_path, **{"model.source": base, "model.offload_blocks": 2})
    dataset = make_dataset(tmp_path / "data")
    assert estimate_run(config, dataset).fits
    monkeypatch.setattr(estimate, "choose_device", lambda model: torch.device("cuda"))
    monkeypatch.setattr(estimate, "limit_memory", lambda device: None)
    monkeypatch.setattr(MemoryMeter, "find_available", lambda self: 20 * GIB)
    found = estimate_run(config, dataset)
    assert found.offloaded_bytes == 2000
    assert found.host_available_bytes == 0
    assert found.advice == (estimate.FREE_HOST_MEMORY,)


def test_gaps_an_update_and_the_decoding_of_samples_are_part_of_the_memory(
    tmp_path, base, monkeypatch
):
    monkeypatch.setattr(estimate, "choose_device", lambda model: torch.device("cuda"))
    monkeypatch.setattr(estimate, "limit_memory", lambda device: None)
    monkeypatch.setattr(MemoryMeter, "find_available", lambda self: 20 * GIB)
    config = make_config(tmp_path, **{"model.source": base})
    dataset = make_dataset(tmp_path / "data")

    def estimate_with(with_samples=False, **changes):
        found = make_measurement((0, 1.0), (50, 300), process_bytes=0, **changes)
        monkeypatch.setattr(estimate, "measure_blocks", lambda *arguments: found)
        return estimate_run(config, dataset, with_samples=with_samples).memory_bytes

    kept = 500 + 5 * 1000
    step = kept + 50 + 5 * 300
    assert estimate_with() == step
    assert estimate_with(gap_bytes=LinearFit(7, 11)) == step + 7 + 5 * 11
    assert estimate_with(update_bytes=LinearFit(0, 400)) == kept + 5 * 400
    assert estimate_with(update_bytes=LinearFit(0, 100)) == step
    assert estimate_with(with_samples=True) == kept + DECODING_BYTES


def test_a_step_and_its_update_are_measured_apart(tmp_path, base, monkeypatch):
    readings = iter((10, 100, 30, 40))  # at rest; the step's peak; reset; the update's peak
    found = []
    meter = MemoryMeter(torch.device("cpu"))
    for name in ("reset", "read_peak"):
        monkeypatch.setattr(meter, name, lambda: next(readings))
    monkeypatch.setattr(meter, "read_gap", lambda: 3)

    class Steps:
        def take_micro_step(self, num_blocks):
            found.append(num_blocks)

        def update(self):
            found.append("update")

    assert probe.measure_peaks(Steps(), meter, 2) == probe.Peaks(90, 30, 3)
    assert found == [2, "update"]


def test_what_a_gpu_has_for_a_run_is_what_is_free_and_what_this_process_holds(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (7 * GIB, 24 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2 * GIB)
    assert MemoryMeter(torch.device("cuda")).find_available() == 9 * GIB


def test_it_runs_on_the_first_blocks_of_the_file_and_counts_all_parameters(tmp_path, base):
    config = make_config(tmp_path, **{"model.source": base})
    items = {"small": make_item(0, (4, 4)), "large": make_item(1, (16, 16))}
    dataset = make_dataset(tmp_path / "data", items)
    found = estimate_run(config, dataset)
    session = open_session(config)
    assert found.num_parameters == session.injection.plan.num_parameters
    assert found.num_tokens == 8 * 8 + 4 * 4 + 5
    assert 0 < found.seconds_per_step < found.longest_step_s
    assert found.memory_bytes is None or found.memory_bytes > 0
    assert found.fits


def test_embeddings_of_another_text_encoder_are_refused_before_anything_is_built(tmp_path):
    base = write_base(tmp_path / "wide.safetensors", 1, **{**TINY, "joint_attention_dim": 24})
    config = make_config(tmp_path, **{"model.source": base, "model.storage": "fp32"})
    with pytest.raises(ConfigError, match=r"embeddings are \d+ wide, but the model takes 24"):
        estimate_run(config, make_dataset(tmp_path / "data"))


def test_patterns_that_name_blocks_by_number_do_not_fail(tmp_path, base):
    changes = {"model.source": base, "lora.targets": ["transformer_blocks.4.attn.*"]}
    found = estimate_run(make_config(tmp_path, **changes), make_dataset(tmp_path / "data"))
    assert found.num_parameters > 0


def test_more_offloaded_blocks_than_exist_are_reported(tmp_path, base):
    changes = {"model.source": base, "model.offload_blocks": 6}
    with pytest.raises(ConfigError, match="offload_blocks is 6, but the model has 5 blocks"):
        estimate_run(make_config(tmp_path, **changes), make_dataset(tmp_path / "data"))


def test_compiling_is_measured_on_the_blocks(tmp_path, base, monkeypatch):
    monkeypatch.setattr(probe, "TIMED_S", 0.0)
    # Inductor would look for a C++ compiler, and take minutes.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    changes = {"model.source": base, "model.compile": True}
    found = estimate_run(make_config(tmp_path, **changes), make_dataset(tmp_path / "data"))
    assert found.compile_s > 0
    assert found.total_s > found.compile_s


#: Narrow, and many tokens: activations count as much as weights.
MIDDLE = {"attention_head_dim": 128, "num_attention_heads": 3, "joint_attention_dim": 256}


class Processes:
    """The estimate and the run in separate processes, as for users.

    The memory of a process without a run is that of a tiny run, and subtracted on both sides.
    """

    def __init__(self, folder):
        self.folder = folder
        self.base = write_base(folder / "base.safetensors", 6, **MIDDLE)
        self.datasets = {count: self.write_dataset(count, 32, 64) for count in (1, 3)}
        tiny = write_base(folder / "tiny.safetensors", 2, **{**TINY, "joint_attention_dim": 256})
        self.idle = self.measure(tiny, self.write_dataset(0, 4, 4), {})

    def write_dataset(self, num_references, side, num_tokens):
        item = make_item(0, (side, side), ((side, side),) * num_references)
        item = replace(item, text=torch.randn(num_tokens, 256))
        return make_dataset(self.folder / f"data_{num_references}_{side}", {"a": item})

    def measure(self, base, dataset, changes):
        """Bytes: (estimated, taken)."""
        name = f"run_{len(list(self.folder.iterdir()))}"
        settings = {"model.source": base, "model.storage": "fp32"}
        settings |= {"data.folder": str(dataset.folder), "output": str(self.folder / name / "out")}
        settings |= {f"model.{key}": value for key, value in changes.items()}
        settings |= {"lora.rank": 16, "steps": 3, "saving.checkpoint_every": 100}
        config = make_config(self.folder, **settings, **{"saving.adapter_every": 0})
        path = self.folder / f"{name}.json"
        path.write_text(json.dumps(config_to_dict(config)))
        started = {what: self.start(what, path) for what in ("estimate", "train")}
        peak = largest_files = 0
        run = started["train"]
        # Of its own pages: those of libraries, 0.1 GB of them, go when another process needs room.
        while run.poll() is None:
            with contextlib.suppress(OSError, IndexError):
                status = Path(f"/proc/{run.pid}/status").read_text()
                most, own, files = (
                    int(status.split(f"{name}:")[1].split()[0]) * 1024
                    for name in ("VmHWM", "RssAnon", "RssFile")
                )
                largest_files = max(largest_files, files)
                # Each is at most the true one: looks miss a short peak, files may have been fewer.
                peak = max(peak, own, most - largest_files)
            time.sleep(0.02)
        out = started["estimate"].communicate()[0]
        assert (started["estimate"].returncode, run.returncode) == (0, 0)
        return json.loads(out)["memory_bytes"], peak

    def start(self, what, path):
        command = [sys.executable, "-m", "lora_core", what, str(path), "--json"]
        stdout = subprocess.PIPE if what == "estimate" else subprocess.DEVNULL
        # Two processes with a thread for each core would wait for each other.
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=stdout, stderr=subprocess.DEVNULL
        )


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    return Processes(tmp_path_factory.mktemp("processes"))


@pytest.mark.skipif(not CLEAR_REFS.exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize(
    ("num_references", "changes"),
    [
        (3, {"gradient_checkpointing": False}),
        (1, {"offload_blocks": 3}),
    ],
    ids=str,
)
def test_memory_on_a_cpu_is_within_15_percent_of_a_run(num_references, changes, processes):
    dataset = processes.datasets[num_references]
    found = processes.measure(processes.base, dataset, changes)
    estimated, taken = (a - b for a, b in zip(found, processes.idle, strict=True))
    assert taken > 50e6
    assert estimated == pytest.approx(taken, rel=0.15)


@pytest.mark.gpu
@pytest.mark.parametrize("storage", ["bf16", "fp8", "nf4"])
def test_memory_and_time_are_within_15_percent_of_a_run_on_a_gpu(tmp_path, storage):
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
    if seconds > 0.1:  # below, it is the host's time, which others share
        assert found.seconds_per_step == pytest.approx(seconds, rel=0.15)
