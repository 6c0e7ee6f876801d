"""Several devices for one job, as two processes on the CPU: starts, deaths and leftovers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from qwen_edit_lora.lora_core import ConfigError
from qwen_edit_lora.lora_core.jobs.devices import Device
from qwen_edit_lora.lora_core.jobs.job import JobFailure, JobStatus
from qwen_edit_lora.lora_core.jobs.job_reporter import JobReporter
from qwen_edit_lora.lora_core.jobs.launch import build_command, build_environment
from qwen_edit_lora.lora_core.jobs.store import get_device_lock
from qwen_edit_lora.lora_core.jobs.supervisor import Supervisor
from qwen_edit_lora.lora_core.jobs.team import pop_failure, write_failure
from qwen_edit_lora.lora_core.jobs.training_job import run_job
from safetensors import safe_open
from tiny_jobs import (
    assert_equal_weights,
    count_steps,
    list_processes,
    make_train,
    run_to_end,
    run_until,
    wait_for_step,
)

TWO = (Device("cpu", "test-cpu-a", ""), Device("cpu", "test-cpu-b", ""))
GPUS = (Device("cuda:0", "here-a", "GPU-a"), Device("cuda:1", "here-b", "3"))
STEPS = 40
NOTICE_S = 10.0
TIMEOUT = 240.0  # seconds; three processes load at once


def find_process(root: Path, rank: int) -> int:
    for pid in list_processes(root):
        if f"RANK={rank}" in Path(f"/proc/{pid}/environ").read_text().split("\0"):
            return pid
    raise AssertionError(f"no process has rank {rank}")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="counts processes in /proc")
def test_a_team_survives_a_dead_member_and_a_pause_with_the_same_weights(store, material, tmp_path):
    pytest.importorskip("accelerate")
    (tmp_path / "loras").mkdir()
    supervisor = Supervisor(store, TWO)
    train = make_train(material, steps=STEPS)
    samples = {"every": STEPS // 2, "steps": 1}
    job_id = store.submit(train, num_devices=2, samples=samples, loras=str(tmp_path / "loras"))
    whole = store.submit(train, num_devices=2)
    wait_for_step(supervisor, job_id, 2, TIMEOUT)
    state = store.get(job_id).state
    assert state.device == "cpu, cpu"
    assert state.worker.pid == find_process(store.root, 0)
    assert len(list_processes(store.root)) == 3  # a launcher and two
    assert all(get_device_lock(store.root, device.key).is_held() for device in TWO)
    assert store.get(whole).status is JobStatus.PENDING

    os.kill(find_process(store.root, 1), signal.SIGKILL)
    died = time.monotonic()
    run_until(supervisor, lambda: store.get(job_id).status is not JobStatus.IN_PROGRESS)
    assert time.monotonic() - died < NOTICE_S
    state = store.get(job_id).state
    assert state.status is JobStatus.PENDING
    assert "process 2 of 2 was terminated from outside" in state.notes[-1]
    wait_for_step(supervisor, job_id, state.checkpoint_step + 2, TIMEOUT)
    members = list_processes(store.root)
    store.pause(job_id)
    asked_at = count_steps(store, job_id)
    job = run_to_end(supervisor, job_id, TIMEOUT)
    assert job.status is JobStatus.PAUSED
    assert job.state.step <= asked_at + 1
    run_until(supervisor, lambda: set(members).isdisjoint(list_processes(store.root)))
    assert run_to_end(supervisor, whole, TIMEOUT).status is JobStatus.COMPLETED
    store.resume(job_id)
    job = run_to_end(supervisor, job_id, TIMEOUT)
    assert job.status is JobStatus.COMPLETED, job.state
    run_until(supervisor, lambda: list_processes(store.root) == [])

    ours, theirs = (store.catalog.find(one).path for one in (job_id, whole))
    for name in ("tiny.safetensors", "tiny_ema.safetensors"):
        assert_equal_weights(ours / name, theirs / name)
    assert len(store.list_samples(job_id)) == 3
    assert job.state.published == ("tiny.safetensors", "tiny_ema.safetensors")
    with safe_open(tmp_path / "loras" / "tiny.safetensors", "pt") as file:
        assert file.metadata()["qwen_edit_lora.job"] == job_id
    assert store.read_log(job_id)["text"].count("loading ") == 3  # only rank 0 prints
    assert list(ours.glob(".process_*")) == []


def test_a_job_that_waits_for_two_devices_is_not_overtaken_on_one(store, material):
    started: list[tuple[str, tuple[Device, ...]]] = []
    sleepers: list[subprocess.Popen] = []

    def launch(root, folder, devices):
        started.append((folder.id, tuple(devices)))
        sleepers.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]))
        return sleepers[-1]

    first = store.submit(make_train(material))
    second = store.submit(make_train(material), num_devices=2)
    store.submit(make_train(material))
    supervisor = Supervisor(store, TWO, launch=launch)
    try:
        for _ in range(2):
            supervisor.tick()
        assert started == [(first, TWO[:1])]
        sleepers[0].kill()
        sleepers[0].wait()
        store.pause(first)
        for _ in range(2):
            supervisor.tick()
        assert started[1:] == [(second, TWO)]
    finally:
        for sleeper in sleepers:
            sleeper.kill()
            sleeper.wait()


def test_a_job_that_needs_more_devices_than_exist_is_started_to_report_it(store, material):
    started: list[int] = []

    def launch(root, folder, devices):
        started.append(len(devices))
        return subprocess.Popen([sys.executable, "-c", ""])

    job_id = store.submit(make_train(material), num_devices=3)
    Supervisor(store, TWO, launch=launch).tick()
    assert started == [2]
    folder = store.catalog.find(job_id)
    reporter = JobReporter(folder, folder.read_state())
    with pytest.raises(ConfigError, match="train on 3 GPUs together, but there are 2 devices"):
        run_job(folder.read_settings(), folder, ["cpu", "cpu"], reporter)


def test_the_launcher_is_this_interpreters_and_gets_ids_only(tmp_path):
    command = build_command(tmp_path, "20260131-120000-0123abcd", GPUS)
    assert command[0] == sys.executable
    assert "torch.distributed.run" in command
    assert command[-4:] == [
        *(str(tmp_path), "20260131-120000-0123abcd", "here-a,here-b", "cuda:0,cuda:1")
    ]
    environment = build_environment(GPUS, {"LOCAL_RANK": "1", "CUDA_VISIBLE_DEVICES": "9"})
    assert environment["CUDA_VISIBLE_DEVICES"] == "GPU-a,3"
    assert "LOCAL_RANK" not in environment


def test_a_members_last_message_is_taken_once(store, material):
    folder = store.catalog.find(store.submit(make_train(material)))
    failure = JobFailure(sentence="the device ran out of memory", advice=("lower lora.rank",))
    write_failure(folder, 1, failure)
    assert pop_failure(folder, 1) == failure
    assert pop_failure(folder, 1) is None
