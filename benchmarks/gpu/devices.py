"""Clocks and memory of a GPU, or of the CPU in a dry run."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def free(device: str) -> None:
    """Frees unreferenced memory."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def time_calls(function: Callable[[], object], device: str, calls: int = 10) -> float:
    """Median seconds per call, after a warm-up call."""
    function()
    synchronize(device)
    seconds = []
    for _ in range(calls):
        if device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            function()
            end.record()
            end.synchronize()
            seconds.append(begin.elapsed_time(end) / 1e3)
        else:
            started = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def take_time(function: Callable[[], object], device: str) -> float:
    """Wall-clock seconds, with the device idle before and after."""
    synchronize(device)
    started = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - started


class Peak:
    """Peak memory since it was created: of torch's allocator, or of the process."""

    def __init__(self, device: str):
        self.device = device
        free(device)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            reset_host_peak()

    def read(self) -> tuple[int, int]:
        """Bytes allocated and reserved; on a CPU the resident size, twice."""
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        return (read_host_memory("VmHWM"),) * 2


def reset_host_peak() -> None:
    """Resets the process's high-water mark, if the system supports it."""
    if CLEAR_REFS.exists():
        CLEAR_REFS.write_text("5")


def read_host_memory(name: str) -> int:
    """VmRSS, VmHWM, RssAnon or RssFile of this process in bytes; 0 if the system has none."""
    if not STATUS.exists():
        return 0
    lines = STATUS.read_text().splitlines()
    return next((int(li.split()[1]) * 1024 for li in lines if li.startswith(f"{name}:")), 0)


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Blocks other measuring processes with a file lock; does nothing without fcntl."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
