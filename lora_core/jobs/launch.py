"""Starting our own processes: their command, environment and session."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..disk.writing import explain
from ..errors import FileError
from ..subprocesses import PACKAGE_ROOT, hide_window, run_module
from ..training.run.processes import can_join_gpus
from .devices import CUDA_VARIABLE, HIP_VARIABLE, Device, show_only
from .folder import JobFolder

#: A worker's exit status for "another process has the job or the device".
EXIT_TAKEN = 75
#: And for "the job is not to run any more". Not 0, which any process that never got to the job may
#: exit with.
EXIT_NOTHING_TO_DO = 76
WORKER = "lora_core.jobs.worker"
#: Option for a worker: ComfyUI computes on its GPU too.
SHARED = "--shared"
#: ComfyUI's own settings for its own process, and those of `accelerate launch`.
NOT_INHERITED = (
    *("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"),
    *(CUDA_VARIABLE, HIP_VARIABLE),
    *("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
)


def build_environment(devices: Sequence[Device], inherited: Mapping[str, str]) -> dict[str, str]:
    """ComfyUI's environment without what it set for itself, and with only the job's GPUs.

    ComfyUI chooses the allocator cudaMallocAsync, which has no expandable segments; without them,
    sizes that change from step to step leave gaps.
    """
    environment = {k: v for k, v in inherited.items() if k not in NOT_INHERITED}
    environment |= show_only(devices)
    has_gpu = any(device.is_gpu for device in devices)
    if len(devices) > 1 and not has_gpu and sys.platform == "linux":
        # Processes on one machine need no resolvable host name.
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if has_gpu and sys.platform == "linux":
        environment["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    environment.update(
        HF_HUB_OFFLINE="1",
        HF_HUB_DISABLE_TELEMETRY="1",
        DO_NOT_TRACK="1",
        PYTHONUNBUFFERED="1",
        PYTHONIOENCODING="utf-8",
    )
    return environment


def build_command(root: Path, job_id: str, devices: Sequence[Device]) -> list[str]:
    """One process; for several devices PyTorch's launcher, which starts one for each.

    Also one process for several GPUs that nothing here can join: it reports the error.
    """
    names = (",".join(device.key for device in devices), ",".join(d.name for d in devices))
    shared = [SHARED] if any(device.is_shared for device in devices) else []
    worker = run_module(WORKER, str(root), job_id, *names, *shared)
    if len(devices) == 1 or (devices[0].is_gpu and not can_join_gpus()):
        return worker
    launcher = run_module("torch.distributed.run")
    options = ["--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={len(devices)}"]
    return [*launcher, *options, "--no-python", *worker]


def start_worker(
    root: Path, folder: JobFolder, devices: Sequence[Device]
) -> subprocess.Popen[bytes]:
    """Starts a worker in its own session; it outlives this process.

    For several devices the launcher's process is returned. Its exit status does not tell why a
    process under it ended.

    Raises:
        FileError: the process or its log cannot be made.
    """
    detached: dict[str, Any] = {"start_new_session": True}
    if sys.platform == "win32":
        detached = hide_window(subprocess.CREATE_NEW_PROCESS_GROUP)
    try:
        with folder.open_log() as log:
            return subprocess.Popen(
                build_command(root, folder.id, devices),
                cwd=PACKAGE_ROOT,  # a job's folder may come from elsewhere
                env=build_environment(devices, os.environ),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                **detached,
            )
    except OSError as e:
        raise FileError("no worker can be started: {reason}", reason=explain(e)) from None
