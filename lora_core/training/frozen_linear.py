"""Linears whose weight is kept in few bits and widened only while it is used.

Nothing of the widened weight outlives a product: the backward pass widens the codes again.
Gradients go to the input alone; weights are never trained here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ..lora_layers import gather
from ..stored_weight import BaseWeight

Decode = Callable[..., torch.Tensor]
"""(dtype, *codes) -> weight (out, in) in that dtype."""


class FrozenProduct(torch.autograd.Function):
    """x @ weight^T + bias, with a gradient for x only."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, bias: torch.Tensor | None, decode: Decode, *codes):
        ctx.decode = decode
        ctx.save_for_backward(*codes)
        return functional.linear(x, decode(x.dtype, *codes), bias)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        codes = ctx.saved_tensors
        grad_x = grad @ ctx.decode(grad.dtype, *codes) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, *(None for _ in codes)


class FrozenLinear(nn.Module):
    """A Linear of codes and what turns them into numbers.

    `weight` are the codes; what else is needed to read them (scales) are buffers. Moves between
    devices with `.to(device)`; must not be cast by `.to(dtype)`.

    Args:
        codes: name -> tensor, "weight" among them, in the order in which `decode` takes them.
    """

    def __init__(
        self,
        out_features: int,
        in_features: int,
        decode: Decode,
        codes: dict[str, torch.Tensor],
        bias: torch.Tensor | None,
    ):
        super().__init__()
        self.out_features = out_features
        self.in_features = in_features
        self.decode = decode
        self.code_names = tuple(codes)
        for name, tensor in codes.items():
            if name == "weight":
                self.weight = nn.Parameter(tensor, requires_grad=False)
            else:
                self.register_buffer(name, tensor)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @property
    def codes(self) -> tuple[torch.Tensor, ...]:
        return tuple(getattr(self, name) for name in self.code_names)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not (x.requires_grad and torch.is_grad_enabled()):
            return functional.linear(x, self.decode(x.dtype, *self.codes), self.bias)
        return FrozenProduct.apply(x, self.bias, self.decode, *self.codes)

    @torch.no_grad()
    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight as it acts, (out, in)."""
        return self.decode(dtype, *map(gather, self.codes))

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.decode}"


@dataclass(frozen=True)
class ScaledCodes:
    """Numbers of any kind times a scale, ComfyUI's formats among them; see `stored_weight`."""

    kind: str
    rotation: int = 0

    def __call__(
        self, dtype: torch.dtype, stored: torch.Tensor, scale: torch.Tensor | None = None
    ) -> torch.Tensor:
        if self.rotation or (scale is not None and scale.numel() not in (1, len(stored))):
            return BaseWeight(stored, scale, self.rotation).values.to(dtype)
        if scale is None:
            return stored.to(dtype)
        values = stored.to(dtype, copy=True)
        # In the scale's float32 and rounded once, but without a float32 copy of the weight.
        return torch.mul(values, scale, out=values)


def build_scaled_linear(weight: BaseWeight, bias: torch.Tensor | None) -> FrozenLinear:
    """A Linear that keeps the weight exactly as stored."""
    codes: dict[str, Any] = {"weight": weight.stored}
    if weight.scale is not None:
        scale = torch.as_tensor(weight.scale, dtype=torch.float32, device=weight.stored.device)
        codes["scale"] = scale.reshape(-1, 1) if weight.scaling == "row" else scale
        if weight.scaling == "tensor":
            codes["scale"] = scale.reshape(())
    out_features, in_features = weight.stored.shape
    decode = ScaledCodes(weight.storage, weight.rotation)
    return FrozenLinear(out_features, in_features, decode, codes, bias)
