"""Recognising adapters of other models, so that an error can name what the file really is."""

from __future__ import annotations

import re
from collections.abc import Iterable

# Name -> pattern that no Qwen-Image key matches. The first hit wins, so the more particular one
# stands first. Names of text encoders contain "text encoder". Sources: the key lists in diffusers'
# lora_conversion_utils and ComfyUI's comfy/lora.py.
_SIGNS: tuple[tuple[str, str], ...] = (
    ("Flux or HunyuanVideo (diffusers)", r"single_transformer_blocks[._]\d+"),
    ("Flux, HunyuanVideo or Chroma", r"(?<![a-z])(double_blocks|single_blocks)[._]\d+"),
    ("HiDream", r"(double|single)_stream_blocks[._]\d+"),
    ("SDXL UNet", r"(in|out)put_blocks[._]\d+[._]|middle_block[._]"),
    ("SDXL UNet", r"(down_blocks|up_blocks|mid_block)[._].*transformer_blocks[._][1-9]"),
    ("Stable Diffusion 1 or 2 UNet", r"(down_blocks|up_blocks|mid_block)[._]"),
    ("Stable Diffusion 3", r"joint_blocks[._]\d+"),
    ("LTX-Video, CogVideoX or PixArt", r"transformer_blocks[._]\d+[._]attn1[._]"),
    (
        "Stable Diffusion 3 or Flux (diffusers)",
        r"transformer_blocks[._]\d+[._](ff|ff_context|norm1|norm1_context|attn2)[._]",
    ),
    ("Wan or Cosmos", r"blocks[._]\d+[._](self_attn|cross_attn|ffn|attn[12])[._]"),
    (
        "Z-Image or Lumina",
        r"(layers|noise_refiner|context_refiner)[._]\d+[._](attention|feed_forward)[._]",
    ),
    ("a CLIP text encoder", r"text_model[._]encoder"),
    ("a text encoder", r"lora_te\d?_|text_encoders?[._]"),
    ("a language model or text encoder", r"layers[._]\d+[._](self_attn|mlp)[._]"),
)
#: Names that only Qwen-Image blocks have; attention names alone are shared with Flux and SD3.
_QWEN_ONLY = re.compile(r"transformer_blocks[._]\d+[._](img|txt)_(mlp|mod)[._]")


def detect_architecture(keys: Iterable[str]) -> str | None:
    """The foreign architecture these keys belong to; None for Qwen-Image or unknown."""
    keys = list(keys)
    if any(_QWEN_ONLY.search(key) for key in keys):
        return None
    for name, pattern in _SIGNS:
        if any(re.search(pattern, key) for key in keys):
            return name
    return None


def detect_variants(metadata: dict[str, str], file_name: str) -> tuple[list[str], list[str]]:
    """Which Qwen-Image models the file says it was trained for.

    Returns:
        variants out of "original", "2509", "2511", "text-to-image" (from the metadata if that
        says anything, else from the file name), and one sentence per claim.
    """
    claims = [
        (f"metadata {field}", metadata[field])
        for field in (
            "modelspec.architecture",
            "ss_base_model_version",
            "ss_sd_model_name",
            "base_model",
            "training_info",
            "modelspec.title",
        )
        if metadata.get(field)
    ]
    variants: list[str] = []
    hints: list[str] = []
    for source, text in [*claims, ("the file name", file_name)]:
        found = read_variant(text, is_specification=source == "metadata modelspec.architecture")
        if found and (not variants or found in variants or source != "the file name"):
            if found not in variants:
                variants.append(found)
            hints.append(f"made for {found}, says {source}: {text[:80]}")
    return variants, hints


def read_variant(text: str, is_specification: bool) -> str | None:
    """The variant a text speaks of.

    "qwen image edit" without a year is said of all variants; only in `modelspec.architecture` does
    it mean the original, and a plain "qwen-image/lora" the text-to-image model.
    """
    lowered = text.lower()
    if "2511" in lowered:
        return "2511"
    if any(mark in lowered for mark in ("2509", "edit-plus", "edit_plus")):
        return "2509"
    if not is_specification or not re.search(r"qwen[-_ ]?image", lowered):
        return None
    return "original" if "edit" in lowered else "text-to-image"


#: Variant -> modelspec.architecture, as musubi-tuner spells it.
ARCHITECTURES = {
    "original": "Qwen-Image-Edit/lora",
    "2509": "Qwen-Image-Edit-Plus/lora",
    "2511": "Qwen-Image-Edit-2511/lora",
    "text-to-image": "Qwen-Image/lora",
}

FLUX_BLOCKS = 19
FLUX_WIDTH = 3072


def could_be_flux(preset: str | None, blocks: Iterable[int], width: int | None) -> bool:
    """Flux's double blocks share names, width and nothing else with Qwen-Image's attention."""
    is_attention = preset in ("attention", "image-attention", "text-attention")
    return is_attention and width == FLUX_WIDTH and max(blocks, default=0) < FLUX_BLOCKS
