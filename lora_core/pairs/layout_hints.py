"""Hints for names that form no pairs: which folders or endings look like the two sides of one."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from itertools import combinations

from ..messages import message
from ..text import shorten
from .listing import Listing, fold

_ENDING = re.compile(r"(.+?)([ _.-]+[^\W\d_]{1,20})")
MAX_SIDES = 12  # folders or endings that are compared with each other
MIN_SHARED = 2

GENERAL = message(
    "expected folders such as 'target' and 'control' with equal names in both, endings such "
    "as 'a_start.png' and 'a_end.png', or a metadata.jsonl."
)


def suggest_names(listing: Listing) -> str:
    """The end of a message. Only the user knows which side is the edit."""
    folders: dict[str, set[str]] = defaultdict(set)
    endings: dict[str, set[str]] = defaultdict(set)
    for paths in listing.images.values():
        relative = paths[0].relative_to(listing.root)
        folders[relative.parent.as_posix()].add(fold(relative.stem))
        match = _ENDING.fullmatch(relative.stem)
        if match is not None:
            endings[match[2]].add(fold(match[1]))
    sides = find_sides(folders)
    if sides is not None:
        return message(
            "'{side}' and '{sides}' hold equal names: rename the folder of the originals "
            "'control' and that of the edits 'target'.",
            side=sides[0],
            sides=sides[1],
        )
    sides = find_sides(endings)
    if sides is not None:
        return message(
            "many end in '{side}' or '{sides}': let the originals end in '_start' and the "
            "edits in '_end'.",
            side=sides[0],
            sides=sides[1],
        )
    return GENERAL


def find_sides(names: Mapping[str, set[str]]) -> tuple[str, str] | None:
    """The two groups that share the most names."""
    largest = sorted(names, key=lambda group: (-len(names[group]), group))[:MAX_SIDES]
    best = max(
        combinations(largest, 2), key=lambda two: len(names[two[0]] & names[two[1]]), default=None
    )
    if best is None or len(names[best[0]] & names[best[1]]) < MIN_SHARED:
        return None
    first, second = sorted(best)
    return shorten(first, 40), shorten(second, 40)
