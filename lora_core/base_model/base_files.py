"""Where base weights come from: ComfyUI's single file, a GGUF, or a diffusers folder.

All three are seen as one mapping of keys to tensors that stay on disk until one is asked for.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..disk.json_reader import describe_kind, read_object
from ..disk.regular_files import open_regular
from ..disk.safetensors_file import BASE_MODEL, AnyTensor, UnmappedFile
from ..errors import FileError, KeyFormatError, MissingFileError, get_reason
from ..text import name_path, shorten
from .base_weight import BaseWeight
from .base_weights import PACKED_PARTS, SCALE_NAMES, BaseWeights
from .gguf_file import GgufFile

#: ComfyUI's marker of 2511 (comfy/model_detection.py); a tensor without content.
MARKER = "__index_timestep_zero__"

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
#: What quantised files store next to weights that is no weight itself.
SIDE_NAMES = (*SCALE_NAMES, *PACKED_PARTS, "comfy_quant", "input_scale", "scale_input")
SIDE_KEYS = ("scaled_fp8", MARKER)


class Shards:
    """Several safetensors files that hold one model.

    Raises:
        FileError: one is damaged, or two hold the same tensor.
    """

    def __init__(self, paths: Sequence[Path], name: str):
        self.name = name
        self.files = [UnmappedFile(path, BASE_MODEL) for path in paths]
        self.metadata: dict[str, str] = {}
        self.tensors: dict[str, AnyTensor] = {}
        for file in self.files:
            for key, tensor in file.tensors.items():
                if key in self.tensors:
                    raise FileError(
                        "{name} holds {key} in two files, and it is unclear which is meant; "
                        "keep one model's files there and remove the others.",
                        name=shorten(name),
                        key=shorten(key),
                    )
                self.tensors[key] = tensor

    def release(self) -> None:
        for file in self.files:
            file.release()


class BaseFile:
    """A base model on disk.

    Attributes:
        weights: the same one weight at a time.
        prefix: in front of every key, such as "model.diffusion_model.".
        shapes: key without prefix -> shape, of every tensor that is a weight.
        axes: the folder's RoPE axes as its config.json has them; None where it has none.
        zero_cond_t: whether it is marked as a 2511.

    Raises:
        KeyFormatError: it holds no Qwen-Image transformer.
        FileError: zero_cond_t in its config.json is neither true nor false.
    """

    def __init__(
        self, file: UnmappedFile | Shards | GgufFile, config: Mapping[str, Any] | None = None
    ):
        config = config or {}
        self.name = file.name
        self.file = file
        self.weights = BaseWeights(file.tensors, file.name, file)
        self.prefix = self.weights.prefix
        self.tensors = {
            key.removeprefix(self.prefix): tensor
            for key, tensor in file.tensors.items()
            if key.startswith(self.prefix)
        }
        self.shapes = {
            key: tensor.shape
            for key, tensor in self.tensors.items()
            if key not in SIDE_KEYS and key.rpartition(".")[2] not in SIDE_NAMES
        }
        self.axes = config.get("axes_dims_rope")
        self.zero_cond_t = read_marker(config, MARKER in self.tensors)

    def read_weight(self, module_path: str) -> BaseWeight:
        """A Linear's weight as stored; its codes are still on disk, see `StoredTensor.load_rows`.

        Raises:
            FileError: stored in an unsupported way.
            KeyFormatError: the file has none of that name.
        """
        weight = self.weights.find(module_path)
        if weight is None:
            raise KeyFormatError(
                "{name} lacks {module_path}; choose a complete diffusion model of Qwen-Image-Edit.",
                name=shorten(self.name),
                module_path=module_path,
            )
        if weight.packed:
            raise FileError(
                "{name} stores {module_path} as {packed}, which training cannot read here yet; "
                "choose a bf16, fp8, int8 or GGUF file of the same model.",
                name=shorten(self.name),
                module_path=module_path,
                packed=weight.packed,
            )
        return weight

    def read_tensor(self, key: str) -> torch.Tensor | None:
        """A bias or norm, on the CPU, as stored; None if the file has none of that name."""
        return self.weights.get_tensor(key)

    def is_packed(self, key: str) -> bool:
        """Whether its shape is that of packed codes, which `read_weight` judges."""
        return self.tensors[key].dtype == torch.uint8

    def release(self) -> None:
        """Closes the file, so that it can be replaced; the next read opens it again."""
        self.file.release()


def open_base_file(source: str | os.PathLike[str]) -> BaseFile:
    """Opens any supported format; only headers are read.

    Raises:
        FileError: it is missing, damaged or of another type.
        KeyFormatError: it holds no Qwen-Image transformer.
        ConfigError: it is a GGUF and the gguf package is missing.
    """
    path = Path(source)
    if os.path.isdir(path):  # noqa: PTH112 - Path.is_dir may raise, for a name that is too long
        return open_folder(path)
    if is_gguf(path):
        return BaseFile(GgufFile(path))
    return BaseFile(UnmappedFile(path, BASE_MODEL))


def is_gguf(path: Path) -> bool:
    """By the first bytes.

    Raises:
        FileError: it is missing, or cannot be opened.
    """
    try:
        with open_regular(path) as file:
            return file.read(4) == b"GGUF"
    except MissingFileError:
        raise MissingFileError(
            "{path} does not exist; expected a diffusion model of Qwen-Image-Edit, as a "
            ".safetensors or .gguf file or a diffusers folder.",
            path=shorten(path.name),
        ) from None
    except OSError as e:
        raise FileError(
            "{path} cannot be read: {reason}.", path=shorten(path.name), reason=get_reason(e)
        ) from None


def open_folder(folder: Path) -> BaseFile:
    """A diffusers model folder, or a pipeline's with the model in `transformer`."""
    folder = find_model_folder(folder)
    paths = list_shards(folder)
    config = read_downloaded(folder / CONFIG) if (folder / CONFIG).is_file() else None
    return BaseFile(Shards(paths, folder.absolute().name), config)


def find_model_folder(folder: Path) -> Path:
    """The folder itself, or `transformer` in it if only that one is a model's."""
    inner = folder / "transformer"
    return inner if not (folder / CONFIG).is_file() and (inner / CONFIG).is_file() else folder


def list_base_files(source: str | os.PathLike[str]) -> list[Path]:
    """What `open_base_file` reads: the file itself, or a folder's shards and configuration.

    Raises:
        FileError: as `open_base_file`.
    """
    path = Path(source)
    if not os.path.isdir(path):  # noqa: PTH112 - see open_base_file
        return [path]
    folder = find_model_folder(path)
    configs = [folder / CONFIG] if (folder / CONFIG).is_file() else []
    return [*list_shards(folder), *configs]


def list_shards(folder: Path) -> list[Path]:
    """The files that the index names; without one the single file, or all there are.

    Raises:
        FileError: there is none, or the index is damaged or names one that is missing.
    """
    paths = find_shards(folder)
    if not paths:
        raise FileError(
            "{folder} holds no .safetensors file; expected a diffusers folder with {weights} or "
            "its numbered parts.",
            folder=name_path(folder),
            weights=WEIGHTS,
        )
    return paths


def find_shards(folder: Path) -> list[Path]:
    index = folder / f"{WEIGHTS}.index.json"
    if index.is_file():
        weight_map = read_downloaded(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise FileError(
                "{index} has no weight_map; download or copy it again.", index=index.name
            )
        there = list_names(folder)
        names = dict.fromkeys(name if type(name) is str else "" for name in weight_map.values())
        # Only names of files in the same folder: paths that lead elsewhere are not followed.
        missing = [name for name in names if name not in there]
        if missing:
            raise FileError(
                "{folder} lacks {missing}, one of the {num_names} files that its index names; "
                "download or copy it again.",
                folder=shorten(folder.name),
                missing=shorten(missing[0]) or "a file",
                num_names=len(names),
            )
        return [folder / name for name in sorted(names)]
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    return sorted(folder.glob("*.safetensors"))


def list_names(folder: Path) -> set[str]:
    try:
        return {path.name for path in folder.iterdir()}
    except OSError as e:
        raise FileError(
            "{folder} cannot be listed: {reason}.",
            folder=shorten(folder.name),
            reason=get_reason(e),
        ) from None


def read_downloaded(path: Path) -> dict[str, Any]:
    """A JSON object from a downloaded folder.

    Raises:
        FileError: as `read_object`, with what to do.
    """
    try:
        return read_object(path)
    except FileError as e:
        raise FileError("{error} Download or copy it again.", error=e) from None


def read_marker(config: Mapping[str, Any], default: bool) -> bool:
    """Whether references are shown at noise level 0, according to config.json."""
    value = config.get("zero_cond_t")
    if value is None:
        return default
    if not isinstance(value, bool):
        raise FileError(
            "{config}'s zero_cond_t is {value}; expected true or false. Download or copy "
            "{config} again.",
            config=CONFIG,
            value=describe_kind(value),
        )
    return value
