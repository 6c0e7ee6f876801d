"""Blocks whose weights wait in host memory, each block's in one buffer, so that one copy moves all.

The block's own tensors become views of that buffer; nothing is there twice. A copy of the buffer
on a device is seen through the same views.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import torch
from torch import nn

from ...messages import message
from ...text import format_bytes
from ..machine.memory import trim_heap
from ..machine.page_locks import PageLocks, allocate_pages

#: Bytes that a tensor's place is a multiple of, as torch's allocator for GPUs would give it
#: (c10/cuda/CUDACachingAllocator.h: 512), so that the fastest kernels take it.
ALIGNMENT = 512

Copies = dict[str, torch.Tensor]
"""Name inside the block -> the tensor on the device."""


@dataclass(frozen=True)
class Part:
    """Where one tensor is in the buffer."""

    tensor: torch.Tensor
    """The block's own: it is found by its identity, since names change when LoRAs are injected."""
    start: int
    num_bytes: int

    def view(self, buffer: torch.Tensor) -> torch.Tensor:
        """The same tensor in a copy of the buffer."""
        data = buffer[self.start : self.start + self.num_bytes]
        return data.view(self.tensor.dtype).view(self.tensor.shape)


class HostBlock:
    """The tensors that a block holds now, in one buffer.

    Attributes:
        buffer: uint8, whole pages.
    """

    def __init__(self, block: nn.Module):
        self.parts: dict[int, Part] = {}
        size = 0
        for _, tensor in list_tensors(block):
            num_bytes = tensor.numel() * tensor.dtype.itemsize
            self.parts[id(tensor)] = Part(tensor, size, num_bytes)
            size += -(-num_bytes // ALIGNMENT) * ALIGNMENT
        self.buffer = allocate_pages(size)
        for part in self.parts.values():
            view = part.view(self.buffer)
            view.copy_(part.tensor.detach())
            part.tensor.data = view

    def view(self, block: nn.Module, buffer: torch.Tensor) -> Copies:
        """The block's tensors in a copy of the buffer, by the names they have now."""
        return {
            name: self.parts[id(tensor)].view(buffer)
            for name, tensor in list_tensors(block)
            if id(tensor) in self.parts
        }


class HostBlocks:
    """All offloaded blocks; their pages are locked as long as this object lives.

    Attributes:
        num_bytes: of host memory that they take.
        num_locked: blocks that the GPU reads directly.
    """

    def __init__(self, device: torch.device, locks: PageLocks | None = None):
        self.device = device
        self.locks = locks or PageLocks(device)
        self.blocks: dict[nn.Module, HostBlock] = {}
        self.num_locked = 0
        finalizer = weakref.finalize(self, self.locks.release)
        finalizer.atexit = False  # CUDA may be torn down by then, its page locks with it

    def add(self, block: nn.Module) -> None:
        """Moves the tensors of a block on the CPU into a host buffer."""
        packed = self.blocks[block] = HostBlock(block)
        trim_heap()  # of the gaps that its tensors left, or they add up to the model's size
        if self.device.type == "cuda":
            self.num_locked += self.locks.lock(packed.buffer)

    def __getitem__(self, block: nn.Module) -> HostBlock:
        return self.blocks[block]

    @property
    def num_bytes(self) -> int:
        return sum(len(packed.buffer) for packed in self.blocks.values())

    @property
    def locked_bytes(self) -> int:
        """Which the system can give to nothing else."""
        return self.locks.locked_bytes

    def describe(self) -> str | None:
        """Problems, in one sentence."""
        if not self.locks.was_refused:
            return None
        return message(
            "of the {num_blocks} blocks offloaded to main memory ({num_bytes}) the system "
            "locks only {num_locked} ({locked_bytes}) for the GPU; the others are copied "
            "more slowly. Lower offload_blocks or use a smaller storage if steps take too "
            "long",
            num_blocks=len(self.blocks),
            num_bytes=format_bytes(self.num_bytes, 1024),
            num_locked=self.num_locked,
            locked_bytes=format_bytes(self.locked_bytes, 1024),
        )


def list_tensors(block: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    return chain(block.named_parameters(), block.named_buffers())
