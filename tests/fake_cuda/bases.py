"""Tiny bases in every storage that a file may have; their values do not matter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from qwen_edit_lora.lora_core.training.model.architecture import Architecture
from safetensors.torch import save_file

SIZES = {"attention_head_dim": 32, "num_attention_heads": 2, "joint_attention_dim": 64}
NUM_BLOCKS = 2
#: Columns per rotation, and per mxfp8 scale.
GROUP, MX_BLOCK = 64, 32


def write_base(folder: Path, kind: str) -> str:
    """A base file of KINDS in ComfyUI's naming, or "gguf"."""
    model = Architecture(num_layers=NUM_BLOCKS, **SIZES).build_empty().to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    weights = {
        key: 0.02 * torch.randn(tensor.shape, generator=generator)
        for key, tensor in model.state_dict().items()
    }
    if kind == "gguf":
        return write_gguf(folder / "base.gguf", weights)
    store, stored = KINDS[kind], {}
    for key, weight in weights.items():
        is_coded = weight.ndim == 2 and key.startswith("transformer_blocks.")
        entries = store(weight) if is_coded else {"weight": weight.bfloat16()}
        stem, _, name = key.rpartition(".")
        names = {"weight": name}
        stored.update({f"{stem}.{names.get(part, part)}": t for part, t in entries.items()})
    path = folder / f"{kind.replace(' ', '_')}.safetensors"
    save_file(stored, path)
    return str(path)


def describe(format_name: str, **more: object) -> torch.Tensor:
    """ComfyUI's marker for how a weight is stored."""
    return torch.tensor(list(json.dumps({"format": format_name, **more}).encode()))


def store_scaled(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    codes = weight.to(torch.float8_e4m3fn)
    return {
        "weight": codes,
        "weight_scale": torch.tensor(0.5),
        "comfy_quant": describe("float8_e4m3fn").to(torch.uint8),
    }


def store_rows(weight: torch.Tensor, **more: object) -> dict[str, torch.Tensor]:
    return {
        "weight": (1000 * weight).clamp(-127, 127).to(torch.int8),
        "weight_scale": torch.full((len(weight), 1), 0.001),
        "comfy_quant": describe("int8_tensorwise", **more).to(torch.uint8),
    }


def store_rotated(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    return store_rows(weight, convrot=True, convrot_groupsize=GROUP)


def store_blocks(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    rows, columns = weight.shape
    tiles = -(-rows // 128) * 128, -(-columns // MX_BLOCK // 4) * 4
    return {
        "weight": weight.to(torch.float8_e4m3fn),
        "weight_scale": torch.full(tiles, 127, dtype=torch.uint8),
        "comfy_quant": describe("mxfp8").to(torch.uint8),
    }


KINDS: dict[str, Callable[[torch.Tensor], dict[str, torch.Tensor]]] = {
    "bf16": lambda weight: {"weight": weight.bfloat16()},
    "plain fp8": lambda weight: {"weight": weight.to(torch.float8_e4m3fn)},
    "scaled fp8": store_scaled,
    "row int8": store_rows,
    "rotated int8": store_rotated,
    "mxfp8": store_blocks,
}


def write_gguf(path: Path, weights: dict[str, torch.Tensor]) -> str:
    import gguf

    writer = gguf.GGUFWriter(path, "qwen_image")
    for key, weight in weights.items():
        kind = gguf.GGMLQuantizationType.Q8_0 if weight.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(key, gguf.quants.quantize(weight.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)
