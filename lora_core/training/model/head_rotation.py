"""Between the products of q and k and the attention: each head is normalised and rotated.

One autograd function, which keeps q and k as they left their products and nothing else of their
size. On NVIDIA GPUs one Triton kernel each way computes it (`rotation_kernel`), elsewhere a few of
PyTorch's operations. ComfyUI computes the same by `rms_norm` and a rotation
(comfy/ldm/qwen_image/model.py, comfy/rmsnorm.py).
"""

from __future__ import annotations

import logging
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn import functional

from .rope import Rotation, rotate, swap_pairs

logger = logging.getLogger(__name__)

#: Lowest compute capability with bfloat16.
SUPPORTED = (8, 0)
#: Of the kernels' results from those of PyTorch's operations, relative; bfloat16 gives 4e-3.
ROUNDING = 2e-2


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
    if torch.compiler.is_compiling():  # which fuses it into one kernel
        parts = normalize(text, text_weight, eps), normalize(image, image_weight, eps)
        return rotate(torch.cat(parts, dim=1), rotation)
    return NormalizedRotation.apply(text, image, text_weight, image_weight, *rotation, eps)


class NormalizedRotation(torch.autograd.Function):
    """`normalize_and_rotate`, which saves only its inputs; weights get no gradient."""

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
        # Saved-tensor hooks need not see what every block and step shares.
        ctx.rest = cos, sin, eps
        ctx.save_for_backward(text, image, text_weight, image_weight)
        num_tokens = text.shape[1] + image.shape[1]
        joint = image.new_empty(len(image), num_tokens, *image.shape[2:])
        write_rotated = choose_steps(image).write_rotated
        write_rotated(text, text_weight, cos, sin, 0, eps, joint)
        write_rotated(image, image_weight, cos, sin, text.shape[1], eps, joint)
        return joint

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        text, image, text_weight, image_weight = ctx.saved_tensors
        *angles, eps = ctx.rest
        needs_text, needs_image = ctx.needs_input_grad[:2]
        compute_gradient = choose_steps(image).compute_gradient
        grad_text = grad_image = None
        if needs_text:
            grad_text = compute_gradient(grad, text, text_weight, *angles, 0, eps)
        if needs_image:
            first = text.shape[1]
            grad_image = compute_gradient(grad, image, image_weight, *angles, first, eps)
        return grad_text, grad_image, None, None, None, None, None


def write_rotated(
    x: torch.Tensor,
    weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    first: int,
    eps: float,
    joint: torch.Tensor,
) -> None:
    """Writes x (B, n, heads, head width), normalised and rotated, into (B, all tokens, …).

    Args:
        cos, sin: of all tokens, (tokens, head width); see `rope.compute_rotation`.
        first: place of the first token among all.
    """
    place = slice(first, first + x.shape[1])
    x = normalize(x, weight, eps)
    out = torch.mul(x, cos[place, None], out=joint[:, place])
    out.addcmul_(swap_pairs(x), sin[place, None])


def compute_gradient(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    first: int,
    eps: float,
) -> torch.Tensor:
    """Of x, from the gradient of all tokens."""
    place = slice(first, first + x.shape[1])
    grad = grad[:, place]
    turned_back = grad * cos[place, None]  # by the negative angle
    turned_back.addcmul_(swap_pairs(grad), sin[place, None], value=-1)
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        normalized = normalize(leaf, weight.detach(), eps)
    return torch.autograd.grad(normalized, leaf, turned_back)[0]


OPERATIONS = SimpleNamespace(write_rotated=write_rotated, compute_gradient=compute_gradient)


def choose_steps(x: torch.Tensor) -> Any:
    """What has `write_rotated` and `compute_gradient` for tensors like q: kernels or operations."""
    width = x.shape[-1]
    # A fake tensor has no memory that a kernel could read.
    if x.device.type != "cuda" or type(x) is not torch.Tensor or width & (width - 1):
        return OPERATIONS
    return find_kernels(x.device) or OPERATIONS


@lru_cache(maxsize=16)
def find_kernels(device: torch.device) -> Any:
    """The Triton kernels, once verified on this device; None where they fail.

    Triton has no official build for Windows, and needs a C compiler on its first run.
    """
    if torch.version.hip or torch.cuda.get_device_capability(device) < SUPPORTED:
        return None
    try:
        from . import rotation_kernel

        with torch.inference_mode(False):
            error = compare_kernels(rotation_kernel, device)
    except Exception as e:  # noqa: BLE001 - Triton raises what its compilers raise
        logger.info("norm and rotation without Triton's kernels: %s: %s", type(e).__name__, e)
        return None
    if not error < ROUNDING:
        logger.warning("norm and rotation without Triton's kernels: off by %g here", error)
        return None
    return rotation_kernel


def compare_kernels(kernels: Any, device: torch.device) -> float:
    """How far they are from PyTorch's operations, relative, in bfloat16."""

    def draw(*shape: int) -> torch.Tensor:  # without random numbers
        count = torch.arange(torch.Size(shape).numel(), device=device, dtype=torch.float32)
        return (1.7 * count).sin().reshape(shape).bfloat16()

    x, weight, grad = draw(2, 5, 3, 128), draw(128), draw(2, 9, 3, 128)
    angles = draw(9, 64).float()
    cos = angles.cos().repeat_interleave(2, dim=1).bfloat16()
    sin = torch.stack([-angles.sin(), angles.sin()], dim=-1).flatten(1).bfloat16()
    found = []
    for steps in (kernels, OPERATIONS):
        joint = torch.zeros_like(grad)
        steps.write_rotated(x, weight, cos, sin, 4, 1e-6, joint)
        grad_x = steps.compute_gradient(grad, x, weight, cos, sin, 4, 1e-6)
        found.append(torch.cat([joint.flatten(), grad_x.flatten()]).float())
    return ((found[0] - found[1]).norm() / found[1].norm()).item()
