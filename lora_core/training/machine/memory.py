"""Memory in use on a device: torch's allocator on a GPU, the process's resident set on a CPU."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterable
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")

#: Libraries' out-of-memory messages, in lower case. Few have a dedicated exception.
OUT_OF_MEMORY = (
    "out of memory",  # torch's allocator, CUDA, HIP, NCCL ("Cuda failure 2 'out of memory'")
    "can't allocate",  # torch's allocator of a CPU
    "cublas_status_alloc_failed",
    "cublas_status_not_initialized",  # its handle is made at the first product, in no memory left
    "cudnn_status_alloc_failed",
    "cudnn_status_internal_error_device_allocation_failed",  # the same from version 9 on
    "cudnn_status_internal_error_host_allocation_failed",
    "cusolver_status_alloc_failed",
    "hipblas_status_alloc_failed",
    "hipblas_status_not_initialized",
    "rocblas_status_memory_error",
    "miopenstatusallocfailed",
    "cudaerrormemoryallocation",
    "hiperroroutofmemory",
    "failed to cuda malloc",  # NCCL
    "failed to cuda calloc",
    "failed to cuda host alloc",
)


class MemoryMeter:
    """Bytes in use now, and the peak since `reset`; None where the system does not report it.

    The peak of a process's resident set is known on Linux only.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.on_gpu = device.type == "cuda"

    def reset(self) -> int | None:
        """Releases free memory, resets the peak, and returns what is in use."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            return torch.cuda.memory_allocated(self.device)
        trim_heap()
        try:
            CLEAR_REFS.write_text("5")  # per proc(5), resets the high-water mark
        except OSError:
            return None
        return read_resident_size()

    def read_peak(self) -> int | None:
        if self.on_gpu:
            return torch.cuda.max_memory_allocated(self.device)
        return read_resident_peak()

    def read_gap(self) -> int:
        """Peak bytes that a GPU's allocator reserves beyond what tensors take."""
        if not self.on_gpu:
            return 0
        held = torch.cuda.max_memory_reserved(self.device)
        return max(0, held - torch.cuda.max_memory_allocated(self.device))

    def find_available(self) -> int | None:
        """What a run in place of this process could take: free memory, and what this process holds.

        On a GPU a run's process opens a context and loads kernels, as this one has; `mem_get_info`
        has already subtracted those, ComfyUI's own context, and a desktop.
        """
        if self.on_gpu:
            unused = torch.cuda.mem_get_info(self.device)[0]
            return unused + torch.cuda.memory_reserved(self.device)
        free, own = find_free_host_memory(), read_resident_size()
        return None if free is None or own is None else free + own

    def find_free(self) -> int | None:
        """What could still be taken; on a CPU without pushing anything else out."""
        if not self.on_gpu:
            return find_free_host_memory()
        unused = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return torch.cuda.mem_get_info(self.device)[0] + unused


def find_free_host_memory() -> int | None:
    """Bytes of main memory that can be taken without pushing anything else out."""
    import psutil

    try:
        return psutil.virtual_memory().available
    except (OSError, psutil.Error):
        return None


def read_resident_size() -> int | None:
    """Bytes of main memory that this process takes."""
    import psutil

    try:
        return psutil.Process().memory_info().rss
    except (OSError, psutil.Error):
        return None


def read_resident_peak() -> int | None:
    """The most it took since CLEAR_REFS was written, which psutil has no name for."""
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


def trim_heap() -> None:
    """Returns freed blocks, which glibc keeps, to the system; a no-op elsewhere."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        return


def is_out_of_memory(error: BaseException) -> bool:
    """Also for libraries that raise a RuntimeError of their own, such as torch.AcceleratorError."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and names_out_of_memory(str(error)))
    )


def names_out_of_memory(text: str) -> bool:
    """Whether a library's message, or a line of another process's log, matches OUT_OF_MEMORY."""
    text = text.lower()
    return any(words in text for words in OUT_OF_MEMORY)


def count_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Of different tensors, each once."""
    return sum(t.numel() * t.dtype.itemsize for t in {id(t): t for t in tensors}.values())
