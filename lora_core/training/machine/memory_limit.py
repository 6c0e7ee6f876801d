"""An end to what PyTorch takes of a GPU where the driver sets none: on Windows, and under WSL.

There NVIDIA's driver answers a full card by moving memory to the computer's own, and says nothing:
every step gets ten to twenty times slower, and nobody learns that less should be kept. With a limit
PyTorch raises its out-of-memory error as on Linux, and who waits for it (a step taken again with
less kept, sample images decoded in tiles) does what it is there for.

On Linux the driver refuses by itself, and a limit would only keep what others give back later from
the run. So there is none.
"""

from __future__ import annotations

import platform
import sys

import torch

#: Beside PyTorch's own tensors: kernels that are loaded on their first use, a desktop's windows.
SPARE = 2**28


def limit_memory(device: torch.device) -> None:
    """Lets this process have what is free on the GPU now, where its driver would go on."""
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
