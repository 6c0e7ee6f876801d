"""From a file to a model that can be trained on, one tensor at a time.

The base is never in memory twice: the model is built without data, and each tensor is read,
converted to its storage on its device and put in place before the next one is read. Besides the
model itself memory holds only some chunks of 16 MB (DESIGN section 8), see `weight_reader`, and one
offloaded block twice.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ...base_model.base_files import BaseFile, open_base_file
from ...errors import KeyFormatError, ShapeError
from ...messages import message
from ...progress import Progress, ShouldStop, track
from ...text import shorten, shorten_list
from .architecture import BLOCKS, FIRST_BLOCK, Architecture, read_architecture
from .edit_block import EditBlock
from .host_blocks import HostBlocks
from .offload import choose_offloaded
from .quantization import GGUF_COST, build_linear, check_storage, is_gguf_kept
from .sharding import Sharding
from .transformer import EditTransformer
from .weight_reader import WeightReader


def load_transformer(
    source: str | os.PathLike[str],
    storage: str = "bf16",
    device: torch.device | str = "cpu",
    compute_dtype: torch.dtype = torch.bfloat16,
    *,
    zero_cond_t: bool | None = None,
    num_offloaded: int = 0,
    sharding: Sharding | None = None,
    progress: Progress | None = None,
    should_stop: ShouldStop | None = None,
) -> EditTransformer:
    """A frozen base model of any size.

    Args:
        source: ComfyUI's single file (bf16, fp16, fp32, plain or scaled fp8, int8, mxfp8), a GGUF,
            or a diffusers folder.
        storage: one of `quantization.STORAGES`, which is documented there.
        zero_cond_t: whether references are shown at noise level 0, as 2511 does; None: as the file
            is marked.
        num_offloaded: number of blocks that stay in host memory; see `offload`.
        sharding: shards each block over several processes as soon as it is complete.

    Raises:
        FileError: the source is missing, damaged, or stored in an unsupported way.
        KeyFormatError: it is another model, or tensors are missing.
        ShapeError: a tensor's shape contradicts the others.
        NonFiniteWeightsError: NaN or Inf in a tensor.
        ConfigError: an unknown storage, a package that it needs is missing, or more blocks to
            offload than there are.
        InterruptedError: `should_stop` returned True.
    """
    check_storage(storage)
    base = open_base_file(source)
    try:
        architecture = read_architecture(
            base.shapes,
            base.name,
            base.axes,
            base.zero_cond_t if zero_cond_t is None else zero_cond_t,
        )
        check_keys(architecture, base)
        transformer = architecture.build_empty()
        device = torch.device(device)
        offloaded = choose_offloaded(architecture.num_layers, num_offloaded)
        reader, host = WeightReader(base, device), HostBlocks(device)
        leaves = list_leaves(transformer)
        last_leaves = {find_block(path): path for path in leaves}
        for path in track(leaves, progress, should_stop, message("loading")):
            index = find_block(path)
            place = torch.device("cpu") if index in offloaded else device
            load_leaf(transformer, path, reader, storage, compute_dtype, place)
            if index >= 0 and path == last_leaves[index]:
                complete_block(transformer, index, host if index in offloaded else None, sharding)
        reader.finish()
    finally:
        base.release()
    return complete_model(transformer, compute_dtype, offloaded, host, sharding)


def complete_block(
    transformer: Any, index: int, host: HostBlocks | None, sharding: Sharding | None
) -> None:
    """Makes an `EditBlock` of a block that has all its data.

    Args:
        host: of blocks that stay in host memory; None if this one does not.
    """
    block = EditBlock(transformer.transformer_blocks[index])
    if host is not None:
        host.add(block)
    if sharding is not None:
        block = sharding.shard_block(block)
    transformer.transformer_blocks[index] = block


def complete_model(
    transformer: Any,
    compute_dtype: torch.dtype,
    offloaded: Sequence[int],
    host: HostBlocks,
    sharding: Sharding | None,
) -> EditTransformer:
    """The frozen model of a transformer whose blocks are complete."""
    transformer.requires_grad_(False)
    model = EditTransformer(transformer.eval(), compute_dtype)
    if any(is_gguf_kept(module) for module in transformer.modules()):
        model.notes.append(GGUF_COST)
    if offloaded:
        model.offload_blocks(offloaded, host.device, host)
    return model if sharding is None else sharding.finish(model)


def list_leaves(transformer: nn.Module) -> list[str]:
    """Paths of the modules that have parameters of their own."""
    return [
        path
        for path, module in transformer.named_modules()
        if any(True for _ in module.parameters(recurse=False))
    ]


def find_block(path: str) -> int:
    """The number of the block a module is in; -1 outside."""
    first, _, rest = path.partition(".")
    return int(rest.partition(".")[0]) if first == "transformer_blocks" else -1


def check_keys(architecture: Architecture, base: BaseFile) -> None:
    """Checks that the file holds exactly this model; builds one block for it, not all.

    Raises:
        KeyFormatError: tensors are missing, or do not belong to this model.
        ShapeError: one has another shape.
    """
    expected = list_shapes(architecture)
    missing = [key for key in expected if key not in base.shapes]
    if missing:
        raise KeyFormatError(
            "{base} lacks {num_missing} of {num_expected} tensors of a Qwen-Image model "
            "({missing}): it is another model or incomplete. Choose a complete diffusion model "
            "of Qwen-Image-Edit.",
            base=shorten(base.name),
            num_missing=len(missing),
            num_expected=len(expected),
            missing=shorten_list(missing, 2),
        )
    unknown = [shorten(key) for key in base.shapes if key not in expected]
    if unknown:
        raise KeyFormatError(
            "{base} holds {num_unknown} tensors that a Qwen-Image-Edit model does not have "
            "({unknown}); it is another model, or already changed by one. Choose a diffusion "
            "model of Qwen-Image-Edit.",
            base=shorten(base.name),
            num_unknown=len(unknown),
            unknown=shorten_list(unknown, 1),
        )
    for key, shape in expected.items():
        found = tuple(base.shapes[key])
        if found != shape and not base.is_packed(key):
            raise ShapeError(
                "{base}: {key} is {found}, but {shape} follows from the other tensors. The file "
                "is damaged or of another model: choose a diffusion model of Qwen-Image-Edit.",
                base=shorten(base.name),
                key=key,
                found=shorten(str(found)),
                shape=shape,
            )


def list_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Key -> shape of every parameter; blocks are all alike."""
    model = replace(architecture, num_layers=1).build_empty()
    first = {name: tuple(p.shape) for name, p in model.named_parameters()}
    in_block = {
        name.removeprefix(FIRST_BLOCK): shape
        for name, shape in first.items()
        if name.startswith(FIRST_BLOCK)
    }
    shapes = {name: shape for name, shape in first.items() if not name.startswith(FIRST_BLOCK)}
    for block in range(architecture.num_layers):
        shapes.update({f"{BLOCKS}.{block}.{name}": s for name, s in in_block.items()})
    return shapes


def load_leaf(
    transformer: nn.Module,
    path: str,
    reader: WeightReader,
    storage: str,
    compute_dtype: torch.dtype,
    place: torch.device,
) -> None:
    """Gives one module its data: computed on the reader's device, kept on `place`."""
    module = transformer.get_submodule(path)
    if isinstance(module, nn.Linear):
        linear = build_linear(reader, path, storage, compute_dtype)
        parent, _, name = path.rpartition(".")
        setattr(transformer.get_submodule(parent), name, linear.to(place))
        return
    for name, _ in list(module.named_parameters(recurse=False)):
        tensor = reader.read_parameter(f"{path}.{name}", compute_dtype)
        assert tensor is not None  # see `check_keys`
        setattr(module, name, nn.Parameter(tensor.to(place), requires_grad=False))
