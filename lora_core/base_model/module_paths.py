"""Module paths: blocks, names inside a block, ranges of blocks.

A module path is `transformer_blocks.<i>.<name>` or a top-level name. Which names there are is in
the tables of the families, see `families.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache

from ..errors import TargetError
from ..text import shorten

#: Without leading zeros, which name no module of the model: ComfyUI leaves such keys out.
BLOCK_NUMBER = "(0|[1-9][0-9]{0,3})"
_BLOCK_PATH = re.compile(rf"transformer_blocks\.{BLOCK_NUMBER}\.(.+)")


@lru_cache(maxsize=4096)
def split_path(module_path: str) -> tuple[int | None, str]:
    """`transformer_blocks.12.attn.to_q` -> (12, "attn.to_q"); `img_in` -> (None, "img_in")."""
    match = _BLOCK_PATH.fullmatch(module_path)
    return (int(match[1]), match[2]) if match else (None, module_path)


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
