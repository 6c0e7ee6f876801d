"""A limit on PyTorch's GPU memory where the driver sets none: on Windows, and under WSL.

There NVIDIA's driver silently moves memory of a full card to main memory: every step gets ten to
twenty times slower, and nothing signals that less should be kept. With a limit PyTorch raises its
out-of-memory error as on Linux, and its handlers (a step retried with less kept, sample images
decoded in tiles) take effect.

On Linux the driver itself refuses, and a limit would only deny the run what others release later.
So there is none.
"""

from __future__ import annotations

import platform
import sys

import torch

#: Besides PyTorch's own tensors: kernels loaded on first use, a desktop's windows.
SPARE = 2**28


def limit_memory(device: torch.device) -> None:
    """Limits this process to what is free on the GPU now, where the driver sets no limit."""
    if device.type != "cuda" or not is_overcommitting():
        return
    free, total = torch.cuda.mem_get_info(device)
    share = compute_share(free + torch.cuda.memory_reserved(device), total)
    index = torch.cuda.current_device() if device.index is None else device.index
    torch.cuda.set_per_process_memory_fraction(share, index)


def is_overcommitting() -> bool:
    """Whether this system's driver gives more memory than a card has."""
    return sys.platform == "win32" or "microsoft" in platform.release().lower()


def compute_share(free_bytes: int, total_bytes: int) -> float:
    """Of the whole GPU, what PyTorch may allocate."""
    return max(0, free_bytes - SPARE) / total_bytes
