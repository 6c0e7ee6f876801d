"""A Qwen-Image-2.1 DiT of the true architecture, two blocks deep, in the layouts users have.

Needs torch and safetensors only, comfy-kitchen for int8. Names and shapes are those of diffusers'
`QwenImage21Transformer2DModel` (0.42). Files of Comfy-Org fuse gate_layer and proj into `gate_up`,
rows of gate_layer first. Random weights: nothing trained them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from .dit import make_tensor

NUM_BLOCKS = 2
NUM_HEADS = 4
HEAD_WIDTH = 64
WIDTH = NUM_HEADS * HEAD_WIDTH  # ComfyUI's convrot rotates groups of 256 inputs
MLP_WIDTH = 3 * WIDTH
TEXT_WIDTH = 64  # that of the other tiny base, whose text encoder serves here too
CHANNELS = 64  # of the latents, which are 4-D; one latent pixel is one token
TIME_CHANNELS = 256
GROUP = 256

LAYOUTS = ("split", "fused", "int8_convrot")
METADATA = {"format": "pt", "tiny_demo": "true"}

#: Name in a block -> (out_features, in_features).
BLOCK_LINEARS = {
    **dict.fromkeys(("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"), (WIDTH, WIDTH)),
    **dict.fromkeys(("img_mlp.gate_layer", "img_mlp.proj"), (MLP_WIDTH, WIDTH)),
    "img_mlp.out": (WIDTH, MLP_WIDTH),
}
TOP_LINEARS = {
    "img_in": (WIDTH, CHANNELS),
    "txt_in.in_layer": (WIDTH, TEXT_WIDTH),
    "txt_in.out_layer": (WIDTH, WIDTH),
    "time_text_embed.timestep_embedder.linear_1": (WIDTH, TIME_CHANNELS),
    "time_text_embed.timestep_embedder.linear_2": (WIDTH, WIDTH),
    "modulation.1": (4 * WIDTH, WIDTH),
    "norm_out.linear": (WIDTH, WIDTH),
    "proj_out": (CHANNELS, WIDTH),
}


def list_linears() -> dict[str, tuple[int, int]]:
    """Module path -> (out_features, in_features) of every Linear of the split layout."""
    inside = {
        f"transformer_blocks.{block}.{name}": shape
        for block in range(NUM_BLOCKS)
        for name, shape in BLOCK_LINEARS.items()
    }
    return {**inside, **TOP_LINEARS}


def list_shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every key of a split file with its shape."""
    for path, shape in list_linears().items():
        yield f"{path}.weight", shape
    for block in range(NUM_BLOCKS):
        for name in ("norm_q", "norm_k"):
            yield f"transformer_blocks.{block}.attn.{name}.weight", (HEAD_WIDTH,)
    yield "txt_in.text_norm.weight", (TEXT_WIDTH,)


def make_dit(seed: int = 0) -> dict[str, torch.Tensor]:
    """The float32 state dict in the split layout; every layout has its weights."""
    state_dict = {key: make_tensor(key, shape, seed) for key, shape in list_shapes()}
    state_dict["txt_in.text_norm.weight"] -= 1  # stored as scale - 1
    for key in state_dict:
        if key.endswith("gate_layer.weight"):
            state_dict[key] *= 1.25  # so that halves that were swapped are noticed
    return state_dict


def fuse(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same weights as in the files of Comfy-Org."""
    fused = {}
    for key, tensor in state_dict.items():
        if key.endswith("img_mlp.gate_layer.weight"):
            proj = state_dict[key.replace("gate_layer", "proj")]
            fused[key.replace("gate_layer", "gate_up")] = torch.cat([tensor, proj])
        elif not key.endswith("img_mlp.proj.weight"):
            fused[key] = tensor
    return fused


def quantise(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The Linears of the blocks in int8 with rotated inputs, one scale per output row."""
    from comfy_kitchen.tensor import QuantizedTensor

    options = {"convrot": True, "convrot_groupsize": GROUP, "per_channel": True}
    note = json.dumps({"format": "int8_tensorwise", **options}).encode()
    stored = {}
    for key, tensor in state_dict.items():
        if not key.startswith("transformer_blocks.") or tensor.ndim != 2:
            stored[key] = tensor
            continue
        quantised = QuantizedTensor.from_float(tensor, "TensorWiseINT8Layout", **options)
        stored |= quantised.state_dict(key)
        marker = key.removesuffix("weight") + "comfy_quant"
        stored[marker] = torch.tensor(list(note), dtype=torch.uint8)
    return stored


def store_as(state_dict: dict[str, torch.Tensor], layout: str) -> dict[str, torch.Tensor]:
    """A split state dict as stored in a file of that layout, float32 except for int8 itself."""
    if layout == "split":
        return dict(state_dict)
    fused = fuse(state_dict)
    return quantise(fused) if layout == "int8_convrot" else fused


def write_dit(path: Path | str, layout: str, seed: int = 0) -> Path:
    """Writes one DiT file; `layout` is one of LAYOUTS."""
    if layout not in LAYOUTS:
        raise ValueError(f"expected a layout of {LAYOUTS}, got {layout!r}")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = {key: value.contiguous() for key, value in store_as(make_dit(seed), layout).items()}
    save_file(stored, path, METADATA | {"layout": layout})
    return path
