"""The joint attention of text and image: norms, rotation, and the kernel that multiplies.

Between the products of q and k and the attention itself a token is normalised and rotated, head by
head. That is one step of autograd here: its backward pass computes again what it needs from q and k
as they left their products, so that nothing else of their size is kept. ComfyUI computes the same
by `rms_norm` and a rotation (comfy/ldm/qwen_image/model.py, comfy/rmsnorm.py).
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch.nn import functional

from .rope import Rotation, rotate, swap_pairs

Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""q, k and v, (B, T + L, heads, head width)."""

#: Versions of cuDNN and generations of GPUs with which PyTorch itself prefers it to flash attention
#: (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp, `check_prefer_cudnn_attention`).
FAST_CUDNN = 91500
FAST_CUDNN_GENERATIONS = (9, 10)


def normalize(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / rms(x) * weight over the last entries, in the type of x as ComfyUI does."""
    return functional.rms_norm(x, weight.shape, weight.to(x.dtype), eps)


def normalize_and_rotate(
    text: torch.Tensor,
    image: torch.Tensor,
    text_weight: torch.Tensor,
    image_weight: torch.Tensor,
    rotation: Rotation,
    eps: float,
) -> torch.Tensor:
    """q or k of all tokens, (B, T + L, heads, head width), of (B, T, …) and (B, L, …)."""
    if torch.compiler.is_compiling():  # which writes one kernel of it
        parts = normalize(text, text_weight, eps), normalize(image, image_weight, eps)
        return rotate(torch.cat(parts, dim=1), rotation)
    return NormalizedRotation.apply(text, image, text_weight, image_weight, *rotation, eps)


class NormalizedRotation(torch.autograd.Function):
    """`normalize_and_rotate`, which keeps its inputs alone; weights get no gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        text: torch.Tensor,
        image: torch.Tensor,
        text_weight: torch.Tensor,
        image_weight: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        eps: float,
    ) -> torch.Tensor:
        ctx.eps = eps
        ctx.save_for_backward(text, image, text_weight, image_weight, cos, sin)
        num_text_tokens = text.shape[1]
        joint = image.new_empty(len(image), num_text_tokens + image.shape[1], *image.shape[2:])
        places = split_tokens(joint, num_text_tokens)
        parts = zip((text, image), (text_weight, image_weight), places, strict=True)
        rotations = split_rotation(cos, sin, num_text_tokens)
        for (x, weight, place), rotation in zip(parts, rotations, strict=True):
            write_rotated(normalize(x, weight, eps), *rotation, place)
        return joint

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor):
        text, image, text_weight, image_weight, cos, sin = ctx.saved_tensors
        grads = split_tokens(grad, text.shape[1])
        rotations = split_rotation(cos, sin, text.shape[1])
        found: list[torch.Tensor | None] = []
        for index, (x, weight) in enumerate([(text, text_weight), (image, image_weight)]):
            if not ctx.needs_input_grad[index]:
                found.append(None)
                continue
            one_cos, one_sin = rotations[index]
            turned_back = torch.empty_like(x)
            write_rotated(grads[index], one_cos, -one_sin, turned_back)
            with torch.enable_grad():
                leaf = x.detach().requires_grad_()
                normalized = normalize(leaf, weight.detach(), ctx.eps)
            found += torch.autograd.grad(normalized, leaf, turned_back)
        return *found, None, None, None, None, None


def write_rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor) -> None:
    torch.mul(x, cos, out=out).addcmul_(swap_pairs(x), sin)


def split_tokens(x: torch.Tensor, num_text_tokens: int) -> tuple[torch.Tensor, ...]:
    return x.split((num_text_tokens, x.shape[1] - num_text_tokens), dim=1)


def split_rotation(
    cos: torch.Tensor, sin: torch.Tensor, num_text_tokens: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of the text and of the image, with an axis for the heads."""
    return [
        (cos[place, None], sin[place, None])
        for place in (slice(num_text_tokens), slice(num_text_tokens, None))
    ]


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None):
    """(B, tokens, width) of heads (B, tokens, heads, head width)."""
    heads = [x.transpose(1, 2) for x in (query, key, value)]
    joint = functional.scaled_dot_product_attention(*heads, attn_mask=mask)
    return joint.transpose(1, 2).flatten(2)


def attend_keeping_result(
    prepare: Callable[..., Heads], parts: Sequence[torch.Tensor], mask: torch.Tensor | None
) -> torch.Tensor:
    """`attend(*prepare(*parts), mask)`, of which the backward pass keeps parts and result.

    q, k and v are prepared again there; the attention, by far the most expensive, is not.
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
        heads: q, k and v, which are recognised by the memory they lie in; None once all is saved.
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
        return tensor

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

    Comes around what is compiled: there the kernel is chosen when the graph is made.
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

    Where deterministic algorithms are asked for: flash, whose backward pass has such a mode, or the
    memory-efficient one; cuDNN's has none.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if torch.version.hip or "set_priority" not in inspect.signature(sdpa_kernel).parameters:
        return ()
    flash, cudnn = SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION
    rest = SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH
    if is_deterministic:
        return flash, *rest
    if not torch.cuda.is_available():  # a make-believe one
        return flash, cudnn, *rest
    generation, _ = torch.cuda.get_device_capability(device)
    is_fast = (torch.backends.cudnn.version() or 0) > FAST_CUDNN
    if is_fast and generation in FAST_CUDNN_GENERATIONS:
        return cudnn, flash, *rest
    return flash, cudnn, *rest
