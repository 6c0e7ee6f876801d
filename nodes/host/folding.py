"""Linears whose forward ComfyUI does not call, as it folds the activation before into their kernel.

For int8 weights `comfy.ops.linear_input_act` computes linear(act(x)) by itself: `img_mlp.out` of a
Qwen-Image-2.1 in Comfy-Org's int8 file runs so, and a forward put on it would never be called.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import comfy.ops
import torch


class SwappedForward(Protocol):
    """What stands in for a Linear's forward."""

    runs: int
    """How often it has added its part."""

    def add(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """y of the Linear itself for the input x, with its part added."""


class _Activation:
    """Given to ComfyUI in place of a Linear, it gets the activation alone, without a kernel."""

    weight = None
    _full_precision_mm = True

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x


@contextmanager
def adding_to_folded(
    find_swapped: Callable[[torch.nn.Module], SwappedForward | None],
) -> Iterator[None]:
    """Also adds the part of a swapped forward where ComfyUI computes its Linear in a kernel.

    The kernel itself runs as without us, so the base's own output stays bit-identical; only the
    activation is computed once more, for our part.
    """
    original = getattr(comfy.ops, "linear_input_act", None)
    if original is None:  # an older ComfyUI
        yield
        return
    signature = inspect.signature(original)

    def run(linear: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        swapped = find_swapped(linear)
        if swapped is None:
            return original(linear, *args, **kwargs)
        bound = signature.bind(linear, *args, **kwargs)
        # Since 0.36 it may return residual + residual_scale * linear(act(x)).
        residual = bound.arguments.pop("residual", None)
        residual_scale = bound.arguments.pop("residual_scale", None)
        runs = swapped.runs
        y = original(*bound.args, **bound.kwargs)
        if swapped.runs == runs:
            bound.arguments[next(iter(bound.arguments))] = _Activation()
            y = swapped.add(y, original(*bound.args, **bound.kwargs))
        return y if residual is None else torch.addcmul(residual, y, residual_scale)

    comfy.ops.linear_input_act = run
    try:
        yield
    finally:
        comfy.ops.linear_input_act = original
