"""Telling a Qwen-Image adapter from everything else, with a sentence for everything else."""

from __future__ import annotations

from typing import NoReturn

from ..errors import KeyFormatError
from .architectures import detect_architecture
from .parsed_key import UNKNOWN_ENDING, ParsedKey, UnknownKey


def check_any_known(parsed: list[ParsedKey], unknown: list[UnknownKey], name: str) -> None:
    """Raises unless some key is Qwen-Image's and none betrays another model."""
    total = len(parsed) + len(unknown)
    if total == 0:
        raise KeyFormatError(f"{name} holds no tensors; expected a LoRA for Qwen-Image-Edit.")
    foreign = detect_architecture(key.key for key in unknown)
    if any("_m" in key.module_path for key in parsed):
        foreign = None  # img_mlp, txt_mod and the like exist in Qwen-Image only
    if parsed and not (foreign and "text encoder" not in foreign):
        return
    if foreign:
        matched = f"shares {len(parsed)} of {total} keys with" if parsed else "matches 0 modules of"
        raise KeyFormatError(
            f"{name} {matched} Qwen-Image: its keys are those of {foreign}, such as "
            f"{unknown[0].key!r}. Choose a LoRA trained for Qwen-Image or Qwen-Image-Edit."
        )
    raise_unrecognised(unknown, total, name)


def raise_unrecognised(unknown: list[UnknownKey], total: int, name: str) -> NoReturn:
    near = next((key for key in unknown if key.nearest), None)
    hint = f" The nearest known form is {near.nearest!r}." if near else ""
    full_model = any(key.key.endswith((".weight", ".bias")) for key in unknown) and all(
        key.reason == UNKNOWN_ENDING and "lora" not in key.key.lower() for key in unknown
    )
    if full_model:
        what = "These look like whole model weights, not an adapter."
    elif unknown:
        what = f"{unknown[0].key!r}: {unknown[0].reason}."
    else:
        what = "Only alphas or magnitudes are left of it."
    raise KeyFormatError(
        f"{name} matches 0 modules of Qwen-Image with its {total} keys. {what}{hint} "
        "Expected keys such as 'transformer_blocks.0.attn.to_q.lora_A.weight'."
    )
