"""Frozen Linears that read one tensor, and the LoRAs beside them, as one function of autograd.

q, k and v of a stream read the same x, and so do their LoRAs. Left to autograd that is four
gradients of x's size and three sums, each of which reads two tensors and writes one; here every
product after the first is added into the first one's result by `addmm_`. The gradient of the
down-products is added to the same tensor.

A product comes in two halves, for gradient checkpointing. `begin_products` computes what a backward
pass needs x for, the LoRAs' down-products; it is cheap to do again. `finish_products` computes the
rest, which needs no x in the backward pass, and so need not be done again.

What is no plain sum of two products is left to the module itself: a DoRA, and a base that only it
can multiply by (torchao, a hook on it).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..lora_layers import LoraLinear
from .frozen_linear import Decode, FrozenLinear

Gradients = tuple[torch.Tensor | None, ...]


class Begun(NamedTuple):
    """Products of one x, of which the expensive halves are still to come."""

    x: torch.Tensor
    hidden: torch.Tensor | None
    """(..., k): the down-products of all LoRAs among them, side by side."""
    finished: tuple[torch.Tensor, ...]
    """Results of the modules that are no plain sum."""


class Part(NamedTuple):
    """What `FrozenProducts` has to know of one Linear besides its tensors."""

    decode: Decode
    num_codes: int
    columns: tuple[int, int] | None
    """Of the down-products, those of this Linear's LoRA; None where it has none."""
    scale: float


def compute_products(linears: Sequence[nn.Module], x: torch.Tensor) -> list[torch.Tensor]:
    """What each gives for x, (..., in) -> (..., out)."""
    return finish_products(linears, begin_products(linears, x))


def begin_products(linears: Sequence[nn.Module], x: torch.Tensor) -> Begun:
    """The half that is cheap, and the whole of what cannot be halved."""
    finished = tuple(linear(x) for linear in linears if not is_halved(linear))
    layers = [linear for linear in linears if is_lora(linear)]
    if not layers:
        return Begun(x, None, finished)
    if any(layer.training and layer.dropout for layer in layers):  # each drops other entries
        return Begun(x, torch.cat([layer.project(x) for layer in layers], dim=-1), finished)
    down = torch.cat([layer.down for layer in layers]).to(x.dtype)
    if not x.requires_grad:
        return Begun(x, functional.linear(x, down), finished)
    is_ours = all(read_base(linear) is not None for linear in linears if is_halved(linear))
    return Begun(*DownProducts.apply(x, down, is_ours), finished)


def finish_products(linears: Sequence[nn.Module], begun: Begun) -> list[torch.Tensor]:
    """The results, in the order of the Linears that were begun with."""
    x, hidden, _ = begun
    finished = iter(begun.finished)
    outs: dict[int, torch.Tensor] = {}
    parts: dict[int, Part] = {}
    tensors: list[torch.Tensor | None] = []
    start = 0
    for index, linear in enumerate(linears):
        if not is_halved(linear):
            outs[index] = next(finished)
            continue
        columns = None
        if is_lora(linear):
            columns = start, start + linear.down.shape[0]
            start = columns[1]
        base = read_base(linear)
        if base is None:
            outs[index] = call_base(linear, x, hidden, columns)
            continue
        decode, codes, bias = base
        scale = 0.0 if columns is None else linear.strength * linear.scale
        parts[index] = Part(decode, len(codes), columns, scale)
        tensors += [bias, None if columns is None else linear.up.to(x.dtype), *codes]
    if parts:
        found = FrozenProducts.apply(x, hidden, tuple(parts.values()), *tensors)
        outs.update(zip(parts, found, strict=True))
    return [outs[index] for index in range(len(linears))]


def is_lora(linear: nn.Module) -> bool:
    """Whether it adds the product of a LoRA to its base's."""
    return isinstance(linear, LoraLinear) and linear.is_sum


def is_halved(linear: nn.Module) -> bool:
    """Whether it is its base's product, with or without a LoRA's added."""
    return not isinstance(linear, LoraLinear) or linear.is_sum or linear.strength == 0


def get_base(linear: nn.Module) -> nn.Module:
    return linear.base if isinstance(linear, LoraLinear) else linear


def read_base(
    linear: nn.Module,
) -> tuple[Decode, tuple[torch.Tensor, ...], torch.Tensor | None] | None:
    """How the frozen weight is read, from what, and the bias.

    None where only the module itself may multiply: its weight is of a kind of its own or is
    trained, or somebody watches the module.
    """
    base = get_base(linear)
    if base._forward_hooks or base._forward_pre_hooks or base._backward_hooks:
        return None
    if "forward" in base.__dict__:  # replaced, as Accelerate's hooks do
        return None
    if any(p is not None and p.requires_grad for p in base._parameters.values()):
        return None
    if isinstance(base, FrozenLinear):
        return base.decode, base.codes, base.bias
    if type(base) is nn.Linear and not is_traceable_wrapper_subclass(base.weight):
        return as_stored, (base.weight,), base.bias
    return None


def as_stored(dtype: torch.dtype, weight: torch.Tensor) -> torch.Tensor:
    return weight


def call_base(
    linear: nn.Module,
    x: torch.Tensor,
    hidden: torch.Tensor | None,
    columns: tuple[int, int] | None,
) -> torch.Tensor:
    """By the base module itself."""
    if columns is None:
        return get_base(linear)(x)
    return linear.add_to_base(x, hidden[..., slice(*columns)])


class DownProducts(torch.autograd.Function):
    """x as it is, and x @ down^T.

    What the first result's gradient is, the second's is added to.

    Args:
        is_ours: nobody but `FrozenProducts` reads the first result, so that its gradient is a
            tensor nobody else holds.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, down: torch.Tensor, is_ours: bool):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, down)
        # A compiled backward pass must not write into what it is given.
        ctx.is_ours = is_ours and not torch.compiler.is_compiling()
        return x.view_as(x), functional.linear(x, down)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None, grad_hidden: torch.Tensor | None):
        if grad_hidden is None:
            return grad, None, None
        x, down = ctx.saved_tensors
        rows = to_rows(grad_hidden)
        grad_down = rows.T @ to_rows(x) if ctx.needs_input_grad[1] else None
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
        hidden: (..., k), all LoRAs' down-products side by side, or None.
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
    ):
        ctx.set_materialize_grads(False)
        ctx.parts, ctx.shape = parts, x.shape
        kept: list[torch.Tensor | None] = [hidden]
        outs = []
        rows = to_rows(x)
        downs = None if hidden is None else to_rows(hidden)
        for part, bias, up, codes in split_by_part(parts, tensors):
            out = functional.linear(rows, part.decode(x.dtype, *codes), bias)
            if part.columns is not None:
                out.addmm_(downs[:, slice(*part.columns)], up.T, alpha=part.scale)
            outs.append(out.view(*x.shape[:-1], out.shape[-1]))
            kept += [None, up, *codes]  # a bias has no part in any gradient
        ctx.save_for_backward(*kept)
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Gradients:
        hidden, *tensors = ctx.saved_tensors
        needs_x, needs_hidden = ctx.needs_input_grad[:2]
        downs = None if hidden is None else to_rows(hidden)
        grad_x = None
        grad_downs = []
        grad_tensors: list[torch.Tensor | None] = []
        pieces = split_by_part(ctx.parts, tensors)
        for (part, _, up, codes), grad in zip(pieces, grads, strict=True):
            rows = None if grad is None else to_rows(grad)
            if needs_x and rows is not None:
                weight = part.decode(rows.dtype, *codes)
                grad_x = rows @ weight if grad_x is None else grad_x.addmm_(rows, weight)
            grad_up = None
            if part.columns is not None:
                down = downs[:, slice(*part.columns)]
                if rows is None:
                    grad_downs.append(torch.zeros_like(down))
                else:
                    grad_up = (rows.T @ down).mul_(part.scale)
                    grad_downs.append((rows @ up).mul_(part.scale))
            grad_tensors += [None, grad_up, *(None for _ in codes)]
        grad_hidden = None
        if needs_hidden and grad_downs:
            grad_hidden = torch.cat(grad_downs, dim=-1).view(hidden.shape)
        if grad_x is not None:
            grad_x = grad_x.view(ctx.shape)
        return grad_x, grad_hidden, None, *grad_tensors


def split_by_part(parts: Sequence[Part], tensors: Sequence[torch.Tensor | None]) -> list[tuple]:
    """Part, bias, up and codes of every Linear."""
    pieces, start = [], 0
    for part in parts:
        bias, up, *codes = tensors[start : start + 2 + part.num_codes]
        pieces.append((part, bias, up, codes))
        start += 2 + part.num_codes
    return pieces


def to_rows(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1])
