"""Plain LoRA files for tests. Needs torch and safetensors only."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from .dit import METADATA, make_tensor

#: key style -> (prefix, A suffix, B suffix)
KEY_STYLES = {
    "comfyui": ("diffusion_model.", ".lora_A.weight", ".lora_B.weight"),
    "diffusers": ("transformer.", ".lora_A.weight", ".lora_B.weight"),
    "peft": ("base_model.model.", ".lora_A.weight", ".lora_B.weight"),
    "bare": ("", ".lora_A.weight", ".lora_B.weight"),
    "kohya": ("lora_unet_", ".lora_down.weight", ".lora_up.weight"),
}
MODULATION = (".img_mod.1", ".txt_mod.1")


def make_adapter(
    path: Path | str,
    targets: Mapping[str, tuple[int, int]] | Path | str,
    *,
    rank: int = 8,
    seed: int = 0,
    delta_std: float = 3e-4,
    alpha: float | None = None,
    key_style: str = "comfyui",
    dtype: torch.dtype = torch.bfloat16,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Writes a LoRA whose delta has entries of standard deviation `delta_std`.

    `targets` maps module paths to (out_features, in_features), or is a DiT file, of which the block
    Linears except modulation are taken. `alpha` is stored as a tensor where given; the kohya style
    always stores one (the rank). The default `delta_std` is that of a typical trained LoRA.
    """
    if key_style not in KEY_STYLES:
        raise ValueError(f"expected a key style of {sorted(KEY_STYLES)}, got {key_style!r}")
    if not isinstance(targets, Mapping):
        targets = read_targets(targets)
    if key_style == "kohya" and alpha is None:
        alpha = float(rank)
    scale = 1.0 if alpha is None else alpha / rank
    prefix, suffix_A, suffix_B = KEY_STYLES[key_style]
    state_dict = {}
    for module_path, (out_features, in_features) in targets.items():
        name = module_path.replace(".", "_") if key_style == "kohya" else module_path
        lora_A = make_tensor(f"{module_path}.lora_A", (rank, in_features), seed)
        # delta = scale * B @ A sums `rank` products, and an entry of A has std in_features ** -0.5
        lora_B = make_tensor(f"{module_path}.lora_B", (out_features, rank), seed)
        lora_B *= delta_std * in_features**0.5 / scale
        state_dict[f"{prefix}{name}{suffix_A}"] = lora_A.to(dtype)
        state_dict[f"{prefix}{name}{suffix_B}"] = lora_B.to(dtype)
        if alpha is not None:
            state_dict[f"{prefix}{name}.alpha"] = torch.tensor(alpha, dtype=dtype)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state_dict, path, METADATA | dict(metadata or {}))
    return path


def read_targets(dit_path: Path | str) -> dict[str, tuple[int, int]]:
    """Module path -> (out_features, in_features) of a DiT file's block Linears, no modulation."""
    targets = {}
    with safe_open(dit_path, framework="pt") as file:
        for key in file.keys():
            module_path = key.removesuffix(".weight")
            shape = tuple(file.get_slice(key).get_shape())
            is_block_linear = key.startswith("transformer_blocks.") and len(shape) == 2
            if is_block_linear and not module_path.endswith(MODULATION):
                targets[module_path] = shape
    return targets
