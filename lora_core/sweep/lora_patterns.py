"""Choosing several files of the loras folders at once, such as the checkpoints of one run."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from ..disk.safetensors_file import is_safetensors, shorten
from ..errors import FileError
from ..text import build_natural_key


def find_loras(patterns: str, names: Sequence[str]) -> list[str]:
    """The names that match any line of `patterns`, numbers in their order: step 9 before step 10.

    Args:
        patterns: one per line, such as "my_run/*"; `/` also matches Windows' separator.
        names: as ComfyUI lists them.

    Raises:
        FileError: a line matches nothing.
    """
    found: dict[str, None] = {}
    for line in filter(None, map(str.strip, patterns.splitlines())):
        matching = [name for name in names if matches(name, line)]
        if not matching:
            raise FileError(
                "{line!r} matches none of the {num_names} files in the loras folders; expected "
                "a name or a pattern below them, such as 'my_run/*'. Press R to see new files.",
                line=shorten(line),
                num_names=len(names),
            )
        found |= dict.fromkeys(sorted(matching, key=build_sort_key))
    return list(found)


def matches(name: str, pattern: str) -> bool:
    name, pattern = (text.replace("\\", "/").casefold() for text in (name, pattern))
    stem = name.rpartition(".")[0] if is_safetensors(name) else name
    return pattern in (name, stem) or fnmatchcase(name, pattern) or fnmatchcase(stem, pattern)


def build_sort_key(name: str) -> list[tuple[int, int, str]]:
    return build_natural_key(name.replace("\\", "/").casefold())
