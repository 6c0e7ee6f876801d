"""Starting workers: what they may run, and what counts as a failed start."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from qwen_edit_lora.lora_core import FileError
from qwen_edit_lora.lora_core.jobs import launch
from qwen_edit_lora.lora_core.jobs.devices import Device
from qwen_edit_lora.lora_core.jobs.folder import JobFolder
from qwen_edit_lora.lora_core.jobs.job import JobStatus
from qwen_edit_lora.lora_core.jobs.launch import EXIT_NOTHING_TO_DO, EXIT_TAKEN, start_worker
from qwen_edit_lora.lora_core.jobs.supervisor import Supervisor
from tiny_jobs import make_train

CPU = Device("cpu", "test-cpu", "")
TWO = [CPU, Device("cpu", "test-cpu-2", "")]


class Ended:
    """A worker that has already ended."""

    pid = 2**22 + 1

    def __init__(self, code: int):
        self.code = code

    def poll(self) -> int:
        return self.code


def start_and_end(store, code: int, devices: list[Device], count: int = 6) -> list[str]:
    """Ids of the jobs started within some ticks, whose workers each end with this exit code."""
    started = []

    def launch_one(root, folder, chosen):
        started.append(folder.id)
        return Ended(code)

    supervisor = Supervisor(store, devices, launch=launch_one)
    for _ in range(count):
        supervisor.tick()
    return started


@pytest.mark.parametrize("shadowed", ["dataclasses", "runpy"])
def test_no_file_of_a_jobs_folder_is_executed(shadowed, store, material, monkeypatch, tmp_path):
    folder = store.catalog.find(store.submit(make_train(material)))
    marker = tmp_path / "was_run"
    (folder.path / f"{shadowed}.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    monkeypatch.chdir(folder.path)  # nor from the server's own folder
    monkeypatch.setattr(launch, "WORKER", "dataclasses")
    assert start_worker(store.root, folder, [CPU]).wait() == 0
    assert not marker.exists()


def test_a_worker_and_a_launcher_work_outside_of_the_jobs_folder(store, material, monkeypatch):
    seen = []
    monkeypatch.setattr(launch.subprocess, "Popen", lambda *a, **o: seen.append((a[0], o["cwd"])))
    folder = store.catalog.find(store.submit(make_train(material)))
    for devices in ([CPU], TWO):
        start_worker(store.root, folder, devices)
    for command, place in seen:
        assert not Path(place).is_relative_to(store.root)
        assert "-m" not in command  # which would look for modules in the working directory


@pytest.mark.parametrize("devices", [[CPU], TWO], ids=["one process", "a launcher"])
def test_a_worker_that_exits_successfully_without_work_is_a_failed_start(devices, store, material):
    job_id = store.submit(make_train(material), num_devices=len(devices))
    assert start_and_end(store, 0, devices) == [job_id]
    state = store.get(job_id).state
    assert state.status is JobStatus.FAILED
    assert "exit code 0" in state.failure.sentence
    store.resume(job_id)
    assert start_and_end(store, 0, devices) == [job_id]


@pytest.mark.parametrize("code", [EXIT_NOTHING_TO_DO, EXIT_TAKEN])
def test_a_worker_that_found_the_job_or_device_taken_is_not_a_failed_start(code, store, material):
    job_id = store.submit(make_train(material))
    assert len(start_and_end(store, code, [CPU], 3)) > 1
    assert store.get(job_id).status is JobStatus.PENDING


def test_a_failed_start_is_not_repeated_while_it_cannot_be_recorded(
    store, material, monkeypatch, caplog
):
    failed, other = (store.submit(make_train(material)) for _ in range(2))

    def refuse(folder, state, durable=True):
        raise FileError("the disk is full")

    monkeypatch.setattr(JobFolder, "write_state", refuse)
    assert sorted(start_and_end(store, 1, [CPU])) == sorted([failed, other])
    assert len([r for r in caplog.records if "the disk is full" in r.message]) == 1


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="makes a link")
def test_a_workers_log_is_not_a_link(store, material, tmp_path, monkeypatch):
    folder = store.catalog.find(store.submit(make_train(material)))
    outside = tmp_path / "precious"
    outside.write_text("mine")
    folder.log.symlink_to(outside)
    monkeypatch.setattr(launch, "WORKER", "this")
    start_worker(store.root, folder, [CPU]).wait()
    assert outside.read_text() == "mine"
    assert "Zen" in folder.log.read_text()
