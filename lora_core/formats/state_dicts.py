"""What a state dict and its metadata must be before anything is read from them, or written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ..disk.safetensors_file import AnyTensor, StoredTensor
from ..errors import ConfigError, KeyFormatError
from ..messages import message
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
            "{name} is a {type_name}; expected a dict of tensors by key.",
            name=shorten(name),
            type_name=type(state_dict).__name__,
        )
    for key, tensor in state_dict.items():
        if not isinstance(key, str):
            raise KeyFormatError(
                "{name} has a key that is a {type_name}; expected strings such as "
                "'transformer_blocks.0.attn.to_q.lora_A.weight'.",
                name=shorten(name),
                type_name=type(key).__name__,
            )
        if not is_unicode(key):
            raise KeyFormatError(
                "{name} has half a surrogate pair in the key {key!r}, which no file can hold; "
                "expected Unicode text.",
                name=shorten(name),
                key=shorten(key),
            )
        found = describe_unusual(tensor)
        if found is not None:
            raise KeyFormatError(
                "{name} holds {found} under {key!r}; expected a plain tensor that holds its "
                "numbers.",
                name=shorten(name),
                found=found,
                key=shorten(key),
            )


def describe_unusual(tensor: Any) -> str | None:
    """What it is instead of a plain tensor; None for one."""
    if isinstance(tensor, StoredTensor):
        return None
    if not isinstance(tensor, torch.Tensor):
        return message("a {name}", name=type(tensor).__name__)
    if tensor.is_meta:
        return message("a tensor without data (on the meta device)")
    if tensor.is_quantized:
        return message("a quantised tensor")
    if tensor.is_nested or tensor.layout != torch.strided:
        return message("a sparse or nested tensor")
    return None


def check_numbers(tensors: Mapping[str, AnyTensor], keys: Iterable[str], name: str) -> None:
    """Raises KeyFormatError where one of `keys` has a dtype that is not of real numbers."""
    for key in keys:
        dtype = tensors[key].dtype
        if dtype not in NUMBERS:
            raise KeyFormatError(
                "{name} stores {key!r} as {dtype}, which holds no plain numbers; expected bf16, "
                "fp16 or fp32. Export it again.",
                name=shorten(name),
                key=shorten(key),
                dtype=str(dtype).removeprefix("torch."),
            )


def check_metadata(metadata: Any, name: str) -> None:
    """Raises ConfigError where it is not what a file's header can hold: texts by texts."""
    if not isinstance(metadata, Mapping):
        raise ConfigError(
            "the metadata of {name} is a {type_name}; expected a dict of strings.",
            name=shorten(name),
            type_name=type(metadata).__name__,
        )
    for key, value in metadata.items():
        for text in (key, value):
            if not isinstance(text, str):
                raise ConfigError(
                    "the metadata of {name} has a {type_name} at {key!r}; expected strings only.",
                    name=shorten(name),
                    type_name=type(text).__name__,
                    key=shorten(str(key)),
                )
            if not is_unicode(text):
                raise ConfigError(
                    "the metadata of {name} has half a surrogate pair at {key!r}, which no file "
                    "can hold; expected Unicode text.",
                    name=shorten(name),
                    key=shorten(key),
                )


def is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
