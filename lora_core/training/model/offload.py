"""Blocks whose weights stay in host memory and are on the device only while they are used.

A block's weights are copied to the device right before it runs, all in one piece (`host_blocks`):
in the forward pass, and again when gradient checkpointing runs it for the backward pass. The copy
is dropped once it is no longer needed; torch's allocator then reuses its memory for the next.

While one block computes, the next one's weights are being copied, on a separate stream where the
device is a GPU: at most `MAX_COPIED_BLOCKS` blocks' copies are alive at once. LoRAs, their
gradients and the optimizer stay on the device.

The weights themselves never move, so nothing is ever written back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from ...errors import ConfigError
from .host_blocks import Copies, HostBlocks

#: The one in use, the one being copied, and on a GPU one whose last kernels are still running.
MAX_COPIED_BLOCKS = 3


@dataclass(frozen=True)
class Shipment:
    """A block's weights being copied to the device."""

    buffer: torch.Tensor
    copies: Copies
    """Views of the buffer."""
    event: Any
    """When they are there; None where they are already."""


def choose_offloaded(num_blocks: int, num_offloaded: int) -> tuple[int, ...]:
    """Which blocks wait in host memory: spread evenly, so that each has time to arrive.

    Raises:
        ConfigError: more than there are.
    """
    if num_offloaded > num_blocks:
        raise ConfigError(
            "offload_blocks is {num_offloaded}, but the model has {num_blocks} blocks; expected "
            "0 to {num_blocks}",
            num_offloaded=num_offloaded,
            num_blocks=num_blocks,
        )
    return tuple(
        index
        for index in range(num_blocks)
        if (index + 1) * num_offloaded // num_blocks > index * num_offloaded // num_blocks
    )


class BlockOffload:
    """Runs the blocks of one model, some of them with copies of their weights.

    Made before LoRAs are injected: everything a block holds by then is its base, and stays in host
    memory; what is added later stays where it is.

    Args:
        host: what holds the blocks' weights, if it exists already.

    Attributes:
        num_moved: blocks copied to the device so far.
    """

    def __init__(
        self,
        blocks: nn.ModuleList,
        indices: Sequence[int],
        device: torch.device,
        host: HostBlocks | None = None,
    ):
        self.blocks = blocks
        self.indices = tuple(sorted(indices))
        self.device = device
        self.num_moved = 0
        if host is None:
            host = HostBlocks(device)
            for index in self.indices:
                host.add(blocks[index])
        self.host = host
        # A fake device has no streams.
        has_streams = device.type == "cuda" and torch.cuda.is_available()
        self.stream = torch.cuda.Stream(device) if has_streams else None
        self.arriving: tuple[int, Shipment] | None = None
        self.last = -1
        self.started: Any = None

    def run(self, index: int, *inputs: Any) -> Any:
        """What the block `index` gives, with its weights on the device."""
        block = self.blocks[index]
        if index not in self.indices:
            return block(*inputs)
        shipment = self.take(index)
        following = self.find_next(index)
        self.last = index
        if following == index:  # it turns round here: the same block comes next
            self.arriving = (index, replace(shipment, event=None))
        elif following is not None:
            self.arriving = (following, self.send(following))
        return functional_call(block, shipment.copies, inputs)

    def find_next(self, index: int) -> int | None:
        """The block that will be needed after this one: forwards, then backwards, then forwards."""
        place, end = self.indices.index(index), len(self.indices) - 1
        if not torch.is_grad_enabled():  # only ever forwards
            return self.indices[0 if place == end else place + 1]
        is_forward = index > self.last or (index == self.last and place == 0)
        if is_forward:
            return self.indices[min(place + 1, end)]
        return self.indices[max(place - 1, 0)]

    def take(self, index: int) -> Shipment:
        """The weights, whether they were sent ahead or not."""
        arriving, self.arriving = self.arriving, None
        if arriving is None or arriving[0] != index:
            del arriving
            shipment = self.send(index)
        else:
            shipment = arriving[1]
        if shipment.event is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(shipment.event)
            shipment.buffer.record_stream(stream)
        return shipment

    def send(self, index: int) -> Shipment:
        """Starts copying a block's weights."""
        self.num_moved += 1
        block = self.blocks[index]
        packed = self.host[block]
        if self.stream is None:
            buffer = self.copy(packed.buffer)
            return Shipment(buffer, packed.view(block, buffer), None)
        # At most one block ahead of the GPU: copies in use cannot be freed for new ones.
        if self.started is not None:
            self.started.synchronize()
        self.started = torch.cuda.current_stream(self.device).record_event()
        with torch.cuda.stream(self.stream):
            buffer = self.copy(packed.buffer)
            event = self.stream.record_event()
        return Shipment(buffer, packed.view(block, buffer), event)

    def copy(self, buffer: torch.Tensor) -> torch.Tensor:
        return buffer.to(self.device, non_blocking=True, copy=True)

    def release(self) -> None:
        """Forgets what was sent ahead."""
        self.arriving, self.last = None, -1
