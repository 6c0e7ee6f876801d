"""A pause that is taken back while several processes train one job costs no step and no sample."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from qwen_edit_lora.lora_core.jobs.devices import Device
from qwen_edit_lora.lora_core.jobs.launch import build_environment
from qwen_edit_lora.lora_core.training.run.metrics import read_metrics
from tiny_jobs import assert_equal_weights, read_weights

SCRIPT = Path(__file__).with_name("withdrawn_stops.py")
TWO = (Device("cpu", "test-cpu-a", ""), Device("cpu", "test-cpu-b", ""))
TIMEOUT_S = 500
NAMES = ("tiny.safetensors", "tiny_ema.safetensors")


def test_a_pause_withdrawn_at_any_moment_costs_a_team_nothing(store, material):
    pytest.importorskip("accelerate")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--local-addr=127.0.0.1", "--nproc-per-node=2"]
    result = subprocess.run(
        [*command, str(SCRIPT), str(store.root), str(material)],
        env={**build_environment(TWO, os.environ), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    outcomes = json.loads((store.root / "outcomes.json").read_text())
    (whole, calm), *others = outcomes.items()
    assert len(others) == calm["looks"] > 4
    assert all(outcome["is_done"] for outcome in outcomes.values())
    expected = store.catalog.find(whole)
    samples = {path.name: read_weights(path)["samples"] for path in expected.samples.iterdir()}
    assert len(samples) == 3  # before the first step, after 2 and 4
    for job_id, outcome in others:
        ours = store.catalog.find(job_id)
        for name in NAMES:
            assert_equal_weights(ours.path / name, expected.path / name)
        found = {path.name: read_weights(path)["samples"] for path in ours.samples.iterdir()}
        assert found.keys() == samples.keys(), outcome
        assert all(bool((found[name] == samples[name]).all()) for name in samples), outcome
        assert [row["step"] for row in read_metrics(ours.metrics)] == [1, 2, 3, 4]
