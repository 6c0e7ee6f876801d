"""Where a model keeps the modules named by adapters: most under the same names, some fused.

An adapter's module paths are those of diffusers' transformer, which ComfyUI shares. Models of other
extensions may fuse several of them into one Linear, or run some in kernels that bypass forward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ...lora_core import ConfigError
from ...lora_core.base_model.qwen_image_21 import GATE_UP, QWEN_IMAGE_21
from ...lora_core.messages import message
from ..host import Place


@dataclass(frozen=True)
class Layout:
    """How a kind of model differs from the module names in adapters."""

    name: str
    find_place: Callable[[str], Place | None]
    """Module path of an adapter -> its place; None where no forward computes it."""
    reason: str = ""
    """Why some have no place."""
    no_merge_reason: str = ""
    """Why nothing can be merged; empty where it can."""


PLAIN = Layout("plain", Place)

_FUSED = {
    **{f"attn.to_{name}": ("attn.to_qkv", part) for part, name in enumerate("qkv")},
    **{f"attn.add_{name}_proj": ("attn.add_qkv_proj", part) for part, name in enumerate("qkv")},
}
_KERNEL = (".img_mlp.", ".txt_mlp.")
_MODULATIONS = (".img_mod.1", ".txt_mod.1")


def find_nunchaku_place(path: str) -> Place | None:
    """ComfyUI-nunchaku 1.0, models/qwenimage.py."""
    if any(name in path for name in _KERNEL):
        return None
    if path.endswith(_MODULATIONS):
        return Place(path, interleave=6)
    for name, (fused, part) in _FUSED.items():
        if path.endswith(f".{name}"):
            return Place(path.removesuffix(name) + fused, part, 3)
    return Place(path)


NUNCHAKU = Layout(
    "nunchaku",
    find_nunchaku_place,
    message("nunchaku runs both Linears of an MLP in one 4-bit kernel, which a LoRA cannot enter"),
    message("a nunchaku model keeps no weights that can be patched"),
)

_HALVES = tuple(f".{name}" for name in QWEN_IMAGE_21.fused[GATE_UP].members)


def find_fused_place(path: str) -> Place | None:
    """Comfy-Org's files of Qwen-Image-2.1: rows of gate_layer, then those of proj."""
    for part, name in enumerate(_HALVES):
        if path.endswith(name):
            return Place(f"{path.removesuffix(name)}.{GATE_UP}", part, 2)
    return Place(path)


FUSED_MLP = Layout("fused", find_fused_place)


def find_layout(diffusion_model: torch.nn.Module) -> Layout:
    # By class name, as the package that defines it must not be imported.
    names = {base.__name__ for base in type(diffusion_model).__mro__}
    if "NunchakuQwenImageTransformer2DModel" in names:
        return NUNCHAKU
    has_fused_mlp = any(path.endswith(GATE_UP) for path, _ in diffusion_model.named_modules())
    return FUSED_MLP if has_fused_mlp else PLAIN


def check_layout(diffusion_model: torch.nn.Module) -> None:
    """
    Raises:
        ConfigError: the model is configured so that our forwards would not be called.
    """
    if find_layout(diffusion_model) is NUNCHAKU and getattr(diffusion_model, "offload", False):
        raise ConfigError(
            "this MODEL is a nunchaku Qwen-Image with CPU offload, which runs copies of its "
            "blocks that a LoRA cannot be put on. Set cpu_offload to 'disable' in its loader; if "
            "memory is too small for that, choose an fp8 or GGUF file, which ComfyUI offloads."
        )
