"""Settings that NCCL, which joins the GPUs of one job, needs on this machine, and what it lacks."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from ..messages import message
from ..text import format_bytes

SHARED_MEMORY = Path("/dev/shm")
#: Of shared memory, for each process: NCCL makes several segments of about 10 MB.
BYTES_PER_PROCESS = 2**27
WITHOUT_SHARED_MEMORY = "NCCL_SHM_DISABLE"
CONSUMER_CARDS = {"NCCL_P2P_DISABLE": "1", "NCCL_IB_DISABLE": "1"}


def choose_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """What `accelerate launch` sets too where the cards and their driver need it.

    Without these Accelerate refuses to train on several RTX 40 with drivers before 550.40.07.
    """
    try:
        from accelerate.utils import check_cuda_p2p_ib_support
    except ImportError:  # its user raises the error
        return {}
    if torch.version.hip is not None or check_cuda_p2p_ib_support():
        return {}
    return {name: value for name, value in CONSUMER_CARDS.items() if name not in environment}


def explain_shared_memory(num_processes: int, environment: Mapping[str, str]) -> str | None:
    """A message where there is too little shared memory for NCCL to start; else None."""
    if environment.get(WITHOUT_SHARED_MEMORY) == "1" or not SHARED_MEMORY.is_dir():
        return None
    found = os.statvfs(SHARED_MEMORY)
    free = found.f_bavail * found.f_frsize
    if free >= num_processes * BYTES_PER_PROCESS:
        return None
    return message(
        "only {free} of shared memory are free, too little for several GPUs; start the "
        "container with --shm-size=1g, or ComfyUI with {without_shared_memory}=1 in its "
        "environment, which is slower",
        free=format_bytes(free, 1024),
        without_shared_memory=WITHOUT_SHARED_MEMORY,
    )


def is_communication_error(error: BaseException) -> bool:
    """Whether the processes of a job could not talk to each other."""
    kind = getattr(torch.distributed, "DistError", None)  # not in every build
    return kind is not None and isinstance(error, kind)
