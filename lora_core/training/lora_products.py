"""Frozen Linears that read one tensor, and the LoRAs beside them, as one function of autograd.

q, k and v of a stream read the same x, and so do their LoRAs. Left to autograd that is four
gradients of x's size and three sums, each of which reads two tensors and writes one; here every
product after the first is added into the first one's result by `addmm_`. The gradient of the
down-products is added to the same tensor.

For gradient checkpointing a product comes in two halves. `begin_products` computes what a backward
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


class Base(NamedTuple):
    """A frozen weight, as `FrozenProducts` takes it."""

    decode: Decode
    codes: tuple[torch.Tensor, ...]
    bias: torch.Tensor | None


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


Piece = tuple[Part, torch.Tensor | None, torch.Tensor | None, Sequence[torch.Tensor]]
"""Of one Linear, with its bias, its LoRA's up (out, rank) and its codes."""


def compute_products(linears: Sequence[nn.Module], x: torch.Tensor) -> list[torch.Tensor]:
    """What each gives for x, (..., in) -> (..., out)."""
    layers = list_loras(linears)
    is_simple = layers and x.requires_grad and not is_random(layers)
    collected = collect_parts(linears) if is_simple and all(map(is_halved, linears)) else None
    if collected is None:
        return finish_products(linears, begin_products(linears, x))
    parts, tensors = collected
    return list(WholeProducts.apply(x, stack_downs(layers), parts, *tensors))


def begin_products(linears: Sequence[nn.Module], x: torch.Tensor) -> Begun:
    """The half that is cheap, and the whole of what cannot be halved."""
    finished = tuple([linear(x) for linear in linears if not is_halved(linear)])
    layers = list_loras(linears)
    if not layers:
        return Begun(x, None, finished)
    if is_random(layers):  # each drops other entries
        return Begun(x, torch.cat([layer.project(x) for layer in layers], dim=-1), finished)
    down = stack_downs(layers)
    if not x.requires_grad:
        return Begun(x, functional.linear(x, down.to(x.dtype)), finished)
    return Begun(*DownProducts.apply(x, down, has_bases(linears)), finished)


def finish_products(linears: Sequence[nn.Module], begun: Begun) -> list[torch.Tensor]:
    """The results, in the order of the Linears that were begun with."""
    x, hidden, finished = begun
    halved = [linear for linear in linears if is_halved(linear)]
    collected = collect_parts(halved)
    if collected is None:
        outs = call_bases(halved, x, hidden)
    elif halved:
        parts, tensors = collected
        outs = FrozenProducts.apply(x, hidden, parts, *tensors)
    else:
        outs = ()
    if not finished:
        return list(outs)
    sources = iter(outs), iter(finished)
    return [next(sources[not is_halved(linear)]) for linear in linears]


def collect_parts(
    linears: Sequence[nn.Module],
) -> tuple[tuple[Part, ...], list[torch.Tensor | None]] | None:
    """What `FrozenProducts` takes of those that are halved.

    None where the base of one has to multiply by itself.
    """
    parts: list[Part] = []
    tensors: list[torch.Tensor | None] = []
    start = 0
    for linear in linears:
        base = read_base(linear)
        if base is None:
            return None
        columns, up, scale = None, None, 0.0
        if is_lora(linear):
            up, scale = linear.up, linear.strength * linear.scale
            columns = start, start + up.shape[1]
            start = columns[1]
        parts.append(Part(base.decode, len(base.codes), columns, scale))
        tensors += [base.bias, up, *base.codes]
    return tuple(parts), tensors


def call_bases(
    linears: Sequence[nn.Module], x: torch.Tensor, hidden: torch.Tensor | None
) -> list[torch.Tensor]:
    """The same by the modules themselves."""
    outs, start = [], 0
    for linear in linears:
        if is_lora(linear):
            stop = start + linear.up.shape[1]
            outs.append(linear.add_to_base(x, hidden[..., start:stop]))
            start = stop
        else:
            outs.append((linear.base if isinstance(linear, LoraLinear) else linear)(x))
    return outs


def is_lora(linear: nn.Module) -> bool:
    """Whether it adds the product of a LoRA to its base's."""
    return isinstance(linear, LoraLinear) and linear.is_sum


def is_halved(linear: nn.Module) -> bool:
    """Whether it is its base's product, with or without a LoRA's added."""
    return not isinstance(linear, LoraLinear) or linear.is_sum or linear.strength == 0


def is_random(layers: Sequence[LoraLinear]) -> bool:
    """Whether one of them drops entries of its input."""
    return any(layer.dropout and layer.training for layer in layers)


def list_loras(linears: Sequence[nn.Module]) -> list[LoraLinear]:
    return [linear for linear in linears if is_lora(linear)]


def stack_downs(layers: Sequence[LoraLinear]) -> torch.Tensor:
    """(k, in) of all together."""
    if len(layers) == 1:
        return layers[0].down
    return torch.cat([layer.down for layer in layers])


def has_bases(linears: Sequence[nn.Module]) -> bool:
    """Whether none of those that are halved has to multiply by itself."""
    return all(read_base(linear) is not None for linear in linears if is_halved(linear))


def read_base(linear: nn.Module) -> Base | None:
    """The frozen weight of a Linear, with or without a LoRA.

    None where only the module itself may multiply: its weight is of a kind of its own or is
    trained, or somebody watches the module.
    """
    base = linear.base if isinstance(linear, LoraLinear) else linear
    if base._forward_hooks or base._forward_pre_hooks or base._backward_hooks:
        return None
    if "forward" in base.__dict__:  # replaced, as Accelerate's hooks do
        return None
    weight, bias = base.weight, base.bias
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        return None
    if isinstance(base, FrozenLinear):
        return Base(base.decode, base.codes, bias)
    if type(base) is nn.Linear and not is_traceable_wrapper_subclass(weight):
        return Base(as_stored, (weight,), bias)
    return None


def as_stored(dtype: torch.dtype, weight: torch.Tensor) -> torch.Tensor:
    return weight


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
        down = down.to(x.dtype)
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
        pieces = split_by_part(parts, tensors, x.dtype)
        outs = multiply(to_rows(x), None if hidden is None else to_rows(hidden), pieces)
        ctx.save_for_backward(hidden, *list_kept(pieces))
        return shape_like(x, outs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None):
        hidden, *tensors = ctx.saved_tensors
        needs_x, needs_hidden = ctx.needs_input_grad[:2]
        pieces = split_by_part(ctx.parts, tensors)
        rows = None if hidden is None else to_rows(hidden)
        grad_x, grad_rows, grad_tensors = multiply_back(grads, rows, pieces, needs_x)
        if grad_x is not None:
            grad_x = grad_x.view(ctx.shape)
        grad_hidden = grad_rows.view(hidden.shape) if needs_hidden else None
        return grad_x, grad_hidden, None, *grad_tensors


class WholeProducts(torch.autograd.Function):
    """`DownProducts` and `FrozenProducts` in one, where nothing is to be computed again apart."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        down: torch.Tensor,
        parts: tuple[Part, ...],
        *tensors: torch.Tensor | None,
    ):
        ctx.set_materialize_grads(False)
        ctx.parts = parts
        pieces = split_by_part(parts, tensors, x.dtype)
        rows, down = to_rows(x), down.to(x.dtype)
        hidden = functional.linear(rows, down)
        outs = multiply(rows, hidden, pieces)
        ctx.save_for_backward(x, down, hidden, *list_kept(pieces))
        return shape_like(x, outs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None):
        x, down, hidden, *tensors = ctx.saved_tensors
        pieces = split_by_part(ctx.parts, tensors)
        grad_x, grad_hidden, grad_tensors = multiply_back(grads, hidden, pieces, True)
        if grad_x is None:  # nobody used a result
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
        if part.columns is not None:
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
    grad_hidden = []
    grad_tensors: list[torch.Tensor | None] = []
    for (part, _, up, codes), grad in zip(pieces, grads, strict=True):
        rows = None if grad is None else to_rows(grad)
        if needs_x and rows is not None:
            weight = part.decode(rows.dtype, *codes)
            grad_x = rows @ weight if grad_x is None else grad_x.addmm_(rows, weight)
        grad_up = None
        if part.columns is not None:
            start, stop = part.columns
            down = hidden[:, start:stop]
            if rows is None:
                grad_hidden.append(torch.zeros_like(down))
            else:
                grad_up = (rows.T @ down).mul_(part.scale)
                grad_hidden.append((rows @ up).mul_(part.scale))
        grad_tensors += [None, grad_up, *[None] * len(codes)]
    if len(grad_hidden) < 2:
        return grad_x, *(grad_hidden or [None]), grad_tensors
    return grad_x, torch.cat(grad_hidden, dim=1), grad_tensors


def split_by_part(
    parts: Sequence[Part],
    tensors: Sequence[torch.Tensor | None],
    dtype: torch.dtype | None = None,
) -> list[Piece]:
    """Every Linear's tensors, its LoRA's up in this type."""
    pieces, start = [], 0
    for part in parts:
        stop = start + 2 + part.num_codes
        bias, up, *codes = tensors[start:stop]
        pieces.append((part, bias, up if up is None or dtype is None else up.to(dtype), codes))
        start = stop
    return pieces


def list_kept(pieces: Sequence[Piece]) -> list[torch.Tensor | None]:
    """What a backward pass needs; a bias has no part in any gradient."""
    return [tensor for _, _, up, codes in pieces for tensor in (None, up, *codes)]


def shape_like(x: torch.Tensor, outs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return tuple([out.view(*x.shape[:-1], out.shape[-1]) for out in outs])


def to_rows(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1])
