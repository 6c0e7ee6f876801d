"""Text for users: lists, columns, and what others wrote, shortened and made printable."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

#: Of a name, a key or a value that a message repeats.
MAX_SHOWN = 80
_TAIL = 16


def shorten(text: str, limit: int = MAX_SHOWN) -> str:
    """At most `limit` characters, the end kept; what cannot be printed becomes "?"."""
    if len(text) > limit:
        text = f"{text[: limit - _TAIL - 4]}...{text[-_TAIL:]}"
    return text if text.isprintable() else "".join(c if c.isprintable() else "?" for c in text)


def align(rows: list[list[str]]) -> list[str]:
    """Columns under each other, the first to the left and numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def join_counts(counts: Mapping[Any, int]) -> str:
    """{64: 720} -> "64"; {32: 700, 64: 20} -> "32 (700 modules), 64 (20 modules)"."""
    if len(counts) == 1:
        return show(next(iter(counts)))
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    shown = [f"{show(value)} ({count})" for value, count in ordered[:4]]
    return ", ".join([*shown, f"{len(ordered) - 4} more"] if len(ordered) > 4 else shown)


def show(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def shorten_list(items: list[str] | tuple[str, ...], limit: int) -> str:
    rest = len(items) - limit
    return "; ".join(items[:limit]) + (f"; and {rest} more" if rest > 0 else "")


def build_natural_key(name: str) -> list[tuple[int, int, str]]:
    """A key for `sorted` under which `a_2` comes before `a_10`; upper case before lower case."""
    parts = re.split(r"(\d+)", name)
    return [(0, int(part), "") if i % 2 else (1, 0, part) for i, part in enumerate(parts)]
