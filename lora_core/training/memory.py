"""Memory in use on a device: torch's allocator on a GPU, the process's resident set on a CPU."""

from __future__ import annotations

import ctypes
import gc
import os
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")


class MemoryMeter:
    """Bytes in use now, and at most since `reset`; None where the system does not tell.

    A process's resident set is known on Linux only.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.on_gpu = device.type == "cuda"

    def reset(self) -> int | None:
        """Gives back what is free, starts the peak anew, and returns what is in use."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            return torch.cuda.memory_allocated(self.device)
        trim_heap()
        try:
            CLEAR_REFS.write_text("5")  # what proc(5) gives to start the high-water mark anew
        except OSError:
            return None
        return read_status("VmRSS")

    def read_peak(self) -> int | None:
        if self.on_gpu:
            return torch.cuda.max_memory_allocated(self.device)
        return read_status("VmHWM")

    def find_available(self) -> int | None:
        """Of the whole device."""
        if self.on_gpu:
            return torch.cuda.mem_get_info(self.device)[1]
        try:
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, ValueError, OSError):
            return None


def read_status(name: str) -> int | None:
    """A size from /proc/self/status, in bytes."""
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")]
    return found[0] if found else None


def trim_heap() -> None:
    """Hands freed blocks back to the system, which glibc else keeps; elsewhere nothing."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        return


def count_bytes(tensors) -> int:
    """Of different tensors, each once."""
    return sum(t.numel() * t.dtype.itemsize for t in {id(t): t for t in tensors}.values())
