"""One weight of a base model as stored: codes, scales, and perhaps a rotation.

The formats are those that ComfyUI 0.30 writes and loads (comfy/quant_ops.py, QUANT_ALGOS, and
comfy/ops.py, _load_quantized_module); those of 4 bits are unpacked in `packed_weights`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from ..disk.safetensors_file import AnyTensor, load

#: Columns that share one scale in mxfp8.
MX_BLOCK = 32
#: Rows and columns of a tile in cuBLAS's layout of block scales.
TILE = (128, 4)

Scaling = Literal["none", "tensor", "row", "block"]


@dataclass(frozen=True, slots=True)
class BaseWeight:
    """One weight as stored and as it acts: values = stored * scale, rotated back."""

    stored: AnyTensor
    """(out, in), floating point or int8; may still be on disk, see `BaseWeights.find`."""
    scale: torch.Tensor | float | None
    """One number, (out, 1), or (out, in / 32) in mxfp8."""
    rotation: int = 0
    """Columns per group of a ConvRot rotation; 0 for none."""
    decoded_from: str = ""
    """What the file holds where `stored` is already decoded, e.g. "GGUF Q4_K"."""
    packed: str = ""
    """How the file packs what `stored` holds unpacked, e.g. "int4"; see `packed_weights`."""

    @property
    def scaling(self) -> Scaling:
        if self.scale is None:
            return "none"
        if not isinstance(self.scale, torch.Tensor) or self.scale.numel() == 1:
            return "tensor"
        return "row" if self.scale.numel() == self.stored.shape[0] else "block"

    @property
    def values(self) -> torch.Tensor:
        """float32 (out, in)."""
        values, scale = load(self.stored).float(), self.scale
        if isinstance(scale, torch.Tensor) and self.scaling == "block":
            values.unflatten(1, (-1, MX_BLOCK)).mul_(scale.float()[..., None])
        elif isinstance(scale, torch.Tensor):
            values = values * scale.float().reshape(-1, 1)
        elif scale is not None:
            values = values * scale
        return rotate(values, self.rotation)

    @property
    def storage(self) -> str:
        """E.g. "bfloat16", "scaled float8_e4m3fn", "row-wise int8", "GGUF Q4_K"."""
        if self.decoded_from:
            return self.decoded_from
        name = self.packed or str(self.stored.dtype).removeprefix("torch.")
        if self.rotation:
            return f"rotated {name}"
        if self.scaling == "block":
            return "mxfp8"
        return {"none": name, "tensor": f"scaled {name}", "row": f"row-wise {name}"}[self.scaling]

    def take_rows(self, rows: torch.Tensor) -> BaseWeight:
        """The weight of only these outputs."""
        scale = self.scale
        if isinstance(scale, torch.Tensor) and self.scaling in ("row", "block"):
            scale = scale[rows]
        return replace(self, stored=load(self.stored)[rows], scale=scale)

    def take_range(self, first: int, count: int) -> BaseWeight:
        """The same for consecutive outputs; the codes stay where they are."""
        rows = slice(first, first + count)
        stored, scale = self.stored, self.scale
        if isinstance(scale, torch.Tensor) and self.scaling in ("row", "block"):
            scale = scale[rows]
        if isinstance(stored, torch.Tensor):
            return replace(self, stored=stored[rows], scale=scale)
        return replace(self, stored=stored.take_rows(first, count), scale=scale)

    def to(self, device: torch.device | str) -> BaseWeight:
        scale = self.scale.to(device) if isinstance(self.scale, torch.Tensor) else self.scale
        return replace(self, stored=load(self.stored).to(device), scale=scale)


def rotate(values: torch.Tensor, group: int) -> torch.Tensor:
    """Multiplies every `group` columns by the regular Hadamard matrix; its own inverse.

    ConvRot's rotation (comfy_kitchen/tensor/int8_utils.py): Kronecker powers of the symmetric
    4 x 4 matrix with three 1 and one -1 in each row, here applied one factor at a time.
    """
    if not group:
        return values
    factor = (1 - 2 * torch.eye(4).flip(1)).to(values) / 2
    shape, values = values.shape, values.reshape(-1, group)
    for inner in (4**power for power in range(count_factors(group))):
        values = torch.einsum("gaib,ij->gajb", values.reshape(len(values), -1, 4, inner), factor)
        values = values.reshape(-1, group)
    return values.reshape(shape)


def count_factors(group: int) -> int:
    """n of 4^n; 0 where `group` is no power of 4."""
    factors = (group.bit_length() - 1) // 2
    return factors if factors > 0 and 4**factors == group else 0


def untile_scales(scales: torch.Tensor, rows: int, columns: int) -> torch.Tensor | None:
    """Block scales (rows, columns) out of cuBLAS's tiles; None if there are not as many.

    A tile of 128 x 4 is stored as 32 x 4 x 4: row r comes at (r % 32, r // 32). See NVIDIA's
    cuBLAS documentation, "1D Block Scaling Factors Layout".
    """
    high, wide = -(-rows // TILE[0]), -(-columns // TILE[1])
    if scales.numel() != high * wide * TILE[0] * TILE[1]:
        return None
    tiles = scales.reshape(high, wide, 32, 4, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(high * TILE[0], wide * TILE[1])[:rows, :columns]


def widen_exponents(scales: torch.Tensor) -> torch.Tensor:
    """E8M0, a byte that is a power of two, to float32."""
    return torch.exp2(scales.contiguous().view(torch.uint8).float() - 127)
