"""The functions of autograd behind `lora_products`: products by frozen weights and LoRAs of one x.

Every gradient of x's size after the first is added into the first by `addmm_`; weights that are
kept in few bits are dequantised once for the forward and once for the backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from .frozen_linear import Decode


class Part(NamedTuple):
    """What `FrozenProducts` needs of one Linear besides its tensors."""

    decode: Decode
    num_codes: int
    columns: tuple[int, int] | None
    """Of the down-products, those of this Linear's LoRA; None where it has none."""
    scale: float


Piece = tuple[Part, torch.Tensor | None, torch.Tensor | None, Sequence[torch.Tensor]]
"""Of one Linear, with its bias, its LoRA's up (out, rank) and its codes."""


class DownProducts(torch.autograd.Function):
    """x unchanged, and x @ down^T.

    The second result's gradient is added to the first's.

    Args:
        is_ours: only `FrozenProducts` reads the first result, so that no other code holds its
            gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, down: torch.Tensor, is_ours: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.set_materialize_grads(False)
        down = down.to(x.dtype)
        ctx.save_for_backward(x, down)
        # A compiled backward pass must not write into its inputs.
        ctx.is_ours = is_ours and not torch.compiler.is_compiling()
        return x.view_as(x), functional.linear(x, down)

    @staticmethod
    def backward(
        ctx: Any, grad: torch.Tensor | None, grad_hidden: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        if grad_hidden is None:
            return grad, None, None
        x, down = ctx.saved_tensors
        rows = to_rows(grad_hidden)
        grad_down = rows.T @ to_rows(x)
        if grad is None:
            total = rows @ down
        elif ctx.is_ours:
            total = to_rows(grad).addmm_(rows, down)
        else:
            total = torch.addmm(to_rows(grad), rows, down)
        return total.view(x.shape), grad_down, None


class FrozenProducts(torch.autograd.Function):
    """For every Linear x @ weight^T + bias, and scale * hidden @ up^T where it has a LoRA.

    Gradients for x, hidden and the ups; nothing of x's size is kept for them.

    Args:
        x: (..., in).
        hidden: (..., k), all LoRAs' down-products concatenated, or None.
        parts: of every Linear.
        tensors: of every Linear its bias or None, its LoRA's up (out, rank) or None, its codes.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        hidden: torch.Tensor | None,
        parts: tuple[Part, ...],
        *tensors: torch.Tensor | None,
    ) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.parts, ctx.shape = parts, x.shape
        pieces = split_by_part(parts, tensors, x.dtype)
        outs = multiply(to_rows(x), None if hidden is None else to_rows(hidden), pieces)
        ctx.save_for_backward(hidden, *list_kept(pieces))
        return shape_like(x, outs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        hidden, *tensors = ctx.saved_tensors
        needs_x, needs_hidden = ctx.needs_input_grad[:2]
        pieces = split_by_part(ctx.parts, tensors)
        rows = None if hidden is None else to_rows(hidden)
        grad_x, grad_rows, grad_tensors = multiply_back(grads, rows, pieces, needs_x)
        if grad_x is not None:
            grad_x = grad_x.view(ctx.shape)
        if grad_rows is None or not needs_hidden:
            return grad_x, None, None, *grad_tensors
        return grad_x, grad_rows.view(hidden.shape), None, *grad_tensors


class WholeProducts(torch.autograd.Function):
    """`DownProducts` and `FrozenProducts` in one, where nothing is recomputed separately."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        down: torch.Tensor,
        parts: tuple[Part, ...],
        *tensors: torch.Tensor | None,
    ) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.parts = parts
        pieces = split_by_part(parts, tensors, x.dtype)
        rows, down = to_rows(x), down.to(x.dtype)
        hidden = functional.linear(rows, down)
        outs = multiply(rows, hidden, pieces)
        ctx.save_for_backward(x, down, hidden, *list_kept(pieces))
        return shape_like(x, outs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        x, down, hidden, *tensors = ctx.saved_tensors
        pieces = split_by_part(ctx.parts, tensors)
        grad_x, grad_hidden, grad_tensors = multiply_back(grads, hidden, pieces, True)
        if grad_x is None or grad_hidden is None:  # no result was used
            return None, None, None, *grad_tensors
        grad_down = grad_hidden.T @ to_rows(x)
        return grad_x.addmm_(grad_hidden, down).view(x.shape), grad_down, None, *grad_tensors


def multiply(
    rows: torch.Tensor, hidden: torch.Tensor | None, pieces: Sequence[Piece]
) -> list[torch.Tensor]:
    """(tokens, out) of every Linear."""
    outs = []
    for part, bias, up, codes in pieces:
        out = functional.linear(rows, part.decode(rows.dtype, *codes), bias)
        if part.columns is not None and hidden is not None and up is not None:
            start, stop = part.columns
            out.addmm_(hidden[:, start:stop], up.T, alpha=part.scale)
        outs.append(out)
    return outs


def multiply_back(
    grads: Sequence[torch.Tensor | None],
    hidden: torch.Tensor | None,
    pieces: Sequence[Piece],
    needs_x: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None, list[torch.Tensor | None]]:
    """Gradients of `multiply`'s rows, of its down-products, and of every Linear's tensors."""
    grad_x = None
    grad_hidden: list[torch.Tensor] = []
    grad_tensors: list[torch.Tensor | None] = []
    for (part, _, up, codes), grad in zip(pieces, grads, strict=True):
        rows = None if grad is None else to_rows(grad)
        if needs_x and rows is not None:
            weight = part.decode(rows.dtype, *codes)
            grad_x = rows @ weight if grad_x is None else grad_x.addmm_(rows, weight)
        grad_up = None
        if part.columns is not None and hidden is not None and up is not None:
            start, stop = part.columns
            down = hidden[:, start:stop]
            if rows is None:
                grad_hidden.append(torch.zeros_like(down))
            else:
                grad_up = (rows.T @ down).mul_(part.scale)
                grad_hidden.append((rows @ up).mul_(part.scale))
        grad_tensors += [None, grad_up, *[None] * len(codes)]
    if len(grad_hidden) < 2:
        return grad_x, next(iter(grad_hidden), None), grad_tensors
    return grad_x, torch.cat(grad_hidden, dim=1), grad_tensors


def split_by_part(
    parts: Sequence[Part],
    tensors: Sequence[Any],
    dtype: torch.dtype | None = None,
) -> list[Piece]:
    """Every Linear's tensors, its LoRA's up in this type.

    Args:
        tensors: of every Linear, see `FrozenProducts`; codes are never None.
    """
    pieces: list[Piece] = []
    start = 0
    for part in parts:
        stop = start + 2 + part.num_codes
        bias, up, *codes = tensors[start:stop]
        pieces.append((part, bias, up if up is None or dtype is None else up.to(dtype), codes))
        start = stop
    return pieces


def list_kept(pieces: Sequence[Piece]) -> list[torch.Tensor | None]:
    """What a backward pass needs; a bias affects no gradient."""
    return [tensor for _, _, up, codes in pieces for tensor in (None, up, *codes)]


def shape_like(x: torch.Tensor, outs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return tuple([out.view(*x.shape[:-1], out.shape[-1]) for out in outs])


def to_rows(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1])
