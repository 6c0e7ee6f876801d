"""Jobs that train a real file of two blocks in a real worker, and inspection of processes."""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from demo_base.dit import write_dit
from qwen_edit_lora.lora_core.jobs.folder import JobFolder
from qwen_edit_lora.lora_core.jobs.job import Job, JobState, JobStatus, Request
from qwen_edit_lora.lora_core.jobs.job_reporter import JobReporter
from qwen_edit_lora.lora_core.jobs.store import JobStore
from qwen_edit_lora.lora_core.jobs.supervisor import Supervisor
from qwen_edit_lora.lora_core.jobs.training_job import run_job
from qwen_edit_lora.lora_core.jobs.transitions import Event
from qwen_edit_lora.lora_core.jobs.worker import build_running_state
from qwen_edit_lora.lora_core.training.model.libraries import NOISY_LOGGERS
from safetensors.torch import load_file
from tiny import make_config, make_dataset, make_item

TIMEOUT = 90.0  # seconds for what takes a few on an idle machine


def make_material(folder: Path) -> Path:
    torch.manual_seed(0)
    write_dit(folder / "tiny_fp32_2509.safetensors", "2509", "fp32")
    items = {f"item_{i}": make_item(i, num_text_tokens=4 + i) for i in range(3)}
    make_dataset(folder / "data", items)
    return folder


def make_train(material: Path, **changes: Any):
    """A run of 6 steps that uses everything with a state."""
    changes = {
        "model.source": str(material / "tiny_fp32_2509.safetensors"),
        "model.storage": "fp32",
        "model.gradient_checkpointing": False,
        "lora.dropout": 0.1,
        "optimizer.ema_decay": 0.9,
        "saving.checkpoint_every": 1,
        "saving.dtype": "fp32",
        **changes,
    }
    return make_config(material, **changes)


def train_here(store: JobStore, train: Any, samples: Any = None) -> str:
    """A job from its start to its end in this process."""
    settings = {} if samples is None else {"samples": samples}
    return run_here(store, store.submit(train, **settings))


def run_here(store: JobStore, job_id: str) -> str:
    """The same for a pending job."""
    folder = store.catalog.find(job_id)
    reporter = JobReporter(folder, take(folder))
    levels = {name: logging.getLogger(name).level for name in NOISY_LOGGERS}
    try:
        assert run_job(folder.read_settings(), folder, ["cpu"], reporter)
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
    reporter.finish(Event.COMPLETE)
    return job_id


def take(folder: JobFolder) -> JobState:
    """The state of a job as its worker takes it, or as it is if one has.

    Without a parent: no process will see its exit status.
    """
    state = folder.read_state()
    if state.status is JobStatus.IN_PROGRESS:
        return state
    return dataclasses.replace(build_running_state(state, "cpu"), parent=None)


def run_until(
    supervisor: Supervisor, condition: Callable[[], Any], timeout: float = TIMEOUT
) -> Any:
    """Ticks until the condition is true; otherwise fails with every job's log."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        supervisor.tick()
        if found := condition():
            return found
        time.sleep(0.05)
    said = "\n".join(
        f"{job.id} {job.state}\n{supervisor.store.read_log(job.id)['text'][-3000:]}"
        for job in supervisor.store.list()
    )
    raise AssertionError(f"not within {timeout:.0f} s\n{said}")


def run_to_end(supervisor: Supervisor, job_id: str, timeout: float = TIMEOUT) -> Job:
    def is_over() -> Job | None:
        job = supervisor.store.get(job_id)
        return job if job.status.is_finished or job.status is JobStatus.PAUSED else None

    return run_until(supervisor, is_over, timeout)


def wait_for_step(supervisor: Supervisor, job_id: str, step: int, timeout: float = TIMEOUT) -> Job:
    def has_come() -> Job | None:
        job = supervisor.store.get(job_id)
        assert not job.status.is_finished, job.state
        return job if count_steps(supervisor.store, job_id) >= step else None

    return run_until(supervisor, has_come, timeout)


def count_steps(store: JobStore, job_id: str) -> int:
    """Counts from the metrics, written after every step; the state is written only occasionally."""
    metrics = store.read_metrics(job_id)
    return metrics[-1]["step"] if metrics else 0


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path)


def assert_equal_weights(ours: Path, theirs: Path) -> None:
    a, b = load_file(ours), load_file(theirs)
    assert a.keys() == b.keys()
    assert len(a) > 0
    assert [key for key in a if not torch.equal(a[key], b[key])] == []


def list_processes(root: Path) -> list[int]:
    """Pids of this store's workers, from the system's process list."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")
            state = (path.parent / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if str(root) in words and state not in "ZX":
            found.append(int(path.parent.name))
    return found


def kill_workers(root: Path) -> None:
    for pid in list_processes(root):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


class Fickle(JobReporter):
    """Somebody asks for a pause at the n-th time that the worker looks, and takes it back after
    the look.
    """

    def __init__(self, folder: JobFolder, at: int | None, looks: int = 1):
        super().__init__(folder, take(folder))
        self.at, self.looks, self.count = at, looks, 0

    def should_stop(self) -> bool:
        is_asked = self.at is not None and self.at <= self.count < self.at + self.looks
        self.count += 1
        if is_asked:
            self.folder.write_request(Request.PAUSE)
        answer = super().should_stop()
        if is_asked:
            self.folder.write_request(Request.RUN)
        return answer
