"""All families of base models: which one a file is of, and what holds for any of them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

from .family import Family, Fusion
from .module_paths import BLOCK_NUMBER, split_path
from .qwen_image import QWEN_IMAGE
from .qwen_image_21 import QWEN_IMAGE_21

#: The first is that of files that existed before there were several.
FAMILIES: tuple[Family, ...] = (QWEN_IMAGE, QWEN_IMAGE_21)

#: Name of a fused module inside a block -> what it holds, in any family.
FUSED: dict[str, Fusion] = {name: fusion for f in FAMILIES for name, fusion in f.fused.items()}
#: Position of every Linear inside a block, as plots and plans list them.
BLOCK_ORDER = {
    name: i for i, name in enumerate(dict.fromkeys(n for f in FAMILIES for n in f.block_linears))
}
#: Name of a Linear inside a block -> its short form.
BLOCK_LABELS = {name: label for family in FAMILIES for name, label in family.labels.items()}

_UNDERSCORED_BLOCK = re.compile(rf"transformer_blocks_{BLOCK_NUMBER}_(.+)")


def get_family(name: str | None) -> Family | None:
    """The family of this name; None for None and for a name that a later version wrote."""
    return next((family for family in FAMILIES if family.name == name), None)


def is_known(module_path: str) -> bool:
    """True for every module of a transformer that holds a weight, at any number of blocks."""
    return any(family.is_known(module_path) for family in FAMILIES)


def is_norm(module_path: str) -> bool:
    return any(family.is_norm(module_path) for family in FAMILIES)


def is_fused(module_path: str) -> bool:
    block, name = split_path(module_path)
    return block is not None and name in FUSED


def list_members(module_path: str) -> list[str]:
    """The modules that the fused one at this path holds, in the order of their rows."""
    block, name = split_path(module_path)
    return [f"transformer_blocks.{block}.{member}" for member in FUSED[name].members]


@lru_cache(maxsize=1)
def _underscored() -> tuple[dict[str, str], dict[str, str]]:
    """Kohya and LyCORIS replace dots by underscores; only a table of known names undoes that."""
    inside = (n for f in FAMILIES for n in (*f.block_linears, *f.block_norms, *f.fused))
    on_top = (n for f in FAMILIES for n in (*f.top_linears, *f.top_norms))
    return (
        {name.replace(".", "_"): name for name in inside},
        {name.replace(".", "_"): name for name in on_top},
    )


def restore_dots(underscored: str) -> str | None:
    """`transformer_blocks_0_attn_to_q` -> `transformer_blocks.0.attn.to_q`; None if unknown."""
    inside, on_top = _underscored()
    match = _UNDERSCORED_BLOCK.fullmatch(underscored)
    if match is None:
        return on_top.get(underscored)
    name = inside.get(match[2])
    return None if name is None else f"transformer_blocks.{int(match[1])}.{name}"


def detect_family(shapes: Mapping[str, Sequence[int] | None]) -> Family | None:
    """The family of these modules: by names that only one has, then shapes, then blocks.

    Args:
        shapes: module path, fused ones included -> (out, in) of its weight, or only (out,), or
            None where that is unknown.

    Returns:
        None where nothing tells the families apart.
    """
    return detect_by_names(shapes) or detect_by_shapes(shapes) or detect_by_blocks(shapes)


def detect_by_names(module_paths: Iterable[str]) -> Family | None:
    """The family with the most modules of names that no other family has."""
    found = Counter(split_path(path)[::-1] for path in module_paths)
    counts: Counter[Family] = Counter()
    for (name, block), number in found.items():
        owners = _find_owners(name, block is not None)
        if len(owners) == 1:
            counts[owners[0]] += number
    return find_winner(counts)


@lru_cache(maxsize=256)
def _find_owners(name: str, is_in_block: bool) -> tuple[Family, ...]:
    path = f"transformer_blocks.0.{name}" if is_in_block else name
    return tuple(f for f in FAMILIES if f.is_known(path) or f.is_fused(path))


def detect_by_shapes(shapes: Mapping[str, Sequence[int] | None]) -> Family | None:
    """The family with the most modules whose full-size shape is that of no other family."""
    counts: Counter[Family] = Counter()
    for path, shape in shapes.items():
        if not shape:
            continue
        block, name = split_path(path)
        owners = [
            family
            for family in FAMILIES
            for table in [family.top_linears if block is None else family.block_linears]
            if name in table and table[name][: len(shape)] == tuple(shape)
        ]
        if len(owners) == 1:
            counts[owners[0]] += 1
    return find_winner(counts)


def detect_by_blocks(module_paths: Iterable[str]) -> Family | None:
    """The only family that has as many blocks, if there is one."""
    blocks = [block for block, _ in map(split_path, module_paths) if block is not None]
    owners = [family for family in FAMILIES if max(blocks, default=0) < family.num_blocks]
    return owners[0] if len(owners) == 1 else None


def find_winner(counts: Mapping[Family, int]) -> Family | None:
    """The one with the highest count; None where two share it."""
    best = max(counts.values(), default=0)
    winners = [family for family, number in counts.items() if number == best]
    return winners[0] if len(winners) == 1 else None


#: Of the family that training and scripts meant before there were several.
TARGET_PRESETS: Mapping[str, tuple[str, ...]] = QWEN_IMAGE.presets


def count_parameters(
    preset: str, rank: int, num_blocks: int | None = None, family: Family | None = None
) -> int:
    """Trainable parameters of a LoRA of `rank` on a preset: rank * (in + out) per module.

    Args:
        num_blocks: by default those of the full model.
        family: by default Qwen-Image.

    Raises:
        TargetError: no such preset.
    """
    return (family or QWEN_IMAGE).count_parameters(preset, rank, num_blocks)
