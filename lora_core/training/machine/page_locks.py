"""Host memory that a GPU reads directly: our own pages, locked in place.

torch's allocator of pinned memory rounds each request up to a power of two and never releases it; a
block's 340 MB of fp8 would take 512. ComfyUI locks its own pages as well (comfy/pinned_memory.py).
"""

from __future__ import annotations

import mmap
from collections.abc import Callable

import torch

#: cudaHostRegisterPortable: for every context of the process.
PORTABLE = 1

Register = Callable[[int, int, torch.device], bool]
"""(address, bytes, device) -> whether the system has locked them."""
Unregister = Callable[[int, torch.device], None]


class PageLocks:
    """Locks pages until the system refuses once: then it would refuse the next as well.

    Attributes:
        locked_bytes: of all that are locked now.
        was_refused: whether some are not.
    """

    def __init__(
        self,
        device: torch.device,
        register: Register | None = None,
        unregister: Unregister | None = None,
    ):
        self.device = device
        self.register = register or register_pages
        self.unregister = unregister or unregister_pages
        self.addresses: list[int] = []
        self.locked_bytes = 0
        self.was_refused = False

    def lock(self, pages: torch.Tensor) -> bool:
        """Whether these are locked; they must live until `release`."""
        address, size = pages.data_ptr(), len(pages)
        if self.was_refused or not self.register(address, size, self.device):
            self.was_refused = True
            return False
        self.addresses.append(address)
        self.locked_bytes += size
        return True

    def release(self) -> None:
        """Unlocks all, once no copy out of them is in progress."""
        if self.addresses and torch.cuda.is_initialized():
            torch.cuda.synchronize(self.device)
        while self.addresses:
            self.unregister(self.addresses.pop(), self.device)
        self.locked_bytes = 0


def allocate_pages(num_bytes: int) -> torch.Tensor:
    """uint8, uninitialised: whole pages that hold nothing else."""
    size = -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = torch.empty(size + mmap.PAGESIZE, dtype=torch.uint8)
    start = -memory.data_ptr() % mmap.PAGESIZE
    return memory[start : start + size]


def register_pages(address: int, num_bytes: int, device: torch.device) -> bool:
    """False where the system refuses: Windows gives about half of the memory, WSL2 less."""
    try:
        with torch.cuda.device(device):
            status = torch.cuda.cudart().cudaHostRegister(address, num_bytes, PORTABLE)
            if int(status) == 0:
                return True
            forget_error(device)
    except (RuntimeError, AssertionError, AttributeError):  # no driver, no CUDA, no such function
        pass
    return False


def forget_error(device: torch.device) -> None:
    """Clears a refusal from CUDA's last error, which the next kernel would report."""
    try:
        torch.zeros(1, device=device).add_(1)
    except RuntimeError:
        return


def unregister_pages(address: int, device: torch.device) -> None:
    with torch.cuda.device(device):
        torch.cuda.cudart().cudaHostUnregister(address)
