"""Linears whose weight is kept in few bits and dequantised only while it is used.

No dequantised weight outlives a product: the backward pass dequantises the codes again.
Gradients go to the input alone; weights are never trained here.

A rotated weight W = C R (ConvRot) is multiplied as x W^T = (x R) C^T, as ComfyUI does: R is
symmetric, and rotating x costs one product of 256 columns, rotating C back about 100 bytes a
weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ...base_model.base_weight import MX_BLOCK, BaseWeight, rotate
from ...disk.safetensors_file import load
from ...injection.layers import gather

Decode = Callable[..., torch.Tensor]
"""(dtype, *codes) -> weight (out, in) in that dtype."""


class FrozenProduct(torch.autograd.Function):
    """x @ weight^T + bias, with a gradient for x only."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        decode: Decode,
        *codes: torch.Tensor,
    ) -> torch.Tensor:
        ctx.decode = decode
        ctx.save_for_backward(*codes)
        return functional.linear(x, decode(x.dtype, *codes), bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        codes = ctx.saved_tensors
        grad_x = grad @ ctx.decode(grad.dtype, *codes) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, *(None for _ in codes)


class FrozenLinear(nn.Module):
    """A Linear of codes and their dequantisation.

    `weight` are the codes; what else is needed to read them (scales) are buffers. Moves between
    devices with `.to(device)`; must not be cast by `.to(dtype)`.

    Args:
        codes: name -> tensor, "weight" among them, in the order in which `decode` takes them.
        rotation: the matrix (`build_rotation`) that rotated the weight before it was quantised.
    """

    rotation: torch.Tensor | None

    def __init__(
        self,
        out_features: int,
        in_features: int,
        decode: Decode,
        codes: dict[str, torch.Tensor],
        bias: torch.Tensor | None,
        rotation: torch.Tensor | None = None,
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
        self.register_buffer("rotation", rotation, persistent=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @property
    def codes(self) -> tuple[torch.Tensor, ...]:
        return tuple(getattr(self, name) for name in self.code_names)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.rotation is not None:
            x = rotate_columns(x, self.rotation)
        if not (x.requires_grad and torch.is_grad_enabled()):
            return functional.linear(x, self.decode(x.dtype, *self.codes), self.bias)
        return FrozenProduct.apply(x, self.bias, self.decode, *self.codes)

    @torch.no_grad()
    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The effective weight, (out, in)."""
        codes = map(gather, self.codes)
        if self.rotation is None:
            return self.decode(dtype, *codes)
        return rotate(self.decode(torch.float32, *codes), len(self.rotation)).to(dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.decode}"


def build_rotation(group: int, device: torch.device) -> torch.Tensor:
    """ConvRot's matrix (group, group), symmetric and its own inverse.

    In bf16, which holds its entries exactly: powers of two.
    """
    return rotate(torch.eye(group), group).to(device, torch.bfloat16)


def rotate_columns(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Every `len(rotation)` columns of (..., in) times the matrix, in the type of x.

    In bf16 x is rounded once more: the product of random weights is off by 0.29 % of its norm
    instead of the 0.23 % of a weight rotated back in float32. Rotating x in float32 ends in the
    same rounding, since the product takes bf16, and moves twice the bytes.
    """
    return (x.reshape(-1, len(rotation)) @ rotation.to(x.dtype)).view(x.shape)


@dataclass(frozen=True)
class ScaledCodes:
    """Numbers of any kind times a scale, ComfyUI's formats among them; see `base_weight`."""

    kind: str

    def __call__(
        self, dtype: torch.dtype, stored: torch.Tensor, scale: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The product is taken in the scale's float32 and rounded once.

        Bytes moved per weight in bf16: 3 from int8, 7 from fp8, which torch multiplies by no other
        type and which is therefore converted first.

        Args:
            scale: float32 (1, 1), (out, 1), or (out, in / 32).
        """
        if scale is None:
            return stored.to(dtype)
        on_cpu = stored.device.type == "cpu"
        if on_cpu or stored.is_floating_point():
            codes = values = stored.to(dtype, copy=True)
        else:
            codes, values = stored, torch.empty_like(stored, dtype=dtype)
        if on_cpu and scale.numel() == 1:
            # A CPU's kernel keeps a scalar in float32, and would copy both sides of anything else
            # to float32. A GPU's casts as it reads, and would round a scalar to bf16.
            return values.mul_(scale.reshape(()))
        if scale.shape[1] == 1:
            return torch.mul(codes, scale, out=values)
        blocks = [x.unflatten(1, (-1, MX_BLOCK)) for x in (codes, values)]
        torch.mul(blocks[0], scale[..., None], out=blocks[1])
        return values


def build_scaled_linear(
    weight: BaseWeight, bias: torch.Tensor | None, rotation: torch.Tensor | None = None
) -> FrozenLinear:
    """A Linear that keeps the weight exactly as stored.

    Args:
        rotation: of a rotated weight, one per device that many can share.
    """
    stored = load(weight.stored)
    device = stored.device
    codes: dict[str, torch.Tensor] = {"weight": stored}
    if weight.scale is not None:
        scale = torch.as_tensor(weight.scale, dtype=torch.float32, device=device)
        codes["scale"] = scale if weight.scaling == "block" else scale.reshape(-1, 1)
    if weight.rotation and rotation is None:
        rotation = build_rotation(weight.rotation, device)
    decode = ScaledCodes(weight.storage)
    out_features, in_features = stored.shape
    return FrozenLinear(out_features, in_features, decode, codes, bias, rotation)
