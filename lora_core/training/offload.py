"""Blocks whose weights wait in host memory and are on the device only while they are used.

A block's weights are copied to the device right before it runs, in the forward pass and again when
gradient checkpointing runs it for the backward pass, and the copy is dropped once nobody needs it.
While one block computes, the next one's weights are on their way, on a stream of their own where
the device is a GPU: at most `MOST_BLOCKS` blocks' copies are alive at once. LoRAs, their gradients
and the optimizer stay on the device.

The weights themselves never move, so nothing is ever written back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from ..errors import ConfigError

#: The one in use, the one on its way, and on a GPU one whose last kernels are still running.
MOST_BLOCKS = 3

Copies = dict[str, torch.Tensor]
"""Name inside the block -> the tensor on the device."""


def choose_offloaded(num_blocks: int, num_offloaded: int) -> tuple[int, ...]:
    """Which blocks wait in host memory: spread evenly, so that each has time to arrive.

    Raises:
        ConfigError: more than there are.
    """
    if num_offloaded > num_blocks:
        raise ConfigError(
            f"offload_blocks is {num_offloaded}, but the model has {num_blocks} blocks; expected "
            f"0 to {num_blocks}"
        )
    return tuple(
        index
        for index in range(num_blocks)
        if (index + 1) * num_offloaded // num_blocks > index * num_offloaded // num_blocks
    )


class BlockOffload:
    """Runs the blocks of one model, some of them with copies of their weights.

    Made before LoRAs are injected: everything a block holds by then is its base, and waits in host
    memory; what comes later stays where it is.

    Attributes:
        num_moved: blocks copied to the device so far.
    """

    def __init__(self, blocks: nn.ModuleList, indices: Sequence[int], device: torch.device):
        self.blocks = blocks
        self.indices = tuple(sorted(indices))
        self.device = device
        self.num_moved = 0
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.waiting = {id(t) for index in self.indices for _, t in list_tensors(blocks[index])}
        self.arriving: tuple[int, Copies, Any] | None = None
        self.last = -1
        self.started: Any = None
        if self.stream is not None:
            for index in self.indices:
                pin(blocks[index])

    def run(self, index: int, *inputs: Any) -> Any:
        """What the block `index` gives, with its weights on the device."""
        block = self.blocks[index]
        if index not in self.indices:
            return block(*inputs)
        copies = self.take(index)
        following = self.find_next(index)
        self.last = index
        if following == index:  # it turns round here: the same block comes next
            self.arriving = (index, copies, None)
        elif following is not None:
            self.arriving = (following, *self.send(following))
        return functional_call(block, copies, inputs)

    def find_next(self, index: int) -> int | None:
        """The block that will be needed after this one: forwards, then backwards, then forwards."""
        place, end = self.indices.index(index), len(self.indices) - 1
        if not torch.is_grad_enabled():  # only ever forwards
            return self.indices[0 if place == end else place + 1]
        is_forward = index > self.last or (index == self.last and place == 0)
        if is_forward:
            return self.indices[min(place + 1, end)]
        return self.indices[max(place - 1, 0)]

    def take(self, index: int) -> Copies:
        """The copies, whether they were sent ahead or not."""
        arriving, self.arriving = self.arriving, None
        if arriving is None or arriving[0] != index:
            del arriving
            copies, event = self.send(index)
        else:
            _, copies, event = arriving
        if event is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(event)
            for tensor in copies.values():
                tensor.record_stream(stream)
        return copies

    def send(self, index: int) -> tuple[Copies, Any]:
        """Starts copying a block's weights; the event tells when they are there."""
        self.num_moved += 1
        tensors = [
            (name, tensor)
            for name, tensor in list_tensors(self.blocks[index])
            if id(tensor) in self.waiting
        ]
        if self.stream is None:
            return {name: self.copy(tensor) for name, tensor in tensors}, None
        # Not further ahead of the GPU than one block: copies in use cannot be freed for new ones.
        if self.started is not None:
            self.started.synchronize()
        self.started = torch.cuda.current_stream(self.device).record_event()
        with torch.cuda.stream(self.stream):
            copies = {name: self.copy(tensor) for name, tensor in tensors}
            return copies, self.stream.record_event()

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().to(self.device, non_blocking=True, copy=True)

    def release(self) -> None:
        """Forgets what was sent ahead."""
        self.arriving, self.last = None, -1


def list_tensors(block: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    return chain(block.named_parameters(), block.named_buffers())


def pin(block: nn.Module) -> None:
    """Into memory that a GPU can read by itself, one tensor after the other."""
    for _, tensor in list_tensors(block):
        tensor.data = tensor.data.pin_memory()
