"""The decoding part of the VAE that a training set was made with, kept once next to the sets.

    vaes/<identity>.safetensors   `decoder.*` and `conv2.*` under ComfyUI's names

A job's worker decodes its samples with it, even when ComfyUI is no longer running.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ..disk.json_reader import read_object
from ..disk.own_folders import make_own_folder
from ..disk.safetensors_file import AnyTensor, SafetensorsFile
from ..disk.writing import explain, write_then_rename
from ..errors import ConfigError, FileError, LoraError
from ..training.data.dataset import INDEX_FILE, MAX_INDEX_BYTES
from ..training.data.latents import DECODER_KEYS, NUM_CHANNELS

VAES_FOLDER = "vaes"
#: Key -> (axis, size): distinguishes Qwen-Image's and Wan 2.1's VAE from others of 16 channels.
MARKS = {
    "decoder.conv1.weight": (1, NUM_CHANNELS),
    "decoder.middle.0.residual.0.gamma": (1, 1),
    "decoder.head.2.weight": (0, 3),
    "conv2.weight": (0, NUM_CHANNELS),
}


def keep_vae(store: Path, identity: str, weights: Iterable[tuple[str, torch.Tensor]]) -> Path:
    """Writes the decoding part of a VAE unless it is there.

    Args:
        store: the cache of training sets.
        identity: identifies the VAE; hexadecimal.
        weights: key and tensor, by ComfyUI's names.

    Raises:
        ConfigError: it is not a VAE of Qwen-Image or Wan 2.1, or its weights are not plain numbers.
        FileError: the disk does not take it.
    """
    path = get_path(store, identity)
    if is_readable(path):
        return path
    tensors = {key: tensor.detach() for key, tensor in weights if key.startswith(DECODER_KEYS)}
    if find_fault(tensors) is not None:
        raise ConfigError("it is not a VAE of Qwen-Image or Wan 2.1")
    for tensor in tensors.values():
        if hasattr(tensor, "_qdata") or tensor.is_meta or not tensor.is_floating_point():
            raise ConfigError("its weights are not stored as plain numbers")
    # Copies: where a loader mapped a whole file, all share one storage, which cannot be saved.
    tensors = {key: tensor.cpu().contiguous().clone() for key, tensor in tensors.items()}
    try:
        make_own_folder(path.parent, parents=True)
        write_then_rename(path, lambda temporary: save_file(tensors, temporary))
    except (OSError, SafetensorError) as e:
        raise FileError("its copy cannot be written: {reason}", reason=explain(e)) from None
    return path


def find_vae(dataset_folder: Path) -> Path | None:
    """The copy of the VAE that a training set of this cache was made with, where there is one."""
    try:
        index = read_object(dataset_folder / INDEX_FILE, MAX_INDEX_BYTES)
        path = get_path(dataset_folder.parents[1], index["metadata"]["vae"])
    except (LoraError, KeyError, TypeError, IndexError):
        return None  # of another program, or of an older version
    return path if is_readable(path) else None


def get_path(store: Path, identity: object) -> Path:
    """Raises ConfigError for an invalid identity, so that no other path is ever built from it."""
    if not isinstance(identity, str) or not re.fullmatch(r"[0-9a-f]{8,128}", identity):
        raise ConfigError("{identity!r} does not identify a VAE", identity=str(identity)[:40])
    return store / VAES_FOLDER / f"{identity}.safetensors"


def is_readable(path: Path) -> bool:
    """By the header: whether its keys and their shapes are those of such a decoder."""
    try:
        file = SafetensorsFile(path, "a VAE")
    except FileError:
        return False
    file.release()
    return find_fault(file.tensors) is None


def find_fault(tensors: Mapping[str, AnyTensor]) -> str | None:
    """The first of MARKS that these weights lack; None for those of such a decoder."""
    for key, (axis, size) in MARKS.items():
        tensor = tensors.get(key)
        if tensor is None or tensor.ndim <= axis or tensor.shape[axis] != size:
            return key
    return None
