"""Where base weights come from: ComfyUI's single file, a GGUF, or a diffusers folder.

All three are seen as one mapping of keys to tensors that stay on disk until one is asked for.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..base_weights import SCALE_NAMES, BaseWeights, find_prefix
from ..errors import FileError
from ..stored import AnyTensor, UnmappedFile
from ..stored_weight import BaseWeight
from .architecture import MARKER
from .gguf_file import GgufFile

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
#: What lies beside weights in quantised files and is no weight itself.
SIDE_NAMES = (*SCALE_NAMES, "comfy_quant", "input_scale", "scale_input")
SIDE_KEYS = ("scaled_fp8", MARKER)


class Shards:
    """Several safetensors files that hold one model."""

    def __init__(self, paths: Sequence[Path], name: str):
        self.name = name
        self.files = [UnmappedFile(path) for path in paths]
        self.metadata: dict[str, str] = {}
        self.tensors: dict[str, AnyTensor] = {}
        for file in self.files:
            self.tensors |= file.tensors

    def release(self) -> None:
        for file in self.files:
            file.release()


class BaseFile:
    """A base model on disk.

    Attributes:
        prefix: in front of every key, such as "model.diffusion_model.".
        shapes: key without prefix -> shape, of every tensor that is a weight.
        axes: the folder's RoPE axes; None where nothing says.
        zero_cond_t: whether it is marked as a 2511.
    """

    def __init__(
        self, file: UnmappedFile | Shards | GgufFile, config: Mapping[str, Any] | None = None
    ):
        config = config or {}
        self.name = file.name
        self.file = file
        self.prefix = find_prefix(file.tensors, file.name)
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
        self.zero_cond_t = bool(config.get("zero_cond_t", MARKER in self.tensors))
        self._weights = BaseWeights(file.tensors, file.name, file)

    def read_weight(self, module_path: str) -> BaseWeight:
        """A Linear's weight as stored; its codes are still on disk, see `StoredTensor.load_rows`.

        Raises:
            FileError: stored in a way that is not understood.
        """
        weight = self._weights.find(module_path)
        if weight is None:
            raise KeyError(module_path)
        return weight

    def read_tensor(self, key: str) -> torch.Tensor:
        """A bias or norm, on the CPU, as stored."""
        return self._weights.get_tensor(key)

    def is_packed(self, key: str) -> bool:
        """Whether its shape is that of packed codes, which `read_weight` judges."""
        return self.tensors[key].dtype == torch.uint8

    def release(self) -> None:
        """Closes the file, so that it can be replaced; the next read opens it again."""
        self.file.release()


def open_base_file(source: str | os.PathLike[str]) -> BaseFile:
    """Opens whatever is there; only headers are read.

    Raises:
        FileError: it is missing, damaged or of another type.
        KeyFormatError: it holds no Qwen-Image transformer.
        ConfigError: it is a GGUF and the gguf package is missing.
    """
    path = Path(source)
    if path.is_dir():
        return open_folder(path)
    if not path.exists():
        raise FileError(
            f"{path.name} is not there; expected a diffusion model of Qwen-Image-Edit, as a "
            ".safetensors or .gguf file or a diffusers folder."
        )
    if is_gguf(path):
        return BaseFile(GgufFile(path))
    return BaseFile(UnmappedFile(path))


def is_gguf(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except OSError as e:
        raise FileError(f"{path.name} cannot be opened: {e.strerror}.") from None


def open_folder(folder: Path) -> BaseFile:
    """A diffusers model folder, or a pipeline's with the model in `transformer`."""
    if not (folder / CONFIG).is_file() and (folder / "transformer" / CONFIG).is_file():
        folder = folder / "transformer"
    paths = list_shards(folder)
    if not paths:
        raise FileError(
            f"{folder.name} holds no .safetensors file; expected a diffusers folder with "
            f"{WEIGHTS} or its numbered parts."
        )
    config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else None
    return BaseFile(Shards(paths, folder.name), config)


def list_shards(folder: Path) -> list[Path]:
    """The files that the index names; without one the single file, or all there are."""
    index = folder / f"{WEIGHTS}.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise FileError(f"{index.name} has no weight_map; download or copy it again.")
        # Only names: a path that leads elsewhere is not followed.
        names = sorted({Path(str(name)).name for name in weight_map.values()})
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise FileError(
                f"{folder.name} lacks {missing[0]}, one of the {len(names)} files that its index "
                "names; download or copy it again."
            )
        return [folder / name for name in names]
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    return sorted(folder.glob("*.safetensors"))


def read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        values = None
    if not isinstance(values, dict):
        raise FileError(f"{path.name} cannot be read as JSON; download or copy it again.")
    return values
