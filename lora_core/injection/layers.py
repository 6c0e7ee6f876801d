"""A frozen Linear with a trainable LoRA: out = base(x) + scale * lora_B(lora_A x).

Shapes: x (..., in), lora_A (rank, in), lora_B (out, rank). The base is any module with
`in_features`, `out_features` and a forward, wrapped by composition: quantised bases keep their own
product, and no base weight is ever written to.

What was tried for speed (`benchmarks/injection.py`, one block at full width): PEFT's layers cast
the tokens to the LoRA's float32 and back, which at 4096 tokens is by far the larger tensor; here
the LoRA's weights are cast to the tokens' type. The scaled up-product is added into the base's
output by one `addmm_`, which leaves out a product, a scaled copy and a sum of the output's size.
Modules that read the same tensor (q, k, v of a stream) share one down-product, see `SharedInput`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional

from ..errors import ConfigError

AnyLinear = Any
"""A module with `in_features`, `out_features`, a weight and a forward, quantised or not.

No type says so: torch declares every attribute of a module as `Tensor | Module`.
"""


class LoraLinear(nn.Module):
    """A base Linear and its LoRA. `lora_A` and `lora_B` are the trainable parameters.

    With PiSSA the factors' starting values are frozen buffers and the parameters are the distance
    from them, both 0 at first: with A = A0 + lora_A and B = B0 + lora_B the change of the base is

        B A - B0 A0 = [B0 + lora_B, lora_B] @ [lora_A; A0],

    a product of twice the rank. The gradients are those of PiSSA (A moves as lora_A does), but
    the base weight is neither changed nor rounded, no small difference of large products is taken,
    the first forward is bit-identical to the base's, and weight decay pulls towards the base.
    """

    base: AnyLinear
    frozen_A: torch.Tensor | None
    frozen_B: torch.Tensor | None

    def __init__(
        self,
        base: AnyLinear,
        lora_A: torch.Tensor,
        lora_B: torch.Tensor,
        alpha: float,
        dropout: float = 0.0,
        principal: tuple[torch.Tensor, torch.Tensor] | None = None,
    ):
        super().__init__()
        self.base = base
        self.lora_A = nn.Parameter(lora_A)
        self.lora_B = nn.Parameter(lora_B)
        self.alpha = alpha
        self.strength = 1.0
        self.dropout = dropout
        self.shared: SharedInput | None = None
        frozen_A, frozen_B = principal if principal is not None else (None, None)
        self.register_buffer("frozen_A", frozen_A)
        self.register_buffer("frozen_B", frozen_B)
        self.training = base.training

    @property
    def in_features(self) -> int:
        return self.base.in_features

    @property
    def out_features(self) -> int:
        return self.base.out_features

    @property
    def weight(self) -> torch.Tensor:
        """The base's, for code that asks a Linear for its type or device."""
        return self.base.weight

    @property
    def bias(self) -> torch.Tensor | None:
        return self.base.bias

    @property
    def rank(self) -> int:
        return self.lora_A.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def down(self) -> torch.Tensor:
        """(k, in) with k the rank, or twice the rank for PiSSA."""
        frozen_A = self.frozen_A
        return self.lora_A if frozen_A is None else torch.cat([self.lora_A, frozen_A])

    @property
    def up(self) -> torch.Tensor:
        """(out, k); delta = scale * up @ down."""
        frozen_B = self.frozen_B
        if frozen_B is None:
            return self.lora_B
        return torch.cat([frozen_B + self.lora_B, self.lora_B], dim=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.strength == 0:
            return self.base(x)
        return self.add_to_base(x, self.project(x))

    @property
    def is_sum(self) -> bool:
        """Whether it is base(x) + something of `project(x)`, so both can be computed apart."""
        return type(self) is LoraLinear and self.strength != 0

    def add_to_base(self, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """The result, given the down-product."""
        # Rows, so that the base's output is no view: adding in place to one would copy gradients.
        out = self.base(x.reshape(-1, x.shape[-1]))
        return self.add_lora(out, hidden.flatten(0, -2)).view(*x.shape[:-1], -1)

    def project(self, x: torch.Tensor) -> torch.Tensor:
        """(..., k): the down-product, of the modules that share x together where there are any."""
        if self.shared is not None:
            return self.shared.project(self, x)
        if self.training and self.dropout:
            x = functional.dropout(x, self.dropout)
        return functional.linear(x, self.down.to(x.dtype))

    def add_lora(self, out: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """out + strength * scale * hidden @ up^T for rows, in place, rounded once."""
        up = self.up.to(out.dtype)
        return out.addmm_(hidden.to(out.dtype), up.T, alpha=self.strength * self.scale)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha:g}"


class DoraLinear(LoraLinear):
    """out = m * (W + delta) x / ||W + delta|| + bias, the norm by row and taken as a constant.

    Liu et al. 2024, arXiv 2402.09353, equation 5 and section 4.3. `magnitude` (out,) is trainable
    and starts at ||W||, so that the first forward is bit-identical to the base's.

    The norm needs no dense delta: ||W + s U D||^2 = ||W||^2 + 2 s <W D^T, U> + s^2 |U (D D^T) U^T|
    row by row, with ||W||^2 computed once. Dropout acts on the delta's input alone.
    """

    base_square: torch.Tensor

    def __init__(self, base: AnyLinear, lora_A: torch.Tensor, *args: Any, **kwargs: Any):
        super().__init__(base, lora_A, *args, **kwargs)
        dtype = torch.promote_types(lora_A.dtype, torch.float32)
        square = get_base_weight(base).to(lora_A.device, dtype).square().sum(dim=1)
        self.register_buffer("base_square", square, persistent=False)
        self.magnitude = nn.Parameter(square.sqrt().to(lora_A.dtype))

    @torch.no_grad()
    def compute_norm(self) -> torch.Tensor:
        """||W + delta|| by row, (out,), at least float32."""
        dtype = self.base_square.dtype
        weight = get_base_weight(self.base)
        down, up = self.down.to(dtype), self.up.to(dtype)
        across = (weight @ down.to(weight).T).to(dtype)
        change = 2 * across + self.scale * (up @ (down @ down.T))
        square = self.base_square + self.scale * (change * up).sum(dim=1)
        return square.clamp_min(torch.finfo(dtype).tiny).sqrt()

    def add_lora(self, out: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        magnitude = self.magnitude.to(self.base_square.dtype)
        # The start is exact only if both norms were rounded alike.
        norm = self.compute_norm().to(self.magnitude.dtype).to(magnitude.dtype)
        gain = magnitude / norm
        bias = getattr(self.base, "bias", None)
        direction = out if bias is None else out - bias.to(out.dtype)
        lora = functional.linear(hidden.to(out.dtype), self.up.to(out.dtype))
        change = (gain - 1).to(out.dtype) * direction + (gain * self.scale).to(out.dtype) * lora
        return out + self.strength * change


class SharedInput:
    """Down-products of LoRAs that read the same tensor, as one product with their rows stacked.

    x is read once instead of once for each module, and its gradient is one product instead of
    three and two sums of x's size. The modules still run one after the other: the first that
    meets a tensor computes for all, the others take their part if they are given that very tensor
    object under unchanged weights, and nothing is kept once each has taken its own. A module that
    comes with another tensor computes again, so that any order of calls is correct.
    """

    def __init__(self, layers: Sequence[LoraLinear]):
        self.layers = tuple(layers)
        self.x: torch.Tensor | None = None
        self.state: tuple[object, ...] = ()
        self.parts: dict[int, torch.Tensor] = {}

    def project(self, layer: LoraLinear, x: torch.Tensor) -> torch.Tensor:
        index = next(i for i, other in enumerate(self.layers) if other is layer)
        state = self.describe(x)
        if self.x is not x or self.state != state or index not in self.parts:
            down = torch.cat([other.down for other in self.layers]).to(x.dtype)
            sizes = [other.down.shape[0] for other in self.layers]
            hidden = functional.linear(x, down)
            self.x, self.state = x, state
            self.parts = dict(enumerate(hidden.split(sizes, dim=-1)))
        part = self.parts.pop(index)
        if not self.parts:
            self.release()
        return part

    def describe(self, x: torch.Tensor) -> tuple[object, ...]:
        """What has to be unchanged for a kept part to be valid."""
        modes = (torch.is_grad_enabled(), torch.is_autocast_enabled(x.device.type))
        if torch.compiler.is_compiling():  # a graph is traced from one forward: nothing changes
            return modes
        return (*modes, x._version, *(layer.lora_A._version for layer in self.layers))

    def release(self) -> None:
        self.x, self.state, self.parts = None, (), {}


def get_base_weight(base: AnyLinear) -> torch.Tensor:
    """The base weight (out, in) in a type that can be multiplied: stored so, or dequantised.

    A quantised module offers it as a method `dequantize()`, a quantised tensor likewise, and
    bitsandbytes' 4-bit ones carry the state that its own function needs.

    Raises:
        ConfigError: nothing of the kind.
    """
    if callable(getattr(base, "dequantize", None)):
        return base.dequantize().detach()
    if getattr(base.weight, "quant_state", None) is not None:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(base.weight.data, base.weight.quant_state)
    weight = gather(base.weight.detach())
    if type(weight).dequantize is not torch.Tensor.dequantize:  # torchao's, which claim to be bf16
        return weight.dequantize()
    shape = (base.out_features, base.in_features)
    if weight.dtype.is_floating_point and weight.dtype.itemsize >= 2 and weight.shape == shape:
        return weight
    raise ConfigError(
        "DoRA and PiSSA read the base weight, but {name} stores it as {weight_dtype} "
        "{weight_shape} without a dequantize(); choose plain LoRA, or load the base as bf16.",
        name=type(base).__name__,
        weight_dtype=str(weight.dtype).removeprefix("torch."),
        weight_shape=tuple(weight.shape),
    )


def gather(tensor: torch.Tensor) -> torch.Tensor:
    """A weight that FSDP sharded over processes, whole; all of them have to call this together."""
    if not hasattr(tensor, "full_tensor"):
        return tensor
    if tensor.dtype.itemsize > 1:
        return tensor.full_tensor()
    # As bytes: not everything that sends tensors knows fp8.
    from torch.distributed.tensor import DTensor

    sharded = cast(DTensor, tensor)
    codes = DTensor.from_local(
        *(sharded.to_local().view(torch.uint8), sharded.device_mesh, sharded.placements),
        shape=tensor.shape,
        stride=tensor.stride(),
    )
    return codes.full_tensor().view(tensor.dtype)
