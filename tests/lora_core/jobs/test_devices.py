"""Available devices, which of them a job gets, and how its worker is limited to it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from qwen_edit_lora.lora_core.jobs.devices import (
    Device,
    choose_devices,
    list_devices,
    set_device,
)
from qwen_edit_lora.lora_core.jobs.job import JobStatus
from qwen_edit_lora.lora_core.jobs.launch import build_environment
from qwen_edit_lora.lora_core.jobs.supervisor import Supervisor
from tiny_jobs import make_train

GIB = 2**30
CPU = Device("cpu", "here-cpu", "")
LARGE = Device("cuda:0", "here-a", "0", 24 * GIB)
SMALL = Device("cuda:1", "here-b", "1", 12 * GIB)
#: ComfyUI computes on the large one.
DEVICES = [SMALL, CPU, LARGE]


def choose(wanted, *arguments, **options):
    return [one.name for one in choose_devices(DEVICES, wanted, *arguments, **options)]


def test_a_job_gets_the_first_of_the_devices_it_requests():
    assert choose("auto") == choose("cuda") == ["cuda:1"]
    assert choose("cuda:0") == ["cuda:0"]
    assert choose("cpu") == ["cpu"]


def test_a_job_for_a_missing_gpu_goes_to_the_cpus_worker():
    assert choose("cuda:7") == ["cpu"]
    assert choose_devices([CPU], "auto") == choose_devices([CPU], "cuda:1") == [CPU]


def test_free_devices_are_preferred_to_taken_ones_and_those_to_none():
    assert choose("auto", taken={SMALL}) == ["cuda:0"]
    assert choose("auto", taken={SMALL, LARGE}) == ["cuda:1"]
    assert choose("auto", 2, taken={SMALL}) == ["cuda:0", "cuda:1"]
    assert choose("auto", 3) == ["cuda:1", "cuda:0"]


def test_a_job_made_for_a_large_gpu_waits_for_it():
    assert choose("auto", 1, 24 * GIB) == ["cuda:0"]
    assert choose("auto", 1, 24 * GIB, taken={LARGE}) == ["cuda:0"]
    assert choose("auto", 2, 12 * GIB) == ["cuda:1", "cuda:0"]
    assert choose("auto", 1, 48 * GIB) == ["cuda:1"]  # there is none: better here than never


@pytest.mark.parametrize(
    ("wanted", "name", "placed"),
    [
        ("cuda:1", "cuda:1", "cuda"),
        ("auto", "cuda:3", "cuda"),
        ("auto", "cpu", "cpu"),
        ("cuda:1", "cpu", "cuda:1"),  # opening it fails because it does not exist
    ],
)
def test_a_process_that_sees_one_gpu_calls_it_cuda(wanted, name, placed, material):
    config = make_train(material, **{"model.device": wanted})
    assert set_device(config, name).model.device == placed


@pytest.fixture
def two_gpus(monkeypatch):
    """Two GPUs that can be described but not opened."""

    def refuse(*arguments):
        raise AssertionError("this opens a CUDA context")

    found = [
        SimpleNamespace(uuid="a", total_memory=24 * GIB),
        SimpleNamespace(uuid="b", total_memory=12 * GIB),
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", found.__getitem__)
    monkeypatch.setattr(torch.cuda, "mem_get_info", refuse)
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)


def test_memory_is_known_without_opening_a_gpu(two_gpus):
    devices = list_devices()
    assert [one.name for one in devices] == ["cuda:0", "cuda:1", "cpu"]
    assert [one.memory_bytes for one in devices] == [24 * GIB, 12 * GIB, 0]
    assert len({one.key for one in devices}) == 3


@pytest.mark.parametrize(
    ("hip", "inherited", "shown"),
    [
        (None, {}, {"CUDA_VISIBLE_DEVICES": "1"}),
        (None, {"CUDA_VISIBLE_DEVICES": "3, GPU-5"}, {"CUDA_VISIBLE_DEVICES": "GPU-5"}),
        (
            None,  # of no meaning there
            {"HIP_VISIBLE_DEVICES": "6,7", "CUDA_VISIBLE_DEVICES": "3,4"},
            {"CUDA_VISIBLE_DEVICES": "4"},
        ),
        ("6.4", {}, {"HIP_VISIBLE_DEVICES": "1"}),
        ("6.4", {"HIP_VISIBLE_DEVICES": "6,7"}, {"HIP_VISIBLE_DEVICES": "7"}),
        ("6.4", {"CUDA_VISIBLE_DEVICES": "3,4"}, {"HIP_VISIBLE_DEVICES": "4"}),
        (
            "6.4",  # HIP counts among what ROCR leaves
            {"ROCR_VISIBLE_DEVICES": "5,6,7", "HIP_VISIBLE_DEVICES": "0,2"},
            {"ROCR_VISIBLE_DEVICES": "5,6,7", "HIP_VISIBLE_DEVICES": "2"},
        ),
    ],
)
def test_a_worker_sees_the_second_of_the_gpus_that_the_user_chose(
    hip, inherited, shown, two_gpus, monkeypatch
):
    monkeypatch.setattr(torch.version, "hip", hip)
    for name, value in inherited.items():
        monkeypatch.setenv(name, value)
    second = list_devices()[1]
    environment = build_environment([second], inherited)
    found = {name: value for name, value in environment.items() if "VISIBLE" in name}
    assert found == shown


class Process:
    """A worker that never ends."""

    pid = 1

    def poll(self):
        return None


def test_the_supervisor_starts_a_job_where_it_was_made_for(store, material):
    started = []

    def launch(root, folder, devices):
        started.append((folder.id, [one.name for one in devices]))
        return Process()

    supervisor = Supervisor(store, DEVICES, launch=launch)
    auto, second = ({"model.device": name} for name in ("auto", "cuda:1"))
    large = store.submit(make_train(material, **auto), gpu_memory_bytes=24 * GIB)
    anywhere = store.submit(make_train(material, **auto))
    named = store.submit(make_train(material, **second))
    late = store.submit(make_train(material, **auto), gpu_memory_bytes=24 * GIB)
    for _ in range(2):
        supervisor.tick()
    assert started == [(large, ["cuda:0"]), (anywhere, ["cuda:1"])]
    assert {store.get(one).status for one in (named, late)} == {JobStatus.PENDING}


def test_a_job_for_a_missing_gpu_is_started_and_reports_it(store, material):
    started = []

    def launch(root, folder, devices):
        started.append([one.name for one in devices])
        return Process()

    store.submit(make_train(material, **{"model.device": "cuda:7"}))
    Supervisor(store, DEVICES, launch=launch).tick()
    assert started == [["cpu"]]
