"""Random models, training sets and LoRAs of any size, generated on the GPU if there is one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from .extension import import_extension
from .settings import Sizes

import_extension()

from qwen_edit_lora.lora_core import Adapter, LoraWeights  # noqa: E402
from qwen_edit_lora.lora_core.base_model.qwen_image import QWEN_IMAGE  # noqa: E402
from qwen_edit_lora.lora_core.training.data.dataset import CachedItem, DatasetWriter  # noqa: E402
from qwen_edit_lora.lora_core.training.model.architecture import Architecture  # noqa: E402

STD = 0.02
FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
#: Random values generated at once for a file, and written repeatedly.
POOL = 2**24


def build_architecture(sizes: Sizes, num_blocks: int) -> Architecture:
    return Architecture(
        num_blocks, sizes.head_width, sizes.heads, sizes.text_width, axes_dims_rope=sizes.axes
    )


def list_shapes(sizes: Sizes, num_blocks: int) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of the model, by its key in ComfyUI's files."""
    model = build_architecture(sizes, num_blocks).build_empty()
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def draw(shape: tuple[int, ...], is_gain: bool, device: str) -> torch.Tensor:
    """A random bf16 tensor on the device; 1 for gains of norms."""
    if is_gain:
        return torch.ones(shape, device=device, dtype=torch.bfloat16)
    return torch.empty(shape, device=device, dtype=torch.bfloat16).normal_(std=STD)


def draw_state_dict(
    sizes: Sizes, num_blocks: int, storage: str, device: str
) -> dict[str, torch.Tensor]:
    """A state dict on the CPU, as in a file of this storage.

    Args:
        storage: "bf16"; "fp8", the plain downcast of every matrix; "fp8_scaled", the matrices of
            the blocks with one scale each and ComfyUI's marker.
    """
    torch.manual_seed(0)
    stored = {}
    for key, shape in list_shapes(sizes, num_blocks).items():
        tensor = draw(shape, len(shape) == 1 and key.endswith(".weight"), device)
        if storage == "fp8" and tensor.ndim == 2:
            tensor = tensor.to(FP8)
        elif storage == "fp8_scaled" and tensor.ndim == 2 and key.startswith("transformer_blocks."):
            path = key.removesuffix(".weight")
            scale = tensor.abs().max().float() / FP8_MAX
            tensor = (tensor.float() / scale).to(FP8)
            note = json.dumps({"format": "float8_e4m3fn"}).encode()
            stored[f"{path}.weight_scale"] = scale.cpu()
            stored[f"{path}.comfy_quant"] = torch.tensor(list(note), dtype=torch.uint8)
        stored[key] = tensor.cpu()
    return stored


def write_base(path: Path, sizes: Sizes, num_blocks: int, storage: str, device: str) -> Path:
    save_file(draw_state_dict(sizes, num_blocks, storage, device), path)
    return path


def write_large_base(path: Path, sizes: Sizes, num_blocks: int) -> Path:
    """A bf16 file whose tensors repeat one pool of values, so that only the disk takes time."""
    torch.manual_seed(0)
    pool = draw((POOL,), False, "cpu")
    tensors = {}
    for key, shape in list_shapes(sizes, num_blocks).items():
        size = torch.Size(shape).numel()
        tensors[key] = pool.repeat(-(-size // POOL))[:size].reshape(shape)
    save_file(tensors, path)
    return path


def write_dataset(folder: Path, sizes: Sizes, with_masks: bool = False) -> Path:
    """Two items of equal size with texts of different length, so that a batch of both is padded."""
    writer = DatasetWriter(folder)
    generator = torch.Generator().manual_seed(1)
    side = sizes.side
    for index, tokens in enumerate(sizes.text_tokens):
        item = CachedItem(
            target=torch.randn(16, side, side, generator=generator),
            references=(torch.randn(16, side, side, generator=generator),),
            text=torch.randn(tokens, sizes.text_width, generator=generator).bfloat16(),
            mask=torch.rand(side, side, generator=generator) if with_masks else None,
        )
        writer.add(f"item_{index}", item)
    return writer.finish()


def build_adapter(
    sizes: Sizes, num_blocks: int, rank: int, device: str, seed: int = 0, **more: Any
) -> Adapter:
    """A bf16 LoRA on the CPU for every Linear that LoRAs target; `more` is for LoraWeights."""
    torch.manual_seed(seed)
    modules = {}
    for block in range(num_blocks):
        for name in QWEN_IMAGE.block_linears:
            out, in_ = QWEN_IMAGE.compute_shape(name, sizes.width)
            modules[f"transformer_blocks.{block}.{name}"] = LoraWeights(
                draw((rank, in_), False, device).cpu(),
                draw((out, rank), False, device).cpu(),
                **more,
            )
    return Adapter(modules, name=f"rank {rank}")
