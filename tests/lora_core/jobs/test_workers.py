"""Workers in their own interpreters: pause, resume, cancel, the queue, and failures."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from qwen_edit_lora.lora_core.jobs.devices import Device
from qwen_edit_lora.lora_core.jobs.identity import is_running
from qwen_edit_lora.lora_core.jobs.job import JobStateError, JobStatus, Phase, Request
from qwen_edit_lora.lora_core.jobs.store import JobStore
from qwen_edit_lora.lora_core.jobs.supervisor import Supervisor
from qwen_edit_lora.lora_core.training.run.checkpoint import CheckpointFolder
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

CPU = Device("cpu", "test-cpu", "")
MANY = 5000  # steps; a job this long ends only because it is stopped
NOTICE_S = 10.0

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/stat").exists(), reason="counts processes in /proc"
)


@pytest.fixture
def supervisor(store: JobStore) -> Supervisor:
    return Supervisor(store, [CPU])


def test_a_paused_and_resumed_job_ends_as_one_that_ran_through(
    store, supervisor, material, tmp_path, monkeypatch
):
    # what ComfyUI sets for itself
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "backend:cudaMallocAsync")
    (tmp_path / "loras").mkdir()
    train = make_train(material, steps=60)
    started = time.monotonic()
    paused = store.submit(train, loras=str(tmp_path / "loras"), niceness=7)
    assert time.monotonic() - started < 1
    wait_for_step(supervisor, paused, 3)
    (pid,) = list_processes(store.root)
    assert Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[16] == str(
        os.nice(0) + 7
    )
    environment = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    assert "CUDA_VISIBLE_DEVICES=" in environment
    assert not any(line.startswith("PYTORCH_CUDA_ALLOC_CONF") for line in environment)
    assert os.getsid(pid) == pid

    at = count_steps(store, paused)
    assert store.pause(paused).request is Request.PAUSE
    asked_at = count_steps(store, paused)
    job = run_to_end(supervisor, paused)
    assert job.status is JobStatus.PAUSED
    assert at <= job.state.step < 60
    assert job.state.step <= asked_at + 1  # the step under way, and no other
    folder = store.catalog.find(paused).path
    assert CheckpointFolder(folder / "checkpoints").list_steps()[-1] == count_steps(store, paused)
    assert all((folder / name).is_file() for name in job.state.adapters)
    assert len(job.state.adapters) == 2  # raw and averaged
    run_until(supervisor, lambda: list_processes(store.root) == [])

    whole = store.submit(train)
    assert run_to_end(supervisor, whole).status is JobStatus.COMPLETED
    store.resume(paused)
    job = run_to_end(supervisor, paused)
    assert job.status is JobStatus.COMPLETED, job.state
    assert "resumed after step" in store.read_log(paused)["text"]
    for name in ("tiny.safetensors", "tiny_ema.safetensors"):
        assert_equal_weights(folder / name, store.catalog.find(whole).path / name)
    published = tmp_path / "loras" / "tiny.safetensors"
    assert_equal_weights(published, folder / "tiny.safetensors")
    with safe_open(published, "pt") as file:
        metadata = file.metadata()
    assert metadata["qwen_edit_lora.job"] == paused
    assert json.loads(metadata["qwen_edit_lora.config"])["steps"] == 60
    assert str(tmp_path) not in json.dumps(metadata)
    with pytest.raises(JobStateError, match="is completed and cannot be resumed"):
        store.resume(paused)
    run_until(supervisor, lambda: list_processes(store.root) == [])


def test_jobs_run_one_after_another_in_the_order_they_came_and_cancelling_saves(
    store, supervisor, material
):
    first = store.submit(make_train(material, steps=MANY))
    second = store.submit(make_train(material, steps=4))
    third = store.submit(make_train(material, steps=MANY))
    wait_for_step(supervisor, first, 2)
    assert [store.get(job).status for job in (second, third)] == [JobStatus.PENDING] * 2
    assert len(list_processes(store.root)) == 1
    with pytest.raises(JobStateError, match="is running; pause or cancel it first"):
        store.delete(first)

    store.cancel(first)
    asked_at = count_steps(store, first)
    job = run_to_end(supervisor, first)
    assert job.status is JobStatus.CANCELLED
    assert job.state.step <= asked_at + 1
    folder = store.catalog.find(first).path
    reached = CheckpointFolder(folder / "checkpoints").list_steps()[-1]
    assert reached == job.state.step == count_steps(store, first)
    assert [name for name in job.state.adapters if not (folder / name).is_file()] == []
    assert job.state.adapters[0] == f"adapters/tiny_{reached:08d}.safetensors"

    # cancelled while it loads: there is nothing to save, so it ends at once
    run_until(supervisor, lambda: store.get(third).status is JobStatus.IN_PROGRESS)
    assert store.get(second).status is JobStatus.COMPLETED
    assert store.get(third).state.phase is Phase.LOADING
    started = time.monotonic()
    store.cancel(third)
    assert run_to_end(supervisor, third).status is JobStatus.CANCELLED
    assert time.monotonic() - started < 5
    run_until(supervisor, lambda: list_processes(store.root) == [])
    store.delete(third)
    assert [job.id for job in store.list()] == [first, second]


SERVER = """
import importlib.util, sys
from pathlib import Path

root, store = map(Path, sys.argv[1:])
spec = importlib.util.spec_from_file_location(
    "qwen_edit_lora", root / "__init__.py", submodule_search_locations=[str(root)]
)
sys.modules["qwen_edit_lora"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
from qwen_edit_lora.lora_core.jobs.devices import Device
from qwen_edit_lora.lora_core.jobs.store import JobStore
from qwen_edit_lora.lora_core.jobs.supervisor import Supervisor

Supervisor(JobStore(store), [Device("cpu", "test-cpu", "")]).run()
"""


def start_server(store: JobStore) -> subprocess.Popen[bytes]:
    root = Path(__file__).resolve().parents[3]
    return subprocess.Popen([sys.executable, "-c", SERVER, root, store.root])


def test_two_servers_on_one_folder_run_each_job_once_and_a_worker_outlives_its_server(
    store, material
):
    servers = [start_server(store), start_server(store)]
    try:
        jobs = [store.submit(make_train(material, steps=4)) for _ in range(2)]
        long = store.submit(make_train(material, steps=MANY))
        for job in jobs:
            assert store.wait(job, timeout_s=90).status is JobStatus.COMPLETED
        deadline = time.monotonic() + 60
        while count_steps(store, long) < 1 and time.monotonic() < deadline:
            time.sleep(0.1)
        worker = store.get(long).state.worker
        for server in servers:
            server.kill()
            server.wait()
        at = count_steps(store, long)
        time.sleep(1.5)
        assert is_running(worker)
        assert count_steps(store, long) > at

        # a new server finds it, and does not start another
        supervisor = Supervisor(store, [CPU])
        for _ in range(4):
            supervisor.tick()
        job = store.get(long)
        assert (job.status, job.state.worker) == (JobStatus.IN_PROGRESS, worker)
        assert list_processes(store.root) == [worker.pid]
        store.pause(long)
        assert run_to_end(supervisor, long).status is JobStatus.PAUSED
        for job_id in (*jobs, long):
            assert store.read_log(job_id)["text"].count("takes job") == 1
    finally:
        for server in servers:
            server.kill()
            server.wait()


def test_a_dead_worker_is_noticed_and_restarted_a_limited_number_of_times(
    store, supervisor, material, monkeypatch
):
    job_id = store.submit(make_train(material, steps=MANY), max_restarts=1)
    for attempt in range(2):
        run_until(supervisor, lambda: store.get(job_id).state.worker)
        (pid,) = list_processes(store.root)
        os.kill(pid, signal.SIGKILL)
        died = time.monotonic()
        run_until(supervisor, lambda: store.get(job_id).status is not JobStatus.IN_PROGRESS)
        assert time.monotonic() - died < NOTICE_S
        state = store.get(job_id).state
        if attempt == 0:
            assert (state.status, state.restarts) == (JobStatus.PENDING, 1)
            assert "terminated by SIGKILL" in state.notes[-1]
    assert state.status is JobStatus.FAILED
    assert state.failure.exit_code == -signal.SIGKILL
    assert "terminated 2 times in a row by SIGKILL" in state.failure.sentence
    assert "takes job" in state.failure.log_tail
    assert any("resume the job" in sentence for sentence in state.failure.advice)
    supervisor.tick()
    assert list_processes(store.root) == []
    store.resume(job_id)
    assert store.get(job_id).state.restarts == 0

    # a second request ends a hanging one
    run_until(supervisor, lambda: store.get(job_id).state.worker)
    (pid,) = list_processes(store.root)
    os.kill(pid, signal.SIGSTOP)
    monkeypatch.setattr("qwen_edit_lora.lora_core.jobs.job.SILENCE_TIMEOUT", 0.5)
    store.cancel(job_id)
    time.sleep(1)
    supervisor.tick()
    assert store.get(job_id).status is JobStatus.IN_PROGRESS
    assert "does not answer; cancel it twice" in store.get(job_id).describe()
    store.cancel(job_id)
    assert run_to_end(supervisor, job_id).status is JobStatus.CANCELLED


def test_a_job_that_fails_by_itself_says_why_and_what_to_do_and_is_not_retried(
    store, supervisor, material
):
    # one LoRA's matrix alone is half a terabyte
    too_large = make_train(material, **{"lora.rank": 10**9, "data.batch_size": 2})
    unstable = make_train(material, **{"steps": 50, "optimizer.learning_rate": 1e30})
    damaged = store.submit(make_train(material))
    (store.catalog.find(damaged).path / "config.json").write_text("{")
    jobs = [store.submit(too_large), store.submit(unstable)]
    states = [run_to_end(supervisor, job).state for job in jobs]
    assert [state.status for state in states] == [JobStatus.FAILED] * 2
    memory, numbers = (state.failure for state in states)
    assert "ran out of memory" in memory.sentence
    assert "set data.batch_size to 1" in " ".join(memory.advice)
    assert "lower lora.rank" in memory.advice
    assert "at step" in numbers.sentence
    assert "lower the learning rate" in numbers.sentence.lower()
    assert "failed:" in numbers.log_tail
    assert [state.restarts for state in states] == [0, 0]
    broken = next(job for job in store.list() if job.id == damaged)
    assert broken.status is JobStatus.FAILED
    assert "config.json of job" in broken.state.failure.sentence
    store.delete(damaged)
