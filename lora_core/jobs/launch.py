"""Starting a worker: its command, its environment, its place in the system."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import FileError
from ..files import explain
from .devices import Device
from .folder import JobFolder

#: The folder that holds `lora_core`.
PACKAGE_ROOT = Path(__file__).resolve().parents[2]
#: A worker's exit status for "somebody else has the job or the device".
EXIT_TAKEN = 75
#: And for "the job does not want to run any more".
EXIT_NOTHING_TO_DO = 0
#: What `python -m lora_core.jobs.worker` does, also for a Python that looks for modules neither in
#: the working directory nor in PYTHONPATH, as the one of ComfyUI's portable build for Windows.
BOOT = (
    "import runpy, sys; sys.path.insert(0, sys.argv.pop(1)); "
    "runpy.run_module('lora_core.jobs.worker', run_name='__main__', alter_sys=True)"
)
#: ComfyUI's own settings for its own process, and those of `accelerate launch`.
NOT_INHERITED = (
    *("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"),
    *("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
)


def build_environment(devices: Sequence[Device], inherited: Mapping[str, str]) -> dict[str, str]:
    """ComfyUI's environment without what it set for itself, and with the job's GPUs alone.

    ComfyUI chooses the allocator cudaMallocAsync, which knows no expandable segments; sizes that
    change from step to step leave gaps without them.
    """
    environment = {k: v for k, v in inherited.items() if k not in NOT_INHERITED}
    visible = ",".join(device.visible for device in devices if device.is_gpu)
    environment["CUDA_VISIBLE_DEVICES"] = visible
    environment["HIP_VISIBLE_DEVICES"] = visible
    if len(devices) > 1 and not visible and sys.platform == "linux":
        # Processes of one machine need no name that others resolve.
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if visible and sys.platform == "linux":
        environment["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    if "HIP_VISIBLE_DEVICES" not in inherited:
        del environment["HIP_VISIBLE_DEVICES"]
    environment.update(
        HF_HUB_OFFLINE="1",
        HF_HUB_DISABLE_TELEMETRY="1",
        DO_NOT_TRACK="1",
        PYTHONUNBUFFERED="1",
        PYTHONIOENCODING="utf-8",
    )
    return environment


def build_command(root: Path, job_id: str, devices: Sequence[Device]) -> list[str]:
    """One process; for several devices PyTorch's launcher, which starts one for each."""
    python = [sys.executable, *(["-s"] if sys.flags.no_user_site else [])]
    names = (",".join(device.key for device in devices), ",".join(d.name for d in devices))
    worker = [*python, "-c", BOOT, str(PACKAGE_ROOT), str(root), job_id, *names]
    if len(devices) == 1:
        return worker
    launcher = [*python, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    return [*launcher, f"--nproc-per-node={len(devices)}", "--no-python", *worker]


def start_worker(
    root: Path, folder: JobFolder, devices: Sequence[Device]
) -> subprocess.Popen[bytes]:
    """Starts a worker in a session of its own; it outlives this process.

    For several devices it is the launcher whose process is returned. Its exit status says nothing
    of why a process under it ended.

    Raises:
        FileError: the process or its log cannot be made.
    """
    detached: dict[str, Any] = {"start_new_session": True}
    if os.name == "nt":
        flags = subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.CREATE_NO_WINDOW
        detached = {"creationflags": flags}
    try:
        with folder.log.open("ab") as log:
            return subprocess.Popen(
                build_command(root, folder.id, devices),
                cwd=folder.path,
                env=build_environment(devices, os.environ),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                **detached,
            )
    except OSError as e:
        raise FileError(f"no worker can be started: {explain(e)}") from None
