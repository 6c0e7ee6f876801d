"""Adapters on disk: `read_adapter` and `write_adapter`."""

from __future__ import annotations

import errno
import json
import os
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from .adapter import Adapter
from .errors import ConfigError, FileError, MissingFileError
from .formats.reading import read_modules
from .formats.schemes import build_lora_config, build_metadata, get_scheme
from .stored import SafetensorsFile, read_signature
from .text import shorten

PEFT_FILE = "adapter_model.safetensors"
#: As diffusers' `save_lora_weights` names it in a folder of its own, also on the Hub.
HUB_FILE = "pytorch_lora_weights.safetensors"
PEFT_CONFIG = "adapter_config.json"
#: For what must not fail; a scanner may take seconds over a checkpoint of gigabytes.
PATIENCE_S = 10.0
#: For what is soon done again, or is waited for.
BRIEF_PATIENCE_S = 1.0
RETRY_INTERVAL_S = 0.02
#: Of Windows, for a file or a part of it.
SHARING_VIOLATIONS = (32, 33)

T = TypeVar("T")


def read_adapter(path: str | os.PathLike[str]) -> Adapter:
    """Opens an adapter file of any known key format.

    Only the header and the scalar alphas are read; every other tensor stays memory-mapped until
    it is asked for.

    Args:
        path: a safetensors file, or a folder that PEFT's `save_pretrained` or diffusers'
            `save_lora_weights` wrote.

    Raises:
        FileError: missing, damaged, or not safetensors.
        KeyFormatError: no key belongs to Qwen-Image, or a module lacks a partner key.
        ShapeError: tensors of one module do not fit each other.
    """
    given = Path(path)
    path = find_file(given)
    file = SafetensorsFile(path)
    # Every adapter's file has the same name there; its folder tells them apart.
    is_alike = path.name == PEFT_FILE or (path.name == HUB_FILE and path != given)
    name = path.parent.name if is_alike else path.name
    modules, key_format, report = read_modules(file.tensors, file.metadata, path, name)
    return Adapter(modules, file.metadata, key_format, report, name, file)


def find_file(path: Path) -> Path:
    """The path itself, the file that lacks only its ending, or the one in an adapter's folder.

    Raises:
        FileError: there is nothing, or a folder without such a file.
    """
    try:
        read_signature(path)  # says in a sentence why a path cannot be opened
    except MissingFileError:
        named = path.with_name(f"{path.name}.safetensors")
        if not path.name or not os.path.isfile(named):  # noqa: PTH113 - never raises
            raise
        return named
    if not path.is_dir():
        return path
    for name in (PEFT_FILE, HUB_FILE):
        if (path / name).is_file():
            return path / name
    raise FileError(
        f"{shorten(path.name)} is a folder without {PEFT_FILE} and {HUB_FILE}; expected a LoRA "
        "file, or a folder that holds one of these."
    )


def read_state_dict(
    state_dict: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str] | None = None,
    name: str = "state dict",
) -> Adapter:
    """Like `read_adapter`, for tensors in memory such as ComfyUI's LORA_MODEL."""
    metadata = dict(metadata or {})
    modules, key_format, report = read_modules(state_dict, metadata, None, name)
    return Adapter(modules, metadata, key_format, report, name)


def build_state_dict(adapter: Adapter, key_format: str = "comfyui") -> dict[str, torch.Tensor]:
    """Every tensor of the adapter under the keys of `key_format`, bits unchanged.

    Raises:
        ConfigError: unknown format, one that cannot express the adapter's kinds, or no modules.
    """
    scheme = get_scheme(key_format)
    if not adapter.modules:
        raise ConfigError(f"{adapter.name} holds no modules, so there is nothing to write")
    state_dict: dict[str, torch.Tensor] = {}
    for module_path, weights in adapter.modules.items():
        state_dict.update(scheme.spell(module_path, weights))
    return state_dict


def write_adapter(
    adapter: Adapter, path: str | os.PathLike[str], key_format: str = "comfyui"
) -> Path:
    """Writes an adapter as safetensors, to a temporary name first, then renamed.

    Args:
        path: the file. For "peft" a file named `adapter_model.safetensors`, or the folder that
            shall hold it; PEFT's `adapter_config.json` is written beside it.
        key_format: "comfyui" and "kohya" carry alpha as tensors, "diffusers" in the header and
            "peft" in the config file.

    Returns:
        The file that was written.

    Raises:
        ConfigError: unknown format, one that cannot express the adapter's kinds, or no modules.
        FileError: the folder or disk does not take the file; nothing is left behind.
    """
    path = Path(path)
    check_name(path)
    scheme = get_scheme(key_format)
    if scheme.name == "peft" and path.name != PEFT_FILE:
        if path.suffix == ".safetensors":
            raise ConfigError(
                f"PEFT reads a folder with {PEFT_FILE} and {PEFT_CONFIG}, not {path.name}; "
                "give the folder's name."
            )
        path = path / PEFT_FILE
    state_dict = build_state_dict(adapter, key_format)
    title = path.parent.name if scheme.name == "peft" else path.stem
    title = title.encode("utf-8", "replace").decode()  # a name that is no UTF-8 on the disk
    metadata = build_metadata(adapter, scheme, title)
    lora_config = build_lora_config(adapter) if scheme.name == "peft" else None
    tensors = separate(state_dict)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_then_rename(path, lambda temporary: save_file(tensors, temporary, metadata))
        if lora_config is not None:
            write_peft_config(lora_config, path.with_name(PEFT_CONFIG))
    except (OSError, SafetensorError) as e:
        raise FileError(f"{shorten(path.name)} cannot be written: {explain(e)}.") from None
    return path


def check_name(path: Path) -> None:
    """Raises FileError for a name with a null character or half a surrogate pair."""
    try:
        if b"\0" not in os.fsencode(path):
            return
    except UnicodeEncodeError:
        pass
    raise FileError(f"{shorten(path.name)!r} is no name of a file; expected one.")


def separate(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous tensors, none of which shares its memory: safetensors refuses the others."""
    separated, seen = {}, set()
    for key, tensor in state_dict.items():
        tensor = tensor.contiguous()
        separated[key] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    return separated


def write_peft_config(lora_config: Mapping[str, object], path: Path) -> None:
    config = {"peft_type": "LORA", "task_type": None, **lora_config}
    text = json.dumps(config, indent=2, sort_keys=True)
    write_then_rename(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_then_rename(path: Path, write) -> None:
    """Calls `write(temporary_path)`, then moves the result into place; a failure leaves nothing."""
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(mode)  # safetensors lets nobody but the owner read
        replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def replace(source: Path, target: Path, patience_s: float = PATIENCE_S) -> None:
    """Renames a file over what has the name; see `insist`. OSError as `os.replace`."""
    insist(lambda: os.replace(source, target), patience_s)  # noqa: PTH105 - named alike


def rename(source: Path, target: Path) -> None:
    """Renames a folder, or a file to a name that is free; see `insist`. OSError as `os.rename`."""
    insist(lambda: os.rename(source, target))  # noqa: PTH104 - named alike


def insist(action: Callable[[], T], patience_s: float = PATIENCE_S) -> T:
    """What `action` gives, tried again as long as the system says that it is not permitted.

    Windows says so of a file that another process has open for the moment, be it this package in
    another process or a virus scanner in a folder of fresh files; a network drive may, too.

    Raises:
        PermissionError: still after `patience_s` seconds.
    """
    deadline = time.monotonic() + patience_s
    while True:
        try:
            return action()
        except PermissionError:
            if time.monotonic() > deadline:
                raise
            time.sleep(RETRY_INTERVAL_S)


def explain(error: Exception) -> str:
    number = getattr(error, "errno", None)
    text = str(error)
    if number == errno.ENOSPC or "No space left" in text:
        return "the disk is full; free some space and save again"
    if getattr(error, "winerror", None) in SHARING_VIOLATIONS:
        return "another program has it open; close that one and save again"
    if number in (errno.EACCES, errno.EROFS, errno.EPERM) or "Permission denied" in text:
        return "the folder is read-only; choose another one or change its permissions"
    if number == errno.ENAMETOOLONG or "File name too long" in text:
        return "the name is too long; choose a shorter one"
    return getattr(error, "strerror", None) or text
