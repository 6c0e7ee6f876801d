"""Weights of 4 bits in ComfyUI's files: two numbers in a byte, decoded a few rows at a time.

The formats are those that comfy-kitchen writes (comfy_kitchen/tensor/convrot_w4a4.py, nvfp4.py and
asym_w4a8_int8.py) under the names of comfy/quant_ops.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..disk.safetensors_file import AnyTensor, StoredTensor, load
from .base_weight import BaseWeight, count_factors, untile_scales

W4A4, W4A8, NVFP4 = "convrot_w4a4", "asym_w4a8_int8", "nvfp4"
#: Name in a file -> how it is shown.
PACKED_FORMATS = {W4A4: "int4", W4A8: "w4a8", NVFP4: "nvfp4"}
#: Columns of a rotation where the note names none, and of a group with a scale of its own.
ROTATION_GROUP, W4A8_GROUP, NVFP4_BLOCK = 256, 16, 16
#: Values of e2m1, a sign, two bits of exponent and one of mantissa, by their 4 bits.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
CODEBOOK_ENTRIES = 16

FindPart = Callable[[str], AnyTensor | None]
"""Name next to the weight, such as "weight_scale" -> the tensor."""


@dataclass(frozen=True, eq=False)
class PackedFile:
    """What a `StoredTensor` of decoded numbers is read from: packed ones, wherever they are."""

    packed: AnyTensor
    decode: Callable[[torch.Tensor, slice], torch.Tensor]
    """(packed rows, which rows they are) -> the decoded rows."""

    def read(self, key: str) -> torch.Tensor:
        return self.read_rows(key, slice(None))

    def read_rows(self, key: str, rows: slice, buffer: torch.Tensor | None = None) -> torch.Tensor:
        rows = slice(*rows.indices(self.packed.shape[0])[:2])
        packed = self.packed
        if isinstance(packed, StoredTensor):
            return self.decode(packed.load_rows(rows).cpu(), rows)
        return self.decode(packed[rows].detach().cpu(), rows)


def read_packed(
    stored: AnyTensor, kind: str, find_part: FindPart, note: Mapping[str, Any]
) -> BaseWeight | None:
    """A weight of one of PACKED_FORMATS; its codes stay where they are. None if parts are wrong."""
    if stored.ndim != 2 or stored.dtype not in (torch.int8, torch.uint8):
        return None
    read = {W4A4: read_w4a4, W4A8: read_w4a8, NVFP4: read_nvfp4}[kind]
    return read(stored, find_part, note)


def read_w4a4(stored: AnyTensor, find_part: FindPart, note: Mapping[str, Any]) -> BaseWeight | None:
    """Whole numbers of 4 bits with a sign, one scale per row, rotated."""
    scale = find_row_scale(find_part, "weight_scale", stored.shape[0])
    rotation = read_group(note, "convrot_groupsize", ROTATION_GROUP)
    if scale is None or not is_rotatable(stored, rotation):
        return None
    codes = build_stored(stored, torch.int8, lambda packed, rows: unpack_signed(packed))
    return BaseWeight(codes, scale, rotation, packed=PACKED_FORMATS[W4A4])


def read_w4a8(stored: AnyTensor, find_part: FindPart, note: Mapping[str, Any]) -> BaseWeight | None:
    """Places in a table of 16 numbers; times a scale per group, rounded, they are int8 codes."""
    scale = find_row_scale(find_part, "weight_s_channel", stored.shape[0])
    table, groups = find_part("weight_codebook"), find_part("weight_s_rel")
    rotation = read_group(note, "convrot_groupsize", ROTATION_GROUP)
    group = read_group(note, "group_size", W4A8_GROUP)
    if scale is None or table is None or groups is None or not is_rotatable(stored, rotation):
        return None
    columns = 2 * stored.shape[1]
    expected = (stored.shape[0], columns // group) if group and columns % group == 0 else None
    # A correction would be added to groups, which no scale of rows can express.
    has_correction = find_part("weight_correction") is not None
    is_known = table.numel() == CODEBOOK_ENTRIES and table.dtype.is_floating_point
    if has_correction or not is_known or tuple(groups.shape) != expected:
        return None
    entries = load(table).detach().cpu().flatten().float()

    def decode(packed: torch.Tensor, rows: slice) -> torch.Tensor:
        scales = as_e4m3(load(groups).detach().cpu()[rows])
        values = entries[unpack(packed).int()].unflatten(1, (-1, group))
        return values.mul_(scales[..., None]).round_().clamp_(-127, 127).flatten(1).to(torch.int8)

    codes = build_stored(stored, torch.int8, decode)
    return BaseWeight(codes, scale, rotation, packed=PACKED_FORMATS[W4A8])


def read_nvfp4(
    stored: AnyTensor, find_part: FindPart, note: Mapping[str, Any]
) -> BaseWeight | None:
    """e2m1 numbers, one e4m3 scale per 16 columns in cuBLAS's tiles, and one for all of them."""
    blocks, whole = find_part("weight_scale"), find_part("weight_scale_2")
    rows, columns = stored.shape[0], 2 * stored.shape[1]
    if blocks is None or whole is None or whole.numel() != 1 or columns % NVFP4_BLOCK:
        return None
    if (
        blocks.dtype.itemsize != 1
        or untile_scales(torch.empty(blocks.shape, device="meta"), rows, columns // NVFP4_BLOCK)
        is None
    ):
        return None
    scale = load(whole).detach().cpu().float()
    values = torch.tensor([*E2M1, *(-value for value in E2M1)])

    def decode(packed: torch.Tensor, wanted: slice) -> torch.Tensor:
        tiles = as_e4m3(load(blocks).detach().cpu())
        scales = untile_scales(tiles, rows, columns // NVFP4_BLOCK)
        assert scales is not None  # seen above
        numbers = values[unpack(packed, is_high_first=True).int()]
        scaled = numbers.unflatten(1, (-1, NVFP4_BLOCK)) * (scale * scales[wanted])[..., None]
        return scaled.flatten(1)

    decoded = build_stored(stored, torch.float32, decode)
    name = PACKED_FORMATS[NVFP4]
    return BaseWeight(decoded, None, decoded_from=name, packed=name)


def build_stored(
    packed: AnyTensor,
    dtype: torch.dtype,
    decode: Callable[[torch.Tensor, slice], torch.Tensor],
) -> StoredTensor:
    rows, columns = packed.shape
    return StoredTensor(PackedFile(packed, decode), "", torch.Size((rows, 2 * columns)), dtype)


def unpack(packed: torch.Tensor, is_high_first: bool = False) -> torch.Tensor:
    """uint8 (rows, 2 * columns) of 0 to 15 out of the two halves of every byte."""
    bits = packed.contiguous().view(torch.uint8)
    halves = [bits & 0xF, bits >> 4]
    return torch.stack(halves[::-1] if is_high_first else halves, dim=-1).flatten(1)


def unpack_signed(packed: torch.Tensor) -> torch.Tensor:
    """int8 of -8 to 7, in two's complement of 4 bits."""
    codes = unpack(packed).to(torch.int8)
    return torch.where(codes > 7, codes - 16, codes)


def as_e4m3(scales: torch.Tensor) -> torch.Tensor:
    """float32; some files store these bytes without their type."""
    return scales.contiguous().view(torch.float8_e4m3fn).float()


def find_row_scale(find_part: FindPart, name: str, rows: int) -> torch.Tensor | None:
    """float32 (rows, 1); None where there is none of that length."""
    scale = find_part(name)
    if scale is None or scale.numel() != rows or not scale.dtype.is_floating_point:
        return None
    return load(scale).detach().cpu().float().reshape(-1, 1)


def read_group(note: Mapping[str, Any], name: str, default: int) -> int:
    """A number of columns, from the note or below its "params"; 0 where it is none."""
    inner = note.get("params")
    both = {**(inner if isinstance(inner, dict) else {}), **note}
    value = both.get(name, default)
    return value if type(value) is int and value > 0 else 0


def is_rotatable(packed: AnyTensor, group: int) -> bool:
    return bool(group and count_factors(group)) and 2 * packed.shape[1] % group == 0
