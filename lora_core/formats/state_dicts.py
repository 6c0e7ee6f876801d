"""What a state dict and its metadata must be before anything is read from them, or written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ..disk.safetensors_file import AnyTensor, StoredTensor
from ..errors import ConfigError, KeyFormatError
from ..text import shorten

#: Dtypes with one real number in each entry. Some came with PyTorch 2.7; what else there is (of
#: complex numbers, of several numbers in a byte) is no weight of a model.
NUMBERS = frozenset(
    getattr(torch, name)
    for name in (
        *("float64", "float32", "bfloat16", "float16"),
        *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"),
        *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool"),
    )
    if hasattr(torch, name)
)


def check_state_dict(state_dict: Any, name: str) -> None:
    """Raises KeyFormatError where it is no mapping of texts to tensors that hold their data."""
    if not isinstance(state_dict, Mapping):
        raise KeyFormatError(
            f"{shorten(name)} is a {type(state_dict).__name__}; expected a dict of tensors by key."
        )
    for key, tensor in state_dict.items():
        if not isinstance(key, str):
            raise KeyFormatError(
                f"{shorten(name)} has a key that is a {type(key).__name__}; expected strings such "
                "as 'transformer_blocks.0.attn.to_q.lora_A.weight'."
            )
        if not is_unicode(key):
            raise KeyFormatError(
                f"{shorten(name)} has half a surrogate pair in the key {shorten(key)!r}, which no "
                "file can hold; expected Unicode text."
            )
        found = describe_unusual(tensor)
        if found is not None:
            raise KeyFormatError(
                f"{shorten(name)} holds {found} under {shorten(key)!r}; expected a plain tensor "
                "that holds its numbers."
            )


def describe_unusual(tensor: Any) -> str | None:
    """What it is instead of a plain tensor; None for one."""
    if isinstance(tensor, StoredTensor):
        return None
    if not isinstance(tensor, torch.Tensor):
        return f"a {type(tensor).__name__}"
    if tensor.is_meta:
        return "a tensor without data (on the meta device)"
    if tensor.is_quantized:
        return "a quantised tensor"
    if tensor.is_nested or tensor.layout != torch.strided:
        return "a sparse or nested tensor"
    return None


def check_numbers(tensors: Mapping[str, AnyTensor], keys: Iterable[str], name: str) -> None:
    """Raises KeyFormatError where one of `keys` has a dtype that is not of real numbers."""
    for key in keys:
        dtype = tensors[key].dtype
        if dtype not in NUMBERS:
            raise KeyFormatError(
                f"{shorten(name)} stores {shorten(key)!r} as {str(dtype).removeprefix('torch.')}, "
                "which holds no plain numbers; expected bf16, fp16 or fp32. Export it again."
            )


def check_metadata(metadata: Any, name: str) -> None:
    """Raises ConfigError where it is not what a file's header can hold: texts by texts."""
    if not isinstance(metadata, Mapping):
        raise ConfigError(
            f"the metadata of {shorten(name)} is a {type(metadata).__name__}; expected a dict of "
            "strings."
        )
    for key, value in metadata.items():
        for text in (key, value):
            if not isinstance(text, str):
                raise ConfigError(
                    f"the metadata of {shorten(name)} has a {type(text).__name__} at "
                    f"{shorten(str(key))!r}; expected strings only."
                )
            if not is_unicode(text):
                raise ConfigError(
                    f"the metadata of {shorten(name)} has half a surrogate pair at "
                    f"{shorten(key)!r}, which no file can hold; expected Unicode text."
                )


def is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
