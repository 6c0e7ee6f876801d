"""How a base weight is kept in memory: built row by row, so that it is never in memory twice.

| storage | a block's Linears | bytes a weight | error of a normal weight |
|---|---|---|---|
| fp32, bf16 | as such | 4, 2 | 0, 0.2 % |
| fp8 | e4m3 with a scale per row; a file's own fp8 unchanged | 1 | 2.7 % |
| int8 | with a scale per row; a file's own int8 unchanged | 1 | 0.8 % |
| nf4 | NormalFloat4, blocks of 64, double quantisation; modulation as int8 | 0.516 | 9.2 % |
| as stored | what the file holds; a GGUF's codes are slow to decode | | 0 |

Everything outside the blocks (0.3 % of the weights) is kept in the compute dtype. nf4 is
bitsandbytes' (Dettmers et al. 2023, arXiv 2305.14314), GGUF's codes diffusers'; a scale per row
needs no library, and ComfyUI's own fp8 and int8 files are of the same kind.

Modulation is a third of all weights (6.8 of 20.4 billion) and scales whole streams, so nf4 keeps it
in 8 bits: 3.3 GB more.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...base_model.base_weight import BaseWeight
from ...base_model.gguf_file import GgufFile
from ...base_model.module_paths import split_path
from ...base_model.qwen_image import MODULATION_IMAGE, MODULATION_TEXT
from ...errors import ConfigError, FileError
from ...messages import message
from .frozen_linear import FrozenLinear, build_scaled_linear
from .weight_reader import WeightReader

AS_STORED = "as stored"
STORAGES = ("bf16", "fp32", "fp8", "int8", "nf4", AS_STORED)
PLAIN = {"bf16": torch.bfloat16, "fp32": torch.float32}
EIGHT_BITS = {"fp8": (torch.float8_e4m3fn, torch.float8_e5m2), "int8": (torch.int8,)}
#: Shown where a GGUF is kept as stored; tests/lora_core/training/model/test_gguf.py counts the
#: bytes.
GGUF_COST = message(
    'storage is "as stored", so the GGUF\'s own codes are kept: decoding them moves 11 to 48 '
    "bytes a weight each time a Linear runs (fp8 7, nf4 3), which makes steps slow; choose "
    "fp8 or nf4 for faster ones"
)
NF4_BLOCK = 64
NF4_NESTED_BLOCK = 256


def check_storage(storage: str) -> None:
    """Raises ConfigError for an unknown storage, or one whose library is missing."""
    if storage not in STORAGES:
        raise ConfigError(
            "unknown storage {storage!r}; expected one of {storages}",
            storage=storage,
            storages=", ".join(STORAGES),
        )
    if storage == "nf4":
        import_bitsandbytes()


def choose_storage(module_path: str, storage: str) -> str:
    """The storage of one module of a model that is kept in `storage`; "compute" outside blocks."""
    block, name = split_path(module_path)
    if block is None:
        return "compute"
    is_modulation = name in MODULATION_IMAGE or name in MODULATION_TEXT
    return "int8" if storage == "nf4" and is_modulation else storage


def build_linear(
    reader: WeightReader, module_path: str, storage: str, compute_dtype: torch.dtype
) -> nn.Module:
    """One Linear of the base on the reader's device: nn.Linear where nothing is converted on use.

    Raises:
        FileError: the file stores it in an unsupported way.
    """
    bias = reader.read_parameter(f"{module_path}.bias", compute_dtype)
    storage = choose_storage(module_path, storage)
    what = message("{key} in {file}", key=f"{module_path}.weight", file=reader.base.name)
    file = reader.base.file
    if storage == AS_STORED and isinstance(file, GgufFile):
        linear = build_gguf_linear(reader, file, module_path, bias, what)
        if linear is not None:
            return linear
    weight = reader.base.read_weight(module_path)
    if is_kept(weight, storage):
        rotation = reader.get_rotation(weight.rotation)
        return build_scaled_linear(reader.copy_codes(weight, what), bias, rotation)
    shape, chunks = weight.stored.shape, reader.read_values(weight, what)
    if storage == "nf4":
        return build_nf4_linear(shape, chunks, bias)
    if storage in EIGHT_BITS:
        dtype = EIGHT_BITS[storage][0]
        return build_scaled_linear(quantize_rows(shape, chunks, dtype, reader.device), bias)
    dtype = weight.stored.dtype if weight.scaling == "none" else compute_dtype
    dtype = {"compute": compute_dtype, **PLAIN}.get(storage, dtype)
    values = gather_rows(shape, chunks, dtype, reader.device)
    if dtype != compute_dtype:
        return build_scaled_linear(BaseWeight(values, None), bias)
    return build_plain_linear(values, bias)


def is_kept(weight: BaseWeight, storage: str) -> bool:
    """Whether the file's own codes are what is asked for."""
    if storage == AS_STORED:
        return weight.stored.dtype.itemsize == 1
    return weight.stored.dtype in EIGHT_BITS.get(storage, ())


def gather_rows(
    shape: torch.Size,
    chunks: Iterator[tuple[slice, torch.Tensor]],
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    values = torch.empty(shape, dtype=dtype, device=device)
    for rows, chunk in chunks:
        values[rows] = chunk
    return values


def quantize_rows(
    shape: torch.Size,
    chunks: Iterator[tuple[slice, torch.Tensor]],
    dtype: torch.dtype,
    device: torch.device,
) -> BaseWeight:
    """Symmetric, one scale per row that maps its largest entry to the largest code."""
    is_float = dtype.is_floating_point
    limit = torch.finfo(dtype).max if is_float else torch.iinfo(dtype).max
    stored = torch.empty(shape, dtype=dtype, device=device)
    scale = torch.empty(len(stored), 1, device=device)
    for rows, chunk in chunks:
        scale[rows] = chunk.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / limit
        codes = (chunk / scale[rows]).clamp_(-limit, limit)
        stored[rows] = (codes if is_float else codes.round_()).to(dtype)
    return BaseWeight(stored, scale)


def build_plain_linear(values: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    linear = nn.Linear(1, 1, device="meta")
    linear.out_features, linear.in_features = values.shape
    linear.weight = nn.Parameter(values, requires_grad=False)
    linear.register_parameter(
        "bias", None if bias is None else nn.Parameter(bias, requires_grad=False)
    )
    return linear


@dataclass(frozen=True)
class Nf4Codes:
    """Two 4-bit codes a byte, a scale a block, the scales in 8 bits themselves."""

    shape: tuple[int, int]

    def __call__(
        self,
        dtype: torch.dtype,
        packed: torch.Tensor,
        absmax: torch.Tensor,
        code: torch.Tensor,
        offset: torch.Tensor,
        nested_absmax: torch.Tensor,
        nested_code: torch.Tensor,
    ) -> torch.Tensor:
        functional = import_bitsandbytes().functional
        nested = functional.QuantState(
            nested_absmax, code=nested_code, blocksize=NF4_NESTED_BLOCK, dtype=torch.float32
        )
        # As one row: on the CPU bitsandbytes 0.50 misreads widths that are no multiple of a block.
        size = torch.Size([self.shape[0] * self.shape[1]])
        state = functional.QuantState(
            *(absmax, size, code, NF4_BLOCK, "nf4", dtype, offset, nested)
        )
        return functional.dequantize_4bit(packed, state).view(self.shape)


def build_nf4_linear(
    shape: torch.Size, chunks: Iterator[tuple[slice, torch.Tensor]], bias: torch.Tensor | None
) -> FrozenLinear:
    """What `quantize_4bit` makes of the whole weight, which would take it 16 bytes an entry."""
    functional = import_bitsandbytes().functional
    parts = [
        functional.quantize_4bit(chunk.flatten(), blocksize=NF4_BLOCK, quant_type="nf4")
        for _, chunk in chunks
    ]
    absmax = torch.cat([state.absmax for _, state in parts])
    offset = absmax.mean()
    nested, nested_state = functional.quantize_blockwise(
        absmax - offset, blocksize=NF4_NESTED_BLOCK
    )
    codes = {
        "weight": torch.cat([packed for packed, _ in parts]),
        "absmax": nested,
        "code": parts[0][1].code,
        "offset": offset,
        "nested_absmax": nested_state.absmax,
        "nested_code": nested_state.code,
    }
    rows, columns = shape
    return FrozenLinear(rows, columns, Nf4Codes((rows, columns)), codes, bias)


def import_bitsandbytes() -> Any:
    try:
        import bitsandbytes
    except ImportError:
        raise ConfigError(
            "nf4 needs the bitsandbytes package, which is not installed; run pip install "
            "bitsandbytes, or choose fp8 or int8."
        ) from None
    return bitsandbytes


@dataclass(frozen=True)
class GgufCodes:
    """A GGUF's own blocks of codes and scales, (out, bytes of a row)."""

    kind: int

    def __call__(self, dtype: torch.dtype, codes: torch.Tensor) -> torch.Tensor:
        gguf_utils = import_gguf_kernels()
        block, num_bytes = gguf_utils.GGML_QUANT_SIZES[self.kind]
        decode = gguf_utils.dequantize_functions[self.kind]
        # In its scales' own float16 it would round each value to that.
        values = decode(codes.reshape(-1, num_bytes), block, num_bytes, dtype=torch.float32)
        return values.reshape(len(codes), -1).to(dtype)


def build_gguf_linear(
    reader: WeightReader, file: GgufFile, module_path: str, bias: torch.Tensor | None, what: str
) -> FrozenLinear | None:
    """None for a tensor that is not quantised."""
    base = reader.base
    key = f"{base.prefix}{module_path}.weight"
    entry = file.entries[key]
    gguf_utils = import_gguf_kernels()
    kind = gguf_utils.gguf.GGMLQuantizationType(entry.kind)
    if kind in gguf_utils.UNQUANTIZED_TYPES:
        return None
    if kind not in gguf_utils.dequantize_functions:
        raise FileError(
            "{base} stores {module_path} as {kind}, which diffusers cannot compute with; choose "
            "bf16, fp8, int8 or nf4 as storage, or a file with another quantisation.",
            base=base.name,
            module_path=module_path,
            kind=kind.name,
        )
    codes = file.read_codes(key).to(reader.device)
    rows, columns = entry.shape
    linear = FrozenLinear(rows, columns, GgufCodes(entry.kind), {"weight": codes}, bias)
    reader.check(linear.dequantize(), what)
    return linear


def is_gguf_kept(module: nn.Module) -> bool:
    """Whether its weight is a GGUF's own codes."""
    return isinstance(module, FrozenLinear) and isinstance(module.decode, GgufCodes)


def import_gguf_kernels() -> Any:
    from diffusers.quantizers.gguf import utils

    return utils
