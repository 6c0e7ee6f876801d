"""A Qwen-Image-Edit DiT of the true architecture, two blocks deep, in every storage users have.

Needs torch and safetensors only. The shapes are those of `QwenImageTransformer2DModel` in diffusers
0.42 and ComfyUI 0.30 (same key names in both), written out for any width; tests load them strictly.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

NUM_BLOCKS = 2
NUM_HEADS = 5
HEAD_WIDTH = 32
WIDTH = NUM_HEADS * HEAD_WIDTH
ROPE_AXES = (4, 14, 14)  # of a head: image number, row, column; the shim's split
TEXT_WIDTH = 64
IN_CHANNELS = 64  # 16 latent channels x 2 x 2 patch
TIME_CHANNELS = 256

VARIANT_MARKERS = {"2509": (), "2511": ("__index_timestep_zero__",)}
"""Keys without content that tell ComfyUI (and us) which release a file is."""

STORAGES = ("fp32", "bf16", "fp8", "fp8_scaled")
METADATA = {"format": "pt", "tiny_demo": "true"}

ATTENTION_LINEARS = (
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
)
MLP_LINEARS = ("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2")
MODULATION_LINEARS = ("img_mod.1", "txt_mod.1")


def list_shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every key of the DiT with its shape, in the order of the module tree."""
    width = NUM_HEADS * HEAD_WIDTH

    def linear(path: str, fan_in: int, fan_out: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{path}.weight", (fan_out, fan_in)
        yield f"{path}.bias", (fan_out,)

    yield from linear("time_text_embed.timestep_embedder.linear_1", TIME_CHANNELS, width)
    yield from linear("time_text_embed.timestep_embedder.linear_2", width, width)
    yield "txt_norm.weight", (TEXT_WIDTH,)
    yield from linear("img_in", IN_CHANNELS, width)
    yield from linear("txt_in", TEXT_WIDTH, width)
    for index in range(NUM_BLOCKS):
        block = f"transformer_blocks.{index}"
        for path in MODULATION_LINEARS:
            yield from linear(f"{block}.{path}", width, 6 * width)
        for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            yield f"{block}.attn.{name}.weight", (HEAD_WIDTH,)
        for path in ATTENTION_LINEARS:
            yield from linear(f"{block}.{path}", width, width)
        for stream in ("img", "txt"):
            yield from linear(f"{block}.{stream}_mlp.net.0.proj", width, 4 * width)
            yield from linear(f"{block}.{stream}_mlp.net.2", 4 * width, width)
    yield from linear("norm_out.linear", width, 2 * width)
    yield from linear("proj_out", width, IN_CHANNELS)


def list_lora_targets() -> dict[str, tuple[int, int]]:
    """Module path -> (out_features, in_features) of each block's attention and MLP Linears."""
    shapes = dict(list_shapes())
    paths = [
        f"transformer_blocks.{index}.{path}"
        for index in range(NUM_BLOCKS)
        for path in (*ATTENTION_LINEARS, *MLP_LINEARS)
    ]
    return {path: shapes[f"{path}.weight"] for path in paths}  # type: ignore[misc]


def make_tensor(key: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Random float32 weights that keep activations near size 1: normal, scaled by the fan-in.

    Each key has its own generator, so that adding a key changes no other tensor.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {key}".encode()))
    noise = torch.randn(shape, generator=generator)
    if "gamma" in key or ("norm" in key and key.endswith(".weight") and len(shape) == 1):
        return 1 + 0.05 * noise  # a gain; not all ones, so that a forgotten gain is noticed
    if key.endswith("bias"):
        return 0.02 * noise
    return noise * noise[0].numel() ** -0.5


def make_dit(variant: str = "2509", seed: int = 0) -> dict[str, torch.Tensor]:
    """The float32 state dict; both variants and every storage share its weights."""
    state_dict = {key: make_tensor(key, shape, seed) for key, shape in list_shapes()}
    return state_dict | {key: torch.tensor([]) for key in VARIANT_MARKERS[variant]}


def store_as(state_dict: dict[str, torch.Tensor], storage: str) -> dict[str, torch.Tensor]:
    """The state dict as stored in a file of that kind.

    fp8: the plain downcast of every matrix, as in `..._fp8_e4m3fn`. fp8_scaled: the block matrices
    as weight / weight_scale with a `comfy_quant` marker (ComfyUI's QUANTIZATION.md; comfy/ops.py,
    `_load_quantized_module`), the rest bf16.
    """
    if storage == "fp32":
        return dict(state_dict)
    stored = {}
    for key, tensor in state_dict.items():
        stored[key] = tensor.bfloat16()
        if tensor.ndim != 2:
            continue
        if storage == "fp8":
            stored[key] = tensor.to(torch.float8_e4m3fn)
        elif storage == "fp8_scaled" and key.startswith("transformer_blocks."):
            stored.update(quantize_fp8_scaled(key.removesuffix(".weight"), tensor))
    return stored


def quantize_fp8_scaled(module_path: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """One Linear's entries in a scaled fp8 file."""
    scale = weight.abs().amax() / torch.finfo(torch.float8_e4m3fn).max
    note = json.dumps({"format": "float8_e4m3fn"}).encode()
    return {
        f"{module_path}.weight": (weight / scale).to(torch.float8_e4m3fn),
        f"{module_path}.weight_scale": scale.float(),
        f"{module_path}.comfy_quant": torch.tensor(list(note), dtype=torch.uint8),
    }


def write_dit(
    path: Path | str,
    variant: str = "2509",
    storage: str = "bf16",
    state_dict: dict[str, torch.Tensor] | None = None,
) -> Path:
    """Writes one DiT file, with random weights by default; `storage` is one of STORAGES."""
    if variant not in VARIANT_MARKERS or storage not in STORAGES:
        raise ValueError(
            f"expected a variant of {sorted(VARIANT_MARKERS)} and a storage of {STORAGES}, "
            f"got {variant!r} and {storage!r}"
        )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = METADATA | {"variant": variant, "storage": storage}
    state_dict = make_dit(variant) if state_dict is None else state_dict
    save_file(store_as(state_dict, storage), path, metadata)
    return path
