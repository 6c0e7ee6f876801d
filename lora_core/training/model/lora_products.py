"""Frozen Linears that read one tensor, and their LoRAs, as one autograd function.

q, k and v of a stream read the same x, and so do their LoRAs. Left to autograd that is four
gradients of x's size and three sums, each of which reads two tensors and writes one; here every
product after the first is added into the first one's result by `addmm_`. The gradient of the
down-products is added to the same tensor.

For gradient checkpointing a product comes in two halves. `begin_products` computes what a backward
pass needs x for, the LoRAs' down-products; it is cheap to recompute. `finish_products` computes the
rest, which needs no x in the backward pass, and so need not be recomputed. The functions themselves
are in `frozen_products`.

What is not a plain sum of two products is left to the module itself: a DoRA, and a base that only
it can multiply by (torchao, a module with a hook).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeGuard

import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ...injection.layers import AnyLinear, LoraLinear
from .frozen_linear import Decode, FrozenLinear
from .frozen_products import DownProducts, FrozenProducts, Part, WholeProducts


class Base(NamedTuple):
    """A frozen weight, as `FrozenProducts` takes it."""

    decode: Decode
    codes: tuple[torch.Tensor, ...]
    bias: torch.Tensor | None


class Begun(NamedTuple):
    """Products of one x, whose expensive halves are still to be computed."""

    x: torch.Tensor
    hidden: torch.Tensor | None
    """(..., k): the down-products of all LoRAs among them, side by side."""
    finished: tuple[torch.Tensor, ...]
    """Results of the modules that are no plain sum."""


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
    x, hidden = DownProducts.apply(x, down, has_bases(linears))
    return Begun(x, hidden, finished)


def finish_products(linears: Sequence[nn.Module], begun: Begun) -> list[torch.Tensor]:
    """The results, in the order of the Linears that were begun with."""
    x, hidden, finished = begun
    halved = [linear for linear in linears if is_halved(linear)]
    collected = collect_parts(halved)
    outs: Sequence[torch.Tensor] = ()
    if collected is None:
        outs = call_bases(halved, x, hidden)
    elif halved:
        parts, tensors = collected
        outs = FrozenProducts.apply(x, hidden, parts, *tensors)
    if not finished:
        return list(outs)
    sources = iter(outs), iter(finished)
    return [next(sources[not is_halved(linear)]) for linear in linears]


def collect_parts(
    linears: Sequence[nn.Module],
) -> tuple[tuple[Part, ...], list[torch.Tensor | None]] | None:
    """The inputs of `FrozenProducts` for the halved products.

    None where one of the bases has to do its own product.
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
            assert hidden is not None  # it holds the down-products of every LoRA
            outs.append(linear.add_to_base(x, hidden[..., start:stop]))
            start = stop
        else:
            outs.append((linear.base if isinstance(linear, LoraLinear) else linear)(x))
    return outs


def is_lora(linear: nn.Module) -> TypeGuard[LoraLinear]:
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

    None where only the module itself may multiply: its weight is of a special type or is trained,
    or the module has hooks.
    """
    base: AnyLinear = linear.base if isinstance(linear, LoraLinear) else linear
    if base._forward_hooks or base._forward_pre_hooks or base._backward_hooks:
        return None
    if "forward" in base.__dict__:  # replaced, as Accelerate's hooks do
        return None
    weight, bias = base.weight, base.bias
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        return None
    if isinstance(base, FrozenLinear):
        if base.rotation is not None:  # what it multiplies is x turned, not x
            return None
        return Base(base.decode, base.codes, bias)
    if type(base) is nn.Linear and not is_traceable_wrapper_subclass(weight):
        return Base(as_stored, (weight,), bias)
    return None


def as_stored(dtype: torch.dtype, weight: torch.Tensor) -> torch.Tensor:
    return weight
