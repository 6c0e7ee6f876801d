"""How our own processes are started, including on Windows and with several GPUs."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from qwen_edit_lora.lora_core import ConfigError, subprocesses
from qwen_edit_lora.lora_core.jobs import estimate_process, launch, nccl, team
from qwen_edit_lora.lora_core.jobs.devices import Device
from qwen_edit_lora.lora_core.jobs.folder import JobFolder
from qwen_edit_lora.lora_core.jobs.job_reporter import JobReporter
from qwen_edit_lora.lora_core.jobs.training_job import run_job
from qwen_edit_lora.lora_core.training.run.processes import find_accelerator
from tiny_jobs import make_train

GPU = Device("cuda:0", "here-a", "0")
SHARED_GPU = Device("cuda:0", "here-a", "0", is_shared=True)
TWO_GPUS = [GPU, Device("cuda:1", "here-b", "1")]
ID = "20260131-120000-0123abcd"
#: A launcher's "process 2 of 2".
OF_TWO = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}


class Started(Exception):
    """Raised instead of starting a process."""


@pytest.fixture
def popen(monkeypatch):
    """The arguments that a process would have been started with."""
    seen = {}

    def start(command, **options):
        seen.update(options, command=command)
        raise Started

    monkeypatch.setattr(subprocess, "Popen", start)
    return seen


def pretend_windows(monkeypatch):
    flags, executable = SimpleNamespace(no_user_site=1), sys.executable
    windows = SimpleNamespace(platform="win32", flags=flags, executable=executable)
    for module in (launch, subprocesses):
        monkeypatch.setattr(module, "sys", windows)
    monkeypatch.setattr(subprocess, "CREATE_NO_WINDOW", 0x08000000, raising=False)
    monkeypatch.setattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0x200, raising=False)


def hide_nccl(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)


def test_no_process_opens_a_window_or_sees_the_users_own_packages(
    popen, material, tmp_path, monkeypatch
):
    pretend_windows(monkeypatch)
    with pytest.raises(Started):
        launch.start_worker(tmp_path, JobFolder(tmp_path), [GPU])
    assert popen["creationflags"] == 0x08000200
    assert popen["command"][1] == "-s"
    popen.clear()
    with pytest.raises(Started):
        estimate_process.estimate_in_process(make_train(material), GPU)
    assert popen["creationflags"] == 0x08000000
    assert popen["command"][1] == "-s"


def test_a_worker_and_an_estimate_know_that_the_gpu_is_shared(popen, material, tmp_path):
    assert "--shared" in launch.build_command(tmp_path, ID, [SHARED_GPU])
    assert "--shared" not in launch.build_command(tmp_path, ID, [GPU])
    for device, is_expected in ((SHARED_GPU, True), (GPU, False)):
        with pytest.raises(Started):
            estimate_process.estimate_in_process(
                make_train(material), device, with_samples=is_expected
            )
        assert ("--shared" in popen["command"]) == is_expected
        assert ("--samples" in popen["command"]) == is_expected


def test_several_gpus_without_nccl_are_refused_with_a_message_from_any_source(
    store, material, tmp_path, monkeypatch
):
    assert "torch.distributed.run" in launch.build_command(tmp_path, ID, TWO_GPUS)
    hide_nccl(monkeypatch)
    # PyTorch's launcher would fail in the same way before it could report why.
    assert "torch.distributed.run" not in launch.build_command(tmp_path, ID, TWO_GPUS)
    two_cpus = [Device("cpu", "a", ""), Device("cpu", "b", "")]
    assert "torch.distributed.run" in launch.build_command(tmp_path, ID, two_cpus)
    job_id = store.submit(make_train(material), num_devices=2)
    folder = store.catalog.find(job_id)
    reporter = JobReporter(folder, folder.read_state())
    with pytest.raises(ConfigError, match="which this PyTorch does not include, like every"):
        run_job(folder.read_settings(), folder, ["cuda:0", "cuda:1"], reporter)
    for name, value in OF_TWO.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ConfigError, match="train on one GPU, or on Linux or WSL"):
        find_accelerator(on_cpu=False)


@pytest.mark.parametrize(
    ("is_supported", "inherited", "expected"),
    [
        (True, {}, {}),
        (False, {}, {"NCCL_P2P_DISABLE": "1", "NCCL_IB_DISABLE": "1"}),
        (False, {"NCCL_IB_DISABLE": "0"}, {"NCCL_P2P_DISABLE": "1"}),
    ],
)
def test_cards_that_accelerate_finds_unconnected_get_its_settings(
    is_supported, inherited, expected, monkeypatch
):
    utils = pytest.importorskip("accelerate.utils")
    monkeypatch.setattr(utils, "check_cuda_p2p_ib_support", lambda: is_supported)
    assert nccl.choose_settings(inherited) == expected


def test_a_team_of_gpus_has_the_settings_before_accelerate_looks_for_them(monkeypatch, capsys):
    utils = pytest.importorskip("accelerate.utils")
    monkeypatch.setattr(utils, "check_cuda_p2p_ib_support", lambda: False)
    monkeypatch.setattr(nccl, "BYTES_PER_PROCESS", 1 << 60)
    environment = dict(OF_TWO)
    monkeypatch.setattr(team, "os", SimpleNamespace(environ=environment))
    seen = {}
    monkeypatch.setattr(
        "qwen_edit_lora.lora_core.training.run.processes.find_accelerator",
        lambda on_cpu, patience_h: seen.update(environment),
    )
    team.join_process_group(on_cpu=False)
    assert (seen["NCCL_P2P_DISABLE"], seen["NCCL_IB_DISABLE"]) == ("1", "1")
    said = capsys.readouterr().out
    assert "set for these cards and their driver: NCCL_P2P_DISABLE, NCCL_IB_DISABLE" in said
    assert "of shared memory are free, too little for several GPUs" in said


@pytest.mark.skipif(not nccl.SHARED_MEMORY.is_dir(), reason="there is no /dev/shm")
def test_shared_memory_is_requested_where_there_is_little(monkeypatch):
    status = SimpleNamespace(f_bavail=1 << 14, f_frsize=1 << 12)  # Docker's 64 MB
    monkeypatch.setattr(nccl.os, "statvfs", lambda path: status)
    assert nccl.explain_shared_memory(2, {}).startswith("only 64 MiB of shared memory are free")
    assert nccl.explain_shared_memory(2, {"NCCL_SHM_DISABLE": "1"}) is None
    status.f_bavail <<= 4
    assert nccl.explain_shared_memory(2, {}) is None
