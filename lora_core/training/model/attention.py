"""The joint attention of text and image: which kernel computes it, and what is kept of it."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch.nn import functional

Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""q, k and v, (B, T + L, heads, head width)."""

#: Versions of cuDNN and generations of GPUs with which PyTorch itself prefers it to flash attention
#: (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp, `check_prefer_cudnn_attention`).
FAST_CUDNN = 91500
FAST_CUDNN_GENERATIONS = (9, 10)


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """(B, tokens, width) of heads (B, tokens, heads, head width)."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    joint = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return joint.transpose(1, 2).flatten(2)


def attend_keeping_result(
    prepare: Callable[..., Heads], parts: Sequence[torch.Tensor], mask: torch.Tensor | None
) -> torch.Tensor:
    """`attend(*prepare(*parts), mask)`, of which the backward pass keeps parts and result.

    q, k and v are recomputed there; the attention, by far the most expensive, is not.
    """
    heads = prepare(*parts)
    if not torch.is_grad_enabled():
        return attend(*heads, mask)
    again = PreparedAgain(prepare, [part.detach() for part in parts], heads)
    with torch.autograd.graph.saved_tensors_hooks(again.pack, again.unpack):
        joint = attend(*heads, mask)
    again.heads = None
    return joint


class PreparedAgain:
    """What an attention saves, without its q, k and v.

    Attributes:
        heads: q, k and v, which are recognised by their storage; None once all is saved.
    """

    def __init__(
        self, prepare: Callable[..., Heads], parts: list[torch.Tensor], heads: Heads | None
    ):
        self.prepare = prepare
        self.parts = parts
        self.heads = heads
        self.packed: set[int] = set()
        self.ready: dict[int, torch.Tensor] = {}

    def pack(self, tensor: torch.Tensor) -> tuple[int, torch.Size, tuple[int, ...]] | torch.Tensor:
        for index, head in enumerate(self.heads or ()):
            if is_view(tensor, head):
                self.packed.add(index)
                return index, tensor.shape, tensor.stride()
        return tensor.detach()  # the result itself would make a reference cycle

    def unpack(
        self, packed: tuple[int, torch.Size, tuple[int, ...]] | torch.Tensor
    ) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        index, shape, stride = packed
        if index not in self.ready:
            with torch.no_grad():
                heads = self.prepare(*self.parts)
            self.ready = {number: heads[number] for number in self.packed}
        return self.ready.pop(index).as_strided(shape, stride)


def is_view(tensor: torch.Tensor, head: torch.Tensor) -> bool:
    """Whether it shows all of the head's memory, in its type."""
    return (
        tensor.untyped_storage()._cdata == head.untyped_storage()._cdata
        and tensor.dtype == head.dtype
        and tensor.numel() == head.numel()
    )


def choose_kernels(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Sets the order in which PyTorch tries its kernels for attention on this device.

    Must wrap compiled code: there the kernel is chosen when the graph is built.
    """
    if device.type != "cuda":
        return contextlib.nullcontext()
    order = order_kernels(device, torch.are_deterministic_algorithms_enabled())
    if not order:
        return contextlib.nullcontext()
    from torch.nn.attention import sdpa_kernel

    return sdpa_kernel(list(order), set_priority=True)


@lru_cache(maxsize=64)
def order_kernels(device: torch.device, is_deterministic: bool) -> tuple[Any, ...]:
    """Fastest first; none where the choice is best left to PyTorch.

    Flash attention refuses masks (padded captions), and Windows' builds of PyTorch lack it; cuDNN's
    kernel is then about twice as fast as the memory-efficient one, which PyTorch would take. On
    data centre GPUs from Hopper on cuDNN's is the fastest of all.

    Where deterministic algorithms are requested: flash, whose backward pass has such a mode, or the
    memory-efficient one; cuDNN's has none.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if not torch.cuda.is_available():  # a fake GPU
        return ()
    if torch.version.hip or "set_priority" not in inspect.signature(sdpa_kernel).parameters:
        return ()
    flash, cudnn = SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION
    rest = SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH
    if is_deterministic:
        return flash, *rest
    generation, _ = torch.cuda.get_device_capability(device)
    is_fast = (torch.backends.cudnn.version() or 0) > FAST_CUDNN
    if is_fast and generation in FAST_CUDNN_GENERATIONS:
        return cudnn, flash, *rest
    return flash, cudnn, *rest
