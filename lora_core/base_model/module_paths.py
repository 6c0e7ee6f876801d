"""Module paths of the Qwen-Image transformer: presets, streams, blocks, sizes.

Names and shapes are those of diffusers' QwenImageTransformer2DModel, which ComfyUI shares
(comfy/ldm/qwen_image/model.py). A module path is `transformer_blocks.<i>.<name>` or a top-level
name; `name` below is always the part after the block number.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache

from ..errors import TargetError
from ..text import shorten

NUM_BLOCKS = 60
WIDTH = 3072
TEXT_WIDTH = 3584

ATTENTION_IMAGE = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")
ATTENTION_TEXT = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out")
MLP_IMAGE = ("img_mlp.net.0.proj", "img_mlp.net.2")
MLP_TEXT = ("txt_mlp.net.0.proj", "txt_mlp.net.2")
MODULATION_IMAGE = ("img_mod.1",)
MODULATION_TEXT = ("txt_mod.1",)

BLOCK_LINEARS = (
    ATTENTION_IMAGE + ATTENTION_TEXT + MLP_IMAGE + MLP_TEXT + MODULATION_IMAGE + MODULATION_TEXT
)
BLOCK_NORMS = ("attn.norm_q", "attn.norm_k", "attn.norm_added_q", "attn.norm_added_k")

#: Top-level Linears -> (out_features, in_features) at full size.
TOP_LINEARS = {
    "img_in": (WIDTH, 64),
    "txt_in": (WIDTH, TEXT_WIDTH),
    "time_text_embed.timestep_embedder.linear_1": (WIDTH, 256),
    "time_text_embed.timestep_embedder.linear_2": (WIDTH, WIDTH),
    "norm_out.linear": (2 * WIDTH, WIDTH),
    "proj_out": (64, WIDTH),
}
TOP_NORMS = ("txt_norm",)

TARGET_PRESETS: dict[str, tuple[str, ...]] = {
    "full": ATTENTION_IMAGE + ATTENTION_TEXT + MLP_IMAGE + MLP_TEXT,
    "attention": ATTENTION_IMAGE + ATTENTION_TEXT,
    "image-stream": ATTENTION_IMAGE + MLP_IMAGE,
    "text-stream": ATTENTION_TEXT + MLP_TEXT,
    "image-attention": ATTENTION_IMAGE,
    "mlp": MLP_IMAGE + MLP_TEXT,
    "attention + image-mlp": ATTENTION_IMAGE + ATTENTION_TEXT + MLP_IMAGE,
    "full + modulation": BLOCK_LINEARS,
    "attention + modulation": ATTENTION_IMAGE + ATTENTION_TEXT + MODULATION_IMAGE + MODULATION_TEXT,
    "image-stream + modulation": ATTENTION_IMAGE + MLP_IMAGE + MODULATION_IMAGE,
    "modulation": MODULATION_IMAGE + MODULATION_TEXT,
    "diffsynth": ATTENTION_IMAGE
    + ATTENTION_TEXT
    + ("img_mlp.net.2", "txt_mlp.net.2")
    + MODULATION_IMAGE
    + MODULATION_TEXT,
}

# The last block's text output is discarded by the model, so these never receive a gradient.
INERT_LAST_BLOCK = ("attn.to_add_out", "attn.add_q_proj", *MLP_TEXT)

#: (out, in) as multiples of the width; every other block Linear is (1, 1).
_MULTIPLES = {
    **dict.fromkeys(("img_mlp.net.0.proj", "txt_mlp.net.0.proj"), (4, 1)),
    **dict.fromkeys(("img_mlp.net.2", "txt_mlp.net.2"), (1, 4)),
    **dict.fromkeys(MODULATION_IMAGE + MODULATION_TEXT, (6, 1)),
}

_TEXT_NAMES = frozenset(
    ATTENTION_TEXT
    + MLP_TEXT
    + MODULATION_TEXT
    + ("attn.norm_added_q", "attn.norm_added_k", "txt_in", "txt_norm")
)
#: Without leading zeros, which name no module of the model: ComfyUI leaves such keys out.
BLOCK_NUMBER = "(0|[1-9][0-9]{0,3})"
_BLOCK_PATH = re.compile(rf"transformer_blocks\.{BLOCK_NUMBER}\.(.+)")
_KNOWN_IN_BLOCK = frozenset(BLOCK_LINEARS + BLOCK_NORMS)
_KNOWN_ON_TOP = frozenset((*TOP_LINEARS, *TOP_NORMS))


@lru_cache(maxsize=4096)
def split_path(module_path: str) -> tuple[int | None, str]:
    """`transformer_blocks.12.attn.to_q` -> (12, "attn.to_q"); `img_in` -> (None, "img_in")."""
    match = _BLOCK_PATH.fullmatch(module_path)
    return (int(match[1]), match[2]) if match else (None, module_path)


def is_known(module_path: str) -> bool:
    """True for every module of the transformer that holds a weight, at any number of blocks."""
    block, name = split_path(module_path)
    return name in (_KNOWN_ON_TOP if block is None else _KNOWN_IN_BLOCK)


def is_norm(module_path: str) -> bool:
    """True for the norms, which have a weight and no bias."""
    block, name = split_path(module_path)
    return name in (TOP_NORMS if block is None else BLOCK_NORMS)


def get_stream(module_path: str) -> str:
    """ "image", "text", or "both" for the timestep embedding that feeds the two."""
    _, name = split_path(module_path)
    if name in _TEXT_NAMES:
        return "text"
    return "both" if name.startswith("time_text_embed") else "image"


def compute_shape(name: str, width: int = WIDTH) -> tuple[int, int]:
    """(out_features, in_features) of a Linear, by its name inside a block or on top."""
    if name in TOP_LINEARS:
        return TOP_LINEARS[name]
    if name not in BLOCK_LINEARS:
        raise TargetError(
            "{name!r} is not a Linear of a block; expected one of {block_linears}",
            name=name,
            block_linears=BLOCK_LINEARS,
        )
    out_multiple, in_multiple = _MULTIPLES.get(name, (1, 1))
    return out_multiple * width, in_multiple * width


def count_parameters(preset: str, rank: int, num_blocks: int = NUM_BLOCKS) -> int:
    """Trainable parameters of a LoRA of `rank` on a preset: rank * (in + out) per module.

    Raises:
        TargetError: no such preset.
    """
    shapes = (compute_shape(name) for name in get_preset(preset))
    return num_blocks * rank * sum(out + in_ for out, in_ in shapes)


def get_preset(preset: str) -> tuple[str, ...]:
    if preset not in TARGET_PRESETS:
        raise TargetError(
            "unknown preset {preset!r}; expected one of {target_presets}",
            preset=preset,
            target_presets=", ".join(TARGET_PRESETS),
        )
    return TARGET_PRESETS[preset]


def detect_preset(module_paths: Iterable[str]) -> str | None:
    """The preset whose module names are exactly those of the blocks in `module_paths`."""
    names = {name for block, name in map(split_path, module_paths) if block is not None}
    for preset, expected in TARGET_PRESETS.items():
        if names == set(expected):
            return preset
    return None


def list_module_paths(num_blocks: int = NUM_BLOCKS) -> list[str]:
    """Every module path of the transformer, norms included."""
    inside = [
        f"transformer_blocks.{block}.{name}"
        for block in range(num_blocks)
        for name in BLOCK_LINEARS + BLOCK_NORMS
    ]
    return [*inside, *TOP_LINEARS, *TOP_NORMS]


@lru_cache(maxsize=1)
def _underscored() -> dict[str, str]:
    """Kohya and LyCORIS replace dots by underscores; only a table of known names undoes that."""
    names = (*_KNOWN_IN_BLOCK, *_KNOWN_ON_TOP)
    return {name.replace(".", "_"): name for name in names}


_UNDERSCORED_BLOCK = re.compile(rf"transformer_blocks_{BLOCK_NUMBER}_(.+)")


def restore_dots(underscored: str) -> str | None:
    """`transformer_blocks_0_attn_to_q` -> `transformer_blocks.0.attn.to_q`; None if unknown."""
    match = _UNDERSCORED_BLOCK.fullmatch(underscored)
    name = _underscored().get(match[2] if match else underscored)
    if name is None:
        return None
    path = f"transformer_blocks.{int(match[1])}.{name}" if match else name
    return path if is_known(path) else None


def parse_block_ranges(text: str) -> frozenset[int] | None:
    """ "0-19, 40" -> the blocks 0 to 19 and 40; None, meaning everything, for an empty text.

    Raises:
        TargetError: not such a list, or a range that runs backwards.
    """
    if not text.strip():
        return None
    blocks: set[int] = set()
    for item in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,4})\s*(?:-\s*(\d{1,4})\s*)?", item)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise TargetError(
                '{item!r} is not a block range; expected numbers and ranges such as "0-19, '
                '40", or nothing for all blocks',
                item=shorten(item.strip()),
            )
        blocks.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return frozenset(blocks)


def format_blocks(blocks: Iterable[int]) -> str:
    """The inverse of `parse_block_ranges`: {0, 1, 2, 40} -> "0-2, 40"."""
    runs: list[list[int]] = []
    for block in sorted(set(blocks)):
        if runs and block == runs[-1][1] + 1:
            runs[-1][1] = block
        else:
            runs.append([block, block])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
