"""Exact size of a safetensors file before it is written."""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch

from .safetensors_file import DTYPES

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
#: safetensors stores tensors by dtype in this order (its own list backwards), then by key.
_ORDER = (
    *("I64", "F64", "F32", "I32", "BF16", "F16", "I16"),
    *("F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"),
)
#: A safetensors file starts with the header's length, and pads the header to a multiple of it.
_LENGTH_BYTES = 8


def compute_file_size(
    state_dict: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> int:
    """Bytes of the file that `safetensors.torch.save_file` writes; tensors may be on device meta.

    The header repeats every tensor's offsets, so its length depends on their order in the file.
    """
    order = sorted(state_dict, key=lambda key: (_ORDER.index(_NAMES[state_dict[key].dtype]), key))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for key in order:
        tensor = state_dict[key]
        start, end = end, end + tensor.numel() * tensor.dtype.itemsize
        header[key] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":"))
    padded = -(-len(text.encode()) // _LENGTH_BYTES) * _LENGTH_BYTES
    return _LENGTH_BYTES + padded + end
