"""Distinguishing a Qwen-Image adapter from everything else, with a message for everything else."""

from __future__ import annotations

from typing import NoReturn

from ..errors import KeyFormatError, ShapeError
from ..messages import message
from ..text import shorten
from .architectures import detect_architecture, is_text_encoder
from .parsed_key import UNKNOWN_ENDING, ParsedKey, UnknownKey
from .sources import COMPANIONS


def check_any_known(parsed: list[ParsedKey], unknown: list[UnknownKey], name: str) -> None:
    """Raises unless some key is Qwen-Image's and none belongs to another model."""
    total = len(parsed) + len(unknown)
    if total == 0:
        raise KeyFormatError(
            "{name} holds no tensors; expected a LoRA for Qwen-Image-Edit.", name=shorten(name)
        )
    foreign = detect_architecture(key.key for key in unknown)
    if any("_m" in key.module_path for key in parsed):
        foreign = None  # img_mlp, txt_mod and the like exist in Qwen-Image only
    if parsed and not (foreign and not is_text_encoder(foreign)):
        return
    if foreign:
        matched = message("matches 0 modules of Qwen-Image")
        if parsed:
            matched = message(
                "shares {number} of {total} keys with Qwen-Image", number=len(parsed), total=total
            )
        raise KeyFormatError(
            "{name} {matched}: its keys are those of {foreign}, such as {key!r}. Choose a LoRA "
            "trained for Qwen-Image or Qwen-Image-Edit.",
            name=shorten(name),
            matched=matched,
            foreign=foreign,
            key=shorten(unknown[0].key),
        )
    raise_unrecognised(unknown, total, name)


def raise_unusable(
    unknown: list[UnknownKey],
    left_out: list[tuple[ParsedKey, str]],
    empty: list[str],
    total: int,
    name: str,
) -> NoReturn:
    """Raises where there are keys of Qwen-Image modules, but no module could be built."""
    if empty:
        others = (
            message(", and so do {num_empty} others", num_empty=len(empty) - 1)
            if len(empty) > 1
            else ""
        )
        raise ShapeError(
            "{name}, {empty}: it has rank 0 and adds nothing{others}; expected factors with one "
            "rank of at least 1. They were pruned away: choose another file.",
            name=shorten(name),
            empty=empty[0],
            others=others,
        )
    telling = [(key, reason) for key, reason in left_out if key.part not in COMPANIONS]
    if unknown and not telling:
        raise_unrecognised(unknown, total, name)
    what = message("Only alphas or magnitudes are left of it.")
    if telling:
        key, reason = telling[0]
        what = message("{key!r}: {reason}.", key=shorten(key.key), reason=reason)
    raise KeyFormatError(
        "{name} matches 0 modules of Qwen-Image with its {total} keys. {what}",
        name=shorten(name),
        total=total,
        what=what,
    )


def raise_unrecognised(unknown: list[UnknownKey], total: int, name: str) -> NoReturn:
    near = next((key for key in unknown if key.nearest), None)
    hint = message(" The nearest known form is {nearest!r}.", nearest=near.nearest) if near else ""
    telling = next((key for key in unknown if key.reason != UNKNOWN_ENDING), unknown[0])
    full_model = telling.reason == UNKNOWN_ENDING and any(
        key.key.endswith((".weight", ".bias")) for key in unknown
    )
    if full_model and not any("lora" in key.key.lower() for key in unknown):
        what = message("These look like whole model weights, not an adapter.")
    else:
        what = message("{key!r}: {reason}.", key=shorten(telling.key), reason=telling.reason)
    raise KeyFormatError(
        "{name} matches 0 modules of Qwen-Image with its {total} keys. {what}{hint} Expected "
        "keys such as 'transformer_blocks.0.attn.to_q.lora_A.weight'.",
        name=shorten(name),
        total=total,
        what=what,
        hint=hint,
    )
