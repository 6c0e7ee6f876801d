"""Recognising adapters of other models, so that an error can name what the file really is."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ..messages import message
from ..text import shorten

#: No producer writes longer ones, and they would make the patterns slow.
MAX_KEY = 500
CLIP, TEXT_ENCODER, LANGUAGE_MODEL = (
    message("a CLIP text encoder"),
    message("a text encoder"),
    message("a language model or text encoder"),
)
# Name -> pattern that no Qwen-Image key matches. The first match wins, so the more specific one
# comes first. Sources: the key lists in diffusers' lora_conversion_utils and ComfyUI's
# comfy/lora.py.
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
    (CLIP, r"text_model[._]encoder"),
    (TEXT_ENCODER, r"lora_te\d?_|text_encoders?[._]"),
    (LANGUAGE_MODEL, r"layers[._]\d+[._](self_attn|mlp)[._]"),
)
#: Names that only Qwen-Image blocks have; attention names alone are shared with Flux and SD3.
_QWEN_ONLY = re.compile(r"transformer_blocks[._]\d+[._](img|txt)_(mlp|mod)[._]")


def detect_architecture(keys: Iterable[str]) -> str | None:
    """The foreign architecture these keys belong to; None for Qwen-Image or unknown."""
    keys = [key for key in keys if len(key) <= MAX_KEY]
    if any(_QWEN_ONLY.search(key) for key in keys):
        return None
    for name, pattern in _SIGNS:
        if any(re.search(pattern, key) for key in keys):
            return name
    return None


def is_text_encoder(name: str) -> bool:
    """Whether an architecture is one whose keys may accompany a transformer's."""
    return name in (CLIP, TEXT_ENCODER, LANGUAGE_MODEL)


#: Fields that may name the model it was trained on.
_VARIANT_FIELDS = (
    "modelspec.architecture",
    "ss_base_model_version",
    "ss_sd_model_name",
    "base_model",
    "modelspec.title",
)
_ARCHITECTURE_FIELD, _TITLE_FIELD = "modelspec.architecture", "modelspec.title"


def detect_variants(metadata: dict[str, str], file_name: str) -> tuple[list[str], list[str]]:
    """Which Qwen-Image models the file claims to be trained for.

    Returns:
        variants out of "original", "2509", "2511", "text-to-image" (from the metadata if it
        names any, else from the file name), and one sentence per claim.
    """
    variants: list[str] = []
    hints: list[str] = []
    claims: list[tuple[str, str, str | None]] = [
        (message("metadata {field}", field=field), metadata.get(field, ""), field)
        for field in _VARIANT_FIELDS
    ]
    for source, text, field in [*claims, (message("the file name"), file_name, None)]:
        for found in read_variants(text, field == _ARCHITECTURE_FIELD):
            if variants and found not in variants and field is None:
                continue
            if found not in variants:
                variants.append(found)
            hints.append(
                message(
                    "made for {found}, says {source}: {text}",
                    found=found,
                    source=source,
                    text=shorten(text),
                )
            )
    return variants, hints


def read_variant(text: str, is_specification: bool) -> str | None:
    """The first of `read_variants`."""
    return next(iter(read_variants(text, is_specification)), None)


def read_variants(text: str, is_specification: bool) -> list[str]:
    """The variants a text names; the latest first.

    "qwen image edit" without a year applies to all variants; only in `modelspec.architecture` does
    it mean the original, and a plain "qwen-image/lora" the text-to-image model.
    """
    lowered = text[:MAX_TEXT].lower()
    found = [variant for variant in ("2511", "2509") if names_variant(variant, lowered)]
    if "2509" not in found and _PLUS.search(lowered):
        found.append("2509")
    if found or not is_specification or not _QWEN_IMAGE.search(lowered):
        return found
    if _QWEN_IMAGE_21.search(lowered):
        return []  # a model of its own, not the text-to-image one
    if version := _SIMPLETUNER_EDIT.search(lowered):
        return [_SIMPLETUNER_VERSIONS[version[1]]]
    if "edit" in lowered:
        return ["original"] if _PLAIN_EDIT.search(lowered) else []
    return ["text-to-image"]


def names_qwen_image_21(metadata: dict[str, str]) -> bool:
    """Whether a field that names the base model names Qwen-Image-2.1; a title may name any."""
    fields = (field for field in _VARIANT_FIELDS if field != _TITLE_FIELD)
    texts = (metadata.get(field, "")[:MAX_TEXT].lower() for field in fields)
    return any(_QWEN_IMAGE_21.search(text) for text in texts)


#: Of a text that is searched; a title may be as long as the file.
MAX_TEXT = 1000
_QWEN_IMAGE = re.compile(r"qwen[-_ ]?image")
_QWEN_IMAGE_21 = re.compile(r"qwen[-_ ]?image[-_ ]?2[._]?1(?![0-9])")
_PLUS = re.compile(r"edit[-_ ]plus(?![a-z])")
#: SimpleTuner's flavours of qwen_image: edit-v1, edit-v2, edit-v2+, edit-v3.
_SIMPLETUNER_EDIT = re.compile(r"edit[-_ ]?v([1-3])(?![0-9])")
_SIMPLETUNER_VERSIONS = {"1": "original", "2": "2509", "3": "2511"}
_PLAIN_EDIT = re.compile(r"qwen[-_ ]?image[-_ ]edit(?=/|$)")
#: Words next to which a number is a count.
_COUNTED = (
    r"(?:global)?[-_ ]?(?:steps?|epochs?|iter(?:ation)?s?|it|ep|seed|checkpoints?|ckpt|k?imgs?)"
)
_COUNTED_BEFORE = re.compile(rf"(?<![a-z]){_COUNTED}[-_ =:.]{{0,3}}$")
_COUNTED_BEHIND = re.compile(rf"[-_ ]{{0,2}}{_COUNTED}(?![a-z])")
_HASH = re.compile(r"[0-9a-f]{6,}")
_WORD = re.compile(r"[0-9a-z]+")


def names_variant(variant: str, lowered: str) -> bool:
    """Whether the number is there as a model's: not inside a longer one, such as a date or a step
    with leading zeros, not in a hash, and not next to a word that makes it a count."""
    for match in _WORD.finditer(lowered):
        word = match[0]
        found = re.search(rf"(?<![0-9]){variant}(?![0-9])", word)
        if found is None or _HASH.fullmatch(word):
            continue
        at = match.start() + found.start()
        before, behind = lowered[max(at - 24, 0) : at], lowered[at + len(variant) :]
        if not (_COUNTED_BEFORE.search(before) or _COUNTED_BEHIND.match(behind)):
            return True
    return False


#: Variant -> modelspec.architecture, as musubi-tuner spells it.
ARCHITECTURES = {
    "original": "Qwen-Image-Edit/lora",
    "2509": "Qwen-Image-Edit-Plus/lora",
    "2511": "Qwen-Image-Edit-2511/lora",
    "text-to-image": "Qwen-Image/lora",
}

#: Width -> (which Flux, number of its double blocks). FLUX.2 [klein] 4B has 5 of the first width.
FLUX_MODELS = {3072: ("Flux", 19), 4096: ("FLUX.2 [klein] 9B", 8)}


def find_flux_alike(
    preset: str | None, blocks: Iterable[int], width: int | None
) -> tuple[str, int] | None:
    """The Flux that such an adapter would fit as well, and the number of its double blocks.

    These share names, width and nothing else with Qwen-Image's attention.
    """
    is_attention = preset in ("attention", "image-attention", "text-attention")
    alike = FLUX_MODELS.get(width or 0)
    if alike is None or not is_attention or max(blocks, default=0) >= alike[1]:
        return None
    return alike
