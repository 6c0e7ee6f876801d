"""The weights of a base model, read from its file or a loaded MODEL one module at a time."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, Protocol

import torch

from ..disk.json_reader import parse_object
from ..disk.safetensors_file import AnyTensor, load
from ..errors import FileError, KeyFormatError
from ..messages import message
from ..text import shorten
from .base_weight import MX_BLOCK, BaseWeight, count_factors, untile_scales, widen_exponents
from .families import FUSED, detect_family, is_fused, is_known, list_members
from .family import Family
from .module_paths import split_path
from .packed_weights import PACKED_FORMATS, read_packed

#: What ComfyUI's and diffusers' single files put in front of the transformer's keys.
PREFIXES = ("", "model.diffusion_model.", "diffusion_model.", "transformer.")
#: Names of the factor of a scaled weight (comfy/quant_ops.py, and older files).
SCALE_NAMES = ("weight_scale", "scale_weight")
#: Further parts of weights of 4 bits.
PACKED_PARTS = ("weight_scale_2", "weight_s_rel", "weight_s_channel", "weight_codebook")
#: Where a file states how all its layers are stored (ComfyUI's QUANTIZATION.md).
QUANTIZATION_METADATA = "_quantization_metadata"
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)
FORMATS = ("float8_e4m3fn", "float8_e5m2", "int8_tensorwise", "mxfp8")
ROTATION_GROUP = 256  # ComfyUI's default
#: Of one weight; ComfyUI writes fewer than a hundred.
MAX_NOTE_BYTES = 1 << 16
#: A note that is rejected only where it matters.
UNREADABLE: Mapping[str, Any] = {"format": message("an unreadable note")}


class TensorSource(Protocol):
    """A base model's file: tensors by key, of which it may hold some open."""

    @property
    def name(self) -> str: ...
    @property
    def metadata(self) -> Mapping[str, str]: ...
    @property
    def tensors(self) -> Mapping[str, AnyTensor]: ...
    def release(self) -> None: ...


class BaseWeights:
    """Looks weights up by module path; copies none of them before it is needed.

    Attributes:
        prefix: in front of every key, such as "model.diffusion_model.".
    """

    def __init__(
        self, tensors: Mapping[str, AnyTensor], name: str, file: TensorSource | None = None
    ):
        self.name = name
        self._tensors = tensors
        self._file = file
        self.prefix = find_prefix(tensors, name)
        self._layers = read_layers(file.metadata if file is not None else {})
        self._storages: Mapping[str, str] = getattr(file, "storages", {})

    def get(self, module_path: str) -> BaseWeight | None:
        """The weight of a module, on the CPU; None if the base has none of that name.

        Raises:
            FileError: stored in an unsupported way (other scales), or no matrix.
        """
        weight = self.find(module_path)
        return None if weight is None else replace(weight, stored=fetch(weight.stored))

    def find(self, module_path: str) -> BaseWeight | None:
        """The same, but its codes stay where they are: perhaps on disk."""
        stem = f"{self.prefix}{module_path}"
        stored = self._tensors.get(f"{stem}.weight")
        if stored is None:
            return self._find_in_fused(module_path)
        if not stored.ndim:
            raise FileError(
                "{name} stores {module_path} as a single number; expected a matrix. The file is "
                "damaged: download or copy it again.",
                name=shorten(self.name),
                module_path=module_path,
            )
        scales = (self._tensors.get(f"{stem}.{name}") for name in SCALE_NAMES)
        scale = next((scale for scale in scales if scale is not None), None)
        note = self._read_note(stem, module_path)
        packed = get_packed_format(note)
        if packed:
            weight = read_packed(stored, packed, partial(self._get_part, stem), note)
            if weight is not None:
                return weight
        if is_readable(stored, scale, note):
            weight = build_weight(stored, None if scale is None else fetch(scale), note)
            if weight is not None:
                return replace(weight, decoded_from=self._storages.get(f"{stem}.weight", ""))
        kind = str(note.get("format") or stored.dtype).removeprefix("torch.")
        scales_found = ""
        if scale is not None:
            scales_found = message(" with {number} scales", number=scale.numel())
        raise FileError(
            "{name} stores {module_path} as {kind}{scales}, which cannot be read here yet; "
            "expected bf16, fp16, fp32, or fp8 and int8 with one scale per weight or row, "
            "mxfp8, or ComfyUI's nvfp4, int4 and w4a8. Choose such a file of the same model.",
            name=shorten(self.name),
            module_path=module_path,
            kind=shorten(kind, 40),
            scales=scales_found,
        )

    def _get_part(self, stem: str, name: str) -> AnyTensor | None:
        return self._tensors.get(f"{stem}.{name}")

    def _find_in_fused(self, module_path: str) -> BaseWeight | None:
        """The rows of a module that the base stores together with others."""
        block, name = split_path(module_path)
        for fused, fusion in FUSED.items():
            path = f"transformer_blocks.{block}.{fused}"
            if block is None or name not in fusion.members or not self.has_weight(path):
                continue
            weight = self.find(path)
            assert weight is not None  # has_weight
            parts = len(fusion.members)
            if weight.stored.ndim != 2 or weight.stored.shape[0] % parts:
                raise FileError(
                    "{name} stores {path} in {shape}; expected a matrix of {parts} equal parts. "
                    "The file is damaged: download or copy it again.",
                    name=shorten(self.name),
                    path=path,
                    shape=str(tuple(weight.stored.shape)),
                    parts=parts,
                )
            rows = weight.stored.shape[0] // parts
            return weight.take_range(fusion.members.index(name) * rows, rows)
        return None

    def has_weight(self, module_path: str) -> bool:
        return f"{self.prefix}{module_path}.weight" in self._tensors

    @cached_property
    def family(self) -> Family | None:
        """The family of the base; None where nothing tells."""
        matrices = (
            (key.removesuffix(".weight"), tensor)
            for key, tensor in self._list_known()
            if key.endswith(".weight")
        )
        return detect_family({path: tuple(tensor.shape)[:1] for path, tensor in matrices})

    def get_tensor(self, key: str) -> torch.Tensor | None:
        """A bias or norm by its whole name after the prefix, such as "txt_norm.weight".

        Raises:
            FileError: it holds whole numbers: codes, of which nothing tells the scale.
        """
        tensor = self._tensors.get(f"{self.prefix}{key}")
        if tensor is None:
            return None
        values = fetch(tensor)
        if not values.is_floating_point():
            kind = str(values.dtype).removeprefix("torch.")
            raise FileError(
                "{name} stores {key} as {kind}, which cannot be read here; expected a bias or "
                "norm in floating point. Choose such a file of the same model.",
                name=shorten(self.name),
                key=shorten(key),
                kind=kind,
            )
        return values

    def _read_note(self, stem: str, module_path: str) -> Mapping[str, Any]:
        """What the file states about this weight's storage."""
        note = self._tensors.get(f"{stem}.comfy_quant")
        if note is None:
            return self._layers.get(stem) or self._layers.get(module_path) or {}
        if note.numel() > MAX_NOTE_BYTES:
            return UNREADABLE
        return parse_note(bytes(fetch(note).flatten().to(torch.uint8).tolist()))

    def _is_packed(self, module_path: str) -> bool:
        note = self._read_note(f"{self.prefix}{module_path}", module_path)
        return get_packed_format(note) is not None

    def list_matrices(self) -> dict[str, AnyTensor]:
        """Module path -> its weight as stored, perhaps still on disk, of every known Linear."""
        found: dict[str, AnyTensor] = {}
        for key, tensor in self._list_known():
            path = key.removesuffix(".weight")
            if path == key or tensor.ndim != 2:
                continue
            members = list_members(path) if is_fused(path) else [path]
            if path in members and not self._is_packed(path):
                found[path] = tensor
                continue
            for member in members:
                weight = self.find(member)
                if weight is not None:
                    found[member] = weight.stored
        return found

    def list_vectors(self) -> dict[str, AnyTensor]:
        """Every known bias and norm by its name after the prefix, perhaps still on disk."""
        return {
            key: tensor
            for key, tensor in self._list_known()
            if key.endswith((".weight", ".bias")) and tensor.ndim == 1
        }

    def _list_known(self) -> list[tuple[str, AnyTensor]]:
        start = len(self.prefix)
        return [
            (key[start:], tensor)
            for key, tensor in self._tensors.items()
            if key.startswith(self.prefix) and is_module(key[start:].rpartition(".")[0])
        ]

    def release(self) -> None:
        if self._file is not None:
            self._file.release()


def fetch(tensor: AnyTensor) -> torch.Tensor:
    """From wherever it is, to the CPU; the source stays where it was."""
    return load(tensor).detach().cpu()


def is_readable(stored: AnyTensor, scale: AnyTensor | None, note: Mapping[str, Any]) -> bool:
    """Whether the dtypes are those of a known format; nothing is read for it."""
    if note and note.get("format") not in FORMATS:
        return False
    if not stored.numel() or (scale is not None and not scale.numel()):
        return False
    if stored.dtype in FLOATS:
        return not note and (scale is None or scale.numel() == 1)
    return stored.dtype in EIGHT_BITS and (stored.dtype != torch.int8 or scale is not None)


def build_weight(
    stored: AnyTensor, scale: torch.Tensor | None, note: Mapping[str, Any]
) -> BaseWeight | None:
    """None where the scales are of no known kind."""
    if note.get("format") == "mxfp8" and scale is not None and stored.ndim == 2:
        rows, columns = stored.shape
        exponents = untile_scales(scale, rows, columns // MX_BLOCK)
        if columns % MX_BLOCK or exponents is None or scale.dtype.itemsize != 1:
            return None
        return BaseWeight(stored, widen_exponents(exponents))
    rotation = read_rotation(note)
    if rotation is None or (rotation and not can_rotate(stored.shape, rotation)):
        return None
    if scale is None or scale.numel() == 1:
        return BaseWeight(stored, None if scale is None else scale.float(), rotation)
    if stored.ndim and scale.numel() == stored.shape[0] == scale.shape[0]:
        return BaseWeight(stored, scale.float().reshape(-1, 1), rotation)
    return None


def can_rotate(shape: Sequence[int], group: int) -> bool:
    return len(shape) == 2 and bool(count_factors(group)) and shape[1] % group == 0


def read_rotation(note: Mapping[str, Any]) -> int | None:
    """As ComfyUI looks it up: in the note itself, or below its "params".

    Returns:
        Columns per group, 0 for none; None where that is unknown.
    """
    inner = note.get("params")
    both = {**(inner if isinstance(inner, dict) else {}), **note}
    is_rotated, group = both.get("convrot"), both.get("convrot_groupsize", ROTATION_GROUP)
    if not is_rotated:
        return 0
    if not isinstance(is_rotated, int):  # a text such as "false" is true for Python
        return None
    is_whole = isinstance(group, float) and group.is_integer()
    return int(group) or None if is_whole or type(group) is int else None


def read_layers(metadata: Mapping[str, str]) -> dict[str, Mapping[str, Any]]:
    """Module path, perhaps behind a prefix -> what a file's header states about its storage."""
    layers = parse_note(metadata.get(QUANTIZATION_METADATA, "{}")).get("layers")
    if not isinstance(layers, dict):
        return {}
    return {
        path: layer if isinstance(layer, dict) else UNREADABLE for path, layer in layers.items()
    }


def parse_note(text: str | bytes) -> Mapping[str, Any]:
    """An unreadable note becomes one of an unknown format, which is refused where it matters."""
    try:
        return parse_object(text, "the note")
    except FileError:
        return UNREADABLE


def open_base(base: BaseWeights | Mapping[str, AnyTensor] | str | os.PathLike[str]) -> BaseWeights:
    """A base from tensors by key, or from anything training accepts: a file, a GGUF, a folder.

    Raises:
        FileError: the file is missing or damaged.
        KeyFormatError: it holds no Qwen-Image transformer.
        ConfigError: it is a GGUF and the gguf package is missing.
    """
    if isinstance(base, BaseWeights):
        return base
    if isinstance(base, Mapping):
        return BaseWeights(base, "the base")
    from .base_files import open_base_file

    return open_base_file(base).weights


def get_packed_format(note: Mapping[str, Any]) -> str | None:
    found = note.get("format")
    return found if isinstance(found, str) and found in PACKED_FORMATS else None


def is_module(path: str) -> bool:
    return is_known(path) or is_fused(path)


def find_prefix(tensors: Mapping[str, AnyTensor], name: str) -> str:
    for prefix in PREFIXES:
        for key in tensors:
            if key.startswith(prefix) and key.endswith(".weight"):
                path = key[len(prefix) :].removesuffix(".weight")
                if path.startswith("transformer_blocks.") and is_known(path):
                    return prefix
    example = shorten(next(iter(tensors), "none"))
    raise KeyFormatError(
        "{name} is not a Qwen-Image model: none of its {num_tensors} keys is like "
        "'transformer_blocks.0.attn.to_q.weight' (the first is {example!r}). Choose a diffusion "
        "model of Qwen-Image or Qwen-Image-Edit.",
        name=shorten(name),
        num_tensors=len(tensors),
        example=example,
    )
