"""How the noise level acts on a stream: scales, shifts and gates, one set for each part of it.

A 2511 shows its references at noise level 0: the target's tokens and those after them are two parts
with parameters of their own. Each part is written straight into the result, and its gradient
straight into the gradient: parts that are computed separately and joined would be copied twice.
"""

from __future__ import annotations

from typing import Any

import torch


def modulate(
    x: torch.Tensor, parameters: torch.Tensor, split: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """x * (1 + scale) + shift, and the gate for what is made of it.

    Args:
        x: (B, L, D).
        parameters: shift, scale and gate (B, 1, 3 D); where `split` is given (2 B, 1, 3 D), the
            second half for the tokens from there on.
        split: number of tokens of the first part.
    """
    shift, scale, gate = parameters.chunk(3, dim=-1)
    return add_scaled(shift, x, 1 + scale, split), gate


def add_gated(
    x: torch.Tensor, change: torch.Tensor, gate: torch.Tensor, split: int | None
) -> torch.Tensor:
    """x + gate * change, of (B, L, D), with gates as `modulate` gives them."""
    return add_scaled(x, change, gate, split)


def add_scaled(
    term: torch.Tensor, x: torch.Tensor, factor: torch.Tensor, split: int | None
) -> torch.Tensor:
    """term + x * factor; term by token or, as the factor, by part."""
    if split is None:
        return torch.addcmul(term, x, factor)
    if not torch.compiler.is_compiling():
        return AddScaledParts.apply(term, x, factor, split)
    terms, factors = split_term(term, x, split), factor.chunk(2)
    parts = zip(terms, split_tokens(x, split), factors, strict=True)
    return torch.cat([torch.addcmul(*part) for part in parts], dim=1)


class AddScaledParts(torch.autograd.Function):
    """`add_scaled` of two parts; x is kept only for gradients of the factor."""

    @staticmethod
    def forward(
        ctx: Any, term: torch.Tensor, x: torch.Tensor, factor: torch.Tensor, split: int
    ) -> torch.Tensor:
        ctx.split, ctx.is_by_token = split, is_by_token(term, x)
        ctx.save_for_backward(factor, x if ctx.needs_input_grad[2] else None)
        out = torch.empty_like(x)
        factors = factor.chunk(2)
        parts = zip(
            *(split_term(term, x, split), split_tokens(x, split), factors),
            split_tokens(out, split),
            strict=True,
        )
        for one_term, one_x, one_factor, one_out in parts:
            torch.addcmul(one_term, one_x, one_factor, out=one_out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        factor, x = ctx.saved_tensors
        grads = split_tokens(grad, ctx.split)
        grad_term = grad_x = grad_factor = None
        if ctx.needs_input_grad[0]:
            grad_term = grad if ctx.is_by_token else sum_tokens(grads)
        if ctx.needs_input_grad[1]:
            grad_x = torch.empty_like(grad)
            pieces = zip(grads, factor.chunk(2), split_tokens(grad_x, ctx.split), strict=True)
            for one_grad, one_factor, one_out in pieces:
                torch.mul(one_grad, one_factor, out=one_out)
        if ctx.needs_input_grad[2]:
            xs = split_tokens(x, ctx.split)
            grad_factor = sum_tokens([g * part for g, part in zip(grads, xs, strict=True)])
        return grad_term, grad_x, grad_factor, None


def split_tokens(x: torch.Tensor, split: int) -> tuple[torch.Tensor, ...]:
    return x.split((split, x.shape[1] - split), dim=1)


def split_term(term: torch.Tensor, x: torch.Tensor, split: int) -> tuple[torch.Tensor, ...]:
    return split_tokens(term, split) if is_by_token(term, x) else term.chunk(2)


def is_by_token(term: torch.Tensor, x: torch.Tensor) -> bool:
    return term.shape == x.shape


def sum_tokens(parts: list[torch.Tensor] | tuple[torch.Tensor, ...]) -> torch.Tensor:
    return torch.cat([part.sum(dim=1, keepdim=True) for part in parts])
