"""Adapters on disk: `read_adapter` and `write_adapter`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ..adapter.adapter import Adapter
from ..disk.safetensors_file import SafetensorsFile, read_signature
from ..disk.writing import explain, separate, write_then_rename
from ..errors import ConfigError, FileError, MissingFileError
from ..text import name_path, shorten
from .layouts import arrange_mlp
from .reading import read_modules
from .schemes import KeyScheme, build_lora_config, build_metadata, choose_scheme
from .state_dicts import check_metadata, check_numbers, check_state_dict

PEFT_FILE = "adapter_model.safetensors"
#: As diffusers' `save_lora_weights` names it in a separate folder, also on the Hub.
HUB_FILE = "pytorch_lora_weights.safetensors"
PEFT_CONFIG = "adapter_config.json"


def read_adapter(path: str | os.PathLike[str]) -> Adapter:
    """Opens an adapter file of any known key format.

    Only the header and the scalar alphas are read; every other tensor stays memory-mapped until
    it is needed.

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
    # Every adapter's file has the same name there; only its folder differs.
    is_alike = path.name == PEFT_FILE or (path.name == HUB_FILE and path != given)
    name = path.parent.name if is_alike else path.name
    modules, key_format, report = read_modules(file.tensors, file.metadata, path, name)
    return Adapter(modules, file.metadata, key_format, report, name, file)


def find_file(path: Path) -> Path:
    """The path itself, the file whose suffix was left out, or the one in an adapter's folder.

    Raises:
        FileError: there is nothing, or a folder without such a file.
    """
    try:
        read_signature(path)  # its error says why a path cannot be opened
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
        "{path} is a folder without {peft_file} and {hub_file}; expected a LoRA file, or a "
        "folder that holds one of these.",
        path=name_path(path),
        peft_file=PEFT_FILE,
        hub_file=HUB_FILE,
    )


def read_state_dict(
    state_dict: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str] | None = None,
    name: str = "state dict",
) -> Adapter:
    """Like `read_adapter`, for tensors in memory such as ComfyUI's LORA_MODEL.

    Raises:
        ConfigError: the metadata is no dict of texts.
        KeyFormatError: also what is no dict of plain tensors, or holds none of Qwen-Image.
        ShapeError: as `read_adapter`.
    """
    check_state_dict(state_dict, name)
    metadata = {} if metadata is None else metadata
    check_metadata(metadata, name)
    metadata = dict(metadata)
    modules, key_format, report = read_modules(state_dict, metadata, None, name)
    return Adapter(modules, metadata, key_format, report, name)


def build_state_dict(
    adapter: Adapter, key_format: str = "comfyui", mlp_layout: str | None = None
) -> dict[str, torch.Tensor]:
    """Every tensor of the adapter under the keys of `key_format`, bits unchanged.

    Args:
        mlp_layout: as in `write_adapter`.

    Raises:
        ConfigError: unknown format or layout, one that cannot express the adapter's kinds, or no
            modules.
    """
    scheme = choose_scheme(key_format, adapter, mlp_layout)
    return spell_modules(arrange_mlp(adapter, mlp_layout), scheme)


def spell_modules(adapter: Adapter, scheme: KeyScheme) -> dict[str, torch.Tensor]:
    if not adapter.modules:
        raise ConfigError(
            "{adapter} holds no modules, so there is nothing to write",
            adapter=shorten(adapter.name),
        )
    state_dict: dict[str, torch.Tensor] = {}
    for module_path, weights in adapter.modules.items():
        state_dict.update(scheme.spell(module_path, weights))
    return state_dict


def write_adapter(
    adapter: Adapter,
    path: str | os.PathLike[str],
    key_format: str = "comfyui",
    mlp_layout: str | None = None,
) -> Path:
    """Writes an adapter as safetensors, to a temporary name first, then renamed.

    Args:
        path: the file. For "peft" a file named `adapter_model.safetensors`, or the folder to
            write it to; PEFT's `adapter_config.json` is written next to it.
        key_format: "comfyui" and "kohya" carry alpha as tensors, "diffusers" in the header and
            "peft" in the config file.
        mlp_layout: "split", the default, or "fused" for families whose base models store the MLP
            in both ways, such as Qwen-Image-2.1. ComfyUI's own loader takes the default whole on
            both.

    Returns:
        The file that was written.

    Raises:
        ConfigError: unknown format or layout, one that cannot express the adapter's kinds, no
            modules, or metadata that no header can hold.
        KeyFormatError: a tensor without data, or another that no file can hold.
        FileError: the path is not a file name, or the folder or disk does not take the file;
            nothing is left behind.
    """
    path = check_name(path)
    scheme = choose_scheme(key_format, adapter, mlp_layout)
    if scheme.name == "peft" and path.name != PEFT_FILE:
        if path.suffix == ".safetensors":
            raise ConfigError(
                "PEFT reads a folder with {peft_file} and {peft_config}, not {path}; give the "
                "folder's name.",
                peft_file=PEFT_FILE,
                peft_config=PEFT_CONFIG,
                path=shorten(path.name),
            )
        path = path / PEFT_FILE
    check_metadata(adapter.metadata, adapter.name)
    adapter = arrange_mlp(adapter, mlp_layout)
    state_dict = spell_modules(adapter, scheme)
    check_state_dict(state_dict, adapter.name)
    check_numbers(state_dict, state_dict, adapter.name)
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
        raise FileError(
            "{path} cannot be written: {reason}.", path=shorten(path.name), reason=explain(e)
        ) from None
    return path


def check_name(path: str | os.PathLike[str]) -> Path:
    """Raises FileError for what names no file, or has a null character or half a surrogate pair."""
    try:
        found = Path(path)
        if found.name and b"\0" not in os.fsencode(found):
            return found
        shown = repr(shorten(found.name))
    except TypeError:
        shown = f"a {type(path).__name__}"
    except UnicodeEncodeError:
        shown = repr(shorten(found.name))
    raise FileError("{shown} is not a file name; expected one.", shown=shown)


def write_peft_config(lora_config: Mapping[str, object], path: Path) -> None:
    config = {"peft_type": "LORA", "task_type": None, **lora_config}
    text = json.dumps(config, indent=2, sort_keys=True)
    write_then_rename(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
