"""Norm and rotation of q or k as one Triton kernel each way, for NVIDIA GPUs.

Written as PyTorch operations they move nine tensors of the stream's size forwards and as many
backwards, in eight kernels; here two and three, in one. All is computed in float32 and rounded
once. Imported only where Triton is available; `attention` decides when.

Legend: a row is one head of one token, WIDTH contiguous entries. `first` is the place of
the first token among all tokens, text before image.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

#: Rows of one program, 2,048 entries of a head of 128.
ROWS = 16
#: Values that change from sample to sample: one compiled kernel for all.
VARYING = ["num_rows", "num_heads", "num_tokens", "num_joint", "first", "eps"]


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
    """
    x = x.contiguous()
    options = describe(x, first, joint.shape[1], eps)
    with torch.cuda.device_of(x):
        _forward[count_programs(x)](x, weight, cos, sin, joint, *options, x.shape[-1], ROWS)


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
    x, grad = x.contiguous(), grad.contiguous()
    grad_x = torch.empty_like(x)
    options = describe(x, first, grad.shape[1], eps)
    with torch.cuda.device_of(x):
        _backward[count_programs(x)](grad, x, weight, cos, sin, grad_x, *options, x.shape[-1], ROWS)
    return grad_x


def count_programs(x: torch.Tensor) -> tuple[int]:
    return (triton.cdiv(x.numel() // x.shape[-1], ROWS),)


def describe(x: torch.Tensor, first: int, num_joint: int, eps: float) -> tuple:
    num_tokens, num_heads = x.shape[1:3]
    return x.numel() // x.shape[-1], num_heads, num_tokens, num_joint, first, eps


@triton.jit(do_not_specialize=VARYING)
def _forward(
    x_pointer,
    weight_pointer,
    cos_pointer,
    sin_pointer,
    joint_pointer,
    num_rows,
    num_heads,
    num_tokens,
    num_joint,
    first,
    eps,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)[None, :]
    is_row = (row < num_rows)[:, None]
    own, joint, token = _locate(row, column, num_heads, num_tokens, num_joint, first, WIDTH)
    x = tl.load(x_pointer + own, mask=is_row, other=0.0).to(tl.float32)
    weight = tl.load(weight_pointer + column).to(tl.float32)
    cos = tl.load(cos_pointer + token, mask=is_row, other=0.0).to(tl.float32)
    sin = tl.load(sin_pointer + token, mask=is_row, other=0.0).to(tl.float32)
    scaled = x * _inverse_rms(x, eps, WIDTH) * weight
    rotated = scaled * cos + _swap_pairs(scaled, ROWS, WIDTH) * sin
    tl.store(joint_pointer + joint, rotated.to(joint_pointer.dtype.element_ty), mask=is_row)


@triton.jit(do_not_specialize=VARYING)
def _backward(
    grad_pointer,
    x_pointer,
    weight_pointer,
    cos_pointer,
    sin_pointer,
    grad_x_pointer,
    num_rows,
    num_heads,
    num_tokens,
    num_joint,
    first,
    eps,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)[None, :]
    is_row = (row < num_rows)[:, None]
    own, joint, token = _locate(row, column, num_heads, num_tokens, num_joint, first, WIDTH)
    grad = tl.load(grad_pointer + joint, mask=is_row, other=0.0).to(tl.float32)
    x = tl.load(x_pointer + own, mask=is_row, other=0.0).to(tl.float32)
    weight = tl.load(weight_pointer + column).to(tl.float32)
    cos = tl.load(cos_pointer + token, mask=is_row, other=0.0).to(tl.float32)
    sin = tl.load(sin_pointer + token, mask=is_row, other=0.0).to(tl.float32)
    # By the negative angle, then through x / rms(x) with the rms a function of x.
    grad = (grad * cos - _swap_pairs(grad, ROWS, WIDTH) * sin) * weight
    inverse = _inverse_rms(x, eps, WIDTH)
    unit = x * inverse
    along = tl.sum(grad * unit, axis=1)[:, None] / WIDTH
    grad_x = inverse * (grad - unit * along)
    tl.store(grad_x_pointer + own, grad_x.to(grad_x_pointer.dtype.element_ty), mask=is_row)


@triton.jit
def _locate(row, column, num_heads, num_tokens, num_joint, first, WIDTH: tl.constexpr):
    """Offsets of a row's entries: among its own tokens, among all, and of its token's angles."""
    item = row // (num_tokens * num_heads)
    place = row % (num_tokens * num_heads)
    own = row[:, None].to(tl.int64) * WIDTH + column
    joint_row = (item * num_joint + first).to(tl.int64) * num_heads + place
    joint = joint_row[:, None] * WIDTH + column
    token = (first + place // num_heads)[:, None] * WIDTH + column
    return own, joint, token


@triton.jit
def _inverse_rms(x, eps, WIDTH: tl.constexpr):
    return tl.rsqrt(tl.sum(x * x, axis=1)[:, None] / WIDTH + eps)


@triton.jit
def _swap_pairs(x, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    even, odd = tl.split(tl.reshape(x, (ROWS, WIDTH // 2, 2)))
    return tl.reshape(tl.join(odd, even), (ROWS, WIDTH))
