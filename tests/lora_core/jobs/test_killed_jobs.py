"""Workers and servers killed at random moments: nothing is lost, duplicated or changed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from qwen_edit_lora.lora_core.jobs.publication import read_job_id
from qwen_edit_lora.lora_core.jobs.store import JobStore
from tiny_jobs import assert_equal_weights, list_processes, read_weights

SCRIPT = Path(__file__).with_name("killed_jobs.py")
NUM_KILLS = 21  # a third each of workers, servers, and both

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks what is killed")


@pytest.fixture(scope="module")
def kills(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("killed")
    result = subprocess.run(
        [sys.executable, SCRIPT, folder, str(NUM_KILLS)],
        stdout=subprocess.PIPE,
        stderr=(folder / "stderr").open("w"),
        text=True,
        check=False,
        timeout=240,
    )
    assert result.returncode == 0, (folder / "stderr").read_text()[-3000:]
    return folder, json.loads(result.stdout)


def test_every_killed_job_is_found_again_and_completed(kills):
    _, outcome = kills
    assert outcome["killed"] == {"worker": 7, "server": 7, "both": 7}
    assert set(outcome["statuses"]) == {"completed"}, outcome["states"]
    # each killed worker was followed by exactly one other
    num_jobs, num_dead = len(outcome["jobs"]), sum(outcome["phases"].values())
    assert 14 <= sum(outcome["starts"]) <= num_jobs + num_dead
    assert outcome["phases"].get("training", 0) > 0


def test_killed_jobs_end_with_weights_bit_identical_to_an_uninterrupted_run(kills):
    folder, outcome = kills
    store = JobStore(folder / "root")
    whole, *killed = outcome["jobs"]
    steps = [line["step"] for line in store.read_metrics(whole)]
    losses = [line["loss"] for line in store.read_metrics(whole)]
    assert len(killed) >= 3
    for job in killed:
        for name in ("tiny.safetensors", "tiny_ema.safetensors"):
            assert_equal_weights(
                store.catalog.find(job).path / name, store.catalog.find(whole).path / name
            )
        assert [line["step"] for line in store.read_metrics(job)] == steps
        assert [line["loss"] for line in store.read_metrics(job)] == losses
    store.index.close()


def test_samples_are_made_once_and_identical_despite_the_kills(kills):
    folder, outcome = kills
    store = JobStore(folder / "root")
    whole, *killed = outcome["jobs"]
    expected = {path.name: read_weights(path) for path in store.list_samples(whole)}
    assert sorted(expected) == [f"step_{n:08d}_item_0.safetensors" for n in (0, 5, 10)]
    for job in killed:
        found = {path.name: read_weights(path) for path in store.list_samples(job)}
        assert found.keys() == expected.keys()
        for name, tensors in found.items():
            assert bool((tensors["samples"] == expected[name]["samples"]).all())
    store.index.close()


def test_each_adapter_is_published_once_completely_and_under_a_free_name(kills):
    folder, outcome = kills
    loras = folder / "loras"
    assert (loras / "tiny.safetensors").read_bytes() == b"of somebody else"
    names = [name for names in outcome["published"] for name in names]
    assert len(set(names)) == len(names) == 2 * len(outcome["jobs"])
    assert sorted(p.name for p in loras.iterdir()) == sorted([*names, "tiny.safetensors"])
    for job, published in zip(outcome["jobs"], outcome["published"], strict=True):
        for name in published:
            assert read_job_id(loras / name) == job
            assert len(read_weights(loras / name)) > 0


def test_two_workers_never_run_at_once_and_none_is_left_over(kills):
    folder, outcome = kills
    assert outcome["most_at_once"] <= 1
    assert outcome["running"] == 0
    assert list_processes(folder / "root") == []
    leftovers = [p for p in folder.rglob(".*") if p.name != ".lock"]
    assert leftovers == []
