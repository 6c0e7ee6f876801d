"""Why a job failed, and how a worker is started."""

from __future__ import annotations

import dataclasses
import signal
from pathlib import Path

import pytest
import torch
from qwen_edit_lora.lora_core import FileError
from qwen_edit_lora.lora_core.jobs import nccl
from qwen_edit_lora.lora_core.jobs.devices import Device
from qwen_edit_lora.lora_core.jobs.failure import (
    explain_death,
    explain_error,
    is_from_outside,
)
from qwen_edit_lora.lora_core.jobs.folder import JobFolder
from qwen_edit_lora.lora_core.jobs.job import JobFailure, JobState, JobStatus
from qwen_edit_lora.lora_core.jobs.launch import build_command, build_environment
from qwen_edit_lora.lora_core.jobs.outcomes import restart_or_fail
from tiny_jobs import make_train

CPU = Device("cpu", "here-cpu", "")
FIRST, SECOND = Device("cuda:0", "here-a", "2"), Device("cuda:1", "here-b", "GPU-b")


@pytest.mark.parametrize(
    ("code", "sentence", "again"),
    [
        (-signal.SIGKILL, "terminated by SIGKILL, manually or because the computer", True),
        (-signal.SIGTERM, "terminated by SIGTERM", True),
        (None, "disappeared without a message", True),
        (-signal.SIGSEGV, "crashed with SIGSEGV", False),
        (-signal.SIGABRT, "crashed with SIGABRT", False),
        (3, "ended with exit code 3 before it could report why", False),
    ],
)
def test_a_crash_is_explained_and_only_external_ones_are_retried(code, sentence, again, tmp_path):
    folder = JobFolder(tmp_path)
    folder.log.write_text("".join(f"line {i}\n" for i in range(100)))
    failure = explain_death(code, folder)
    assert sentence in failure.sentence
    assert failure.exit_code == code
    assert failure.log_tail.splitlines() == [f"line {i}" for i in range(80, 100)]
    assert failure.advice
    assert is_from_outside(code) is again


def test_restarts_are_counted_without_progress_only():
    failure = JobFailure(sentence="killed")
    state = JobState(status=JobStatus.IN_PROGRESS)
    statuses, counts = [], []
    for reached in (0, 0, 5, 5, 5):
        state = restart_or_fail(state, reached, failure, max_restarts=2)
        statuses.append(state.status)
        counts.append(state.restarts)
    assert counts == [1, 2, 1, 2, 2]
    assert statuses == [JobStatus.PENDING] * 4 + [JobStatus.FAILED]
    assert state.failure == failure


def make_backend_error(text: str) -> Exception:
    from torch.distributed import DistBackendError

    return DistBackendError(text)


def make_accelerator_error(text: str) -> Exception:
    """As raised by torch from 2.8 on, where it was a RuntimeError before."""
    kind = getattr(torch, "AcceleratorError", RuntimeError)
    return kind(text)


NCCL = "NCCL error in: NCCLUtils.cpp:109, unhandled cuda error, NCCL version 2.27.5\n"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        torch.OutOfMemoryError("HIP out of memory. Tried to allocate 80.00 MiB. GPU 0 has"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        RuntimeError("CUDA error: out of memory"),
        make_accelerator_error("CUDA error: out of memory\nCUDA kernel errors might be"),
        make_accelerator_error("HIP error: out of memory\nHIP kernel errors might be"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(h)`"),
        RuntimeError("CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(h)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        make_backend_error(
            f"{NCCL}ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\n"
            "Cuda failure 2 'out of memory'"
        ),
        make_backend_error(f"{NCCL}Last error:\nFailed to CUDA calloc 6291456 bytes"),
        MemoryError(),
    ],
    ids=lambda error: f"{type(error).__name__}-{str(error)[:40]}",
)
def test_an_out_of_memory_error_says_what_to_lower(error, material):
    config = make_train(material, **{"data.batch_size": 4, "lora.rank": 64})
    failure = explain_error(error, config)
    assert "ran out of memory" in failure.sentence
    assert failure.advice[0] == "set model.gradient_checkpointing to true"
    assert "set data.batch_size to 1 and raise optimizer.accumulation" in failure.advice
    assert "lower lora.rank" in failure.advice


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(`"),
        make_backend_error(f"{NCCL}Last error:\nCuda failure 1 'invalid argument'"),
        ValueError("out of memory"),
    ],
)
def test_other_library_errors_are_not_out_of_memory(error, material):
    assert "ran out of memory" not in explain_error(error, make_train(material)).sentence


def test_other_errors_are_reported_in_one_sentence(material):
    config = make_train(material)
    assert explain_error(FileError("a\n b"), config) == JobFailure(sentence="a b")
    error = OSError(2, "No such file or directory", "/houses/my user/x/a.png")
    assert "directory: '…/a.png'" in explain_error(error, config).sentence
    failure = explain_error(ZeroDivisionError("division by zero"), config)
    assert failure.sentence == "training stopped with ZeroDivisionError: division by zero"
    assert failure.advice == ("read the end of the log",)


def test_an_error_for_gpus_that_cannot_communicate_mentions_shared_memory(material, monkeypatch):
    config = make_train(material)
    error = torch.distributed.DistBackendError("NCCL error")
    monkeypatch.setattr(nccl, "BYTES_PER_PROCESS", 1 << 60)
    failure = explain_error(error, config)
    assert failure.sentence == "training stopped with DistBackendError: NCCL error"
    assert "--shm-size=1g, or ComfyUI with NCCL_SHM_DISABLE=1" in failure.advice[0]
    assert "NCCL_DEBUG=WARN" in failure.advice[1]
    monkeypatch.setattr(nccl, "BYTES_PER_PROCESS", 0)
    assert "NCCL_DEBUG=WARN" in explain_error(error, config).advice[0]


def test_a_worker_sees_one_gpu_and_none_of_comfyuis_own_settings(monkeypatch):
    inherited = {
        "PATH": "/bin",
        "PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync",
        "CUDA_VISIBLE_DEVICES": "2,GPU-b",
        "WORLD_SIZE": "2",
    }
    environment = build_environment([SECOND], inherited)
    assert environment["CUDA_VISIBLE_DEVICES"] == "GPU-b"
    assert environment.get("PYTORCH_CUDA_ALLOC_CONF") in (None, "expandable_segments:True")
    assert environment["PATH"] == "/bin"
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert "WORLD_SIZE" not in environment
    on_cpu = build_environment([CPU], inherited)
    assert on_cpu["CUDA_VISIBLE_DEVICES"] == ""
    assert "PYTORCH_CUDA_ALLOC_CONF" not in on_cpu


def test_the_command_is_a_list_of_ids_and_never_a_shell_line(tmp_path):
    command = build_command(tmp_path, "20260131-120000-0123abcd", [FIRST])
    assert command[-4:] == [str(tmp_path), "20260131-120000-0123abcd", "here-a", "cuda:0"]
    assert Path(command[-5], "lora_core", "jobs", "worker.py").is_file()


def test_a_state_includes_the_remaining_time():
    state = JobState(status=JobStatus.IN_PROGRESS, step=4, num_steps=10, seconds_per_step=2.0)
    assert state.remaining_s == 12.0
    assert dataclasses.replace(state, status=JobStatus.PAUSED).remaining_s is None
