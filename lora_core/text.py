"""Text for users: numbers, sizes and times, lists, columns, and what others wrote, made printable.

One rule for all numbers: three significant digits, a space before the unit.
"""

from __future__ import annotations

import math
import os
import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .messages import join_messages, message

#: Of a name, a key or a value that a message repeats.
MAX_SHOWN = 80
_TAIL = 16


def shorten(text: str, limit: int = MAX_SHOWN) -> str:
    """At most `limit` characters, the end kept; what cannot be printed becomes "?"."""
    if len(text) > limit:
        text = f"{text[: limit - _TAIL - 4]}...{text[-_TAIL:]}"
    return text if text.isprintable() else "".join(c if c.isprintable() else "?" for c in text)


def flatten(text: str) -> str:
    """On one line; still a message if it was on one."""
    flat = " ".join(text.split())
    return text if text == flat else flat


def name_path(path: str | os.PathLike[str]) -> str:
    """The last part of a path, as messages name it; of ".", "" or "/" the quoted path itself."""
    return shorten(Path(path).name) or repr(os.fspath(path))


def align(rows: list[list[str]]) -> list[str]:
    """Columns under each other, the first to the left and numbers to the right."""
    widths = [max(map(count_columns, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            pad(cell, width, to_the_right=i > 0)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def pad(cell: str, width: int, to_the_right: bool = False) -> str:
    blank = " " * (width - count_columns(cell))
    return f"{blank}{cell}" if to_the_right else f"{cell}{blank}"


def count_columns(text: str) -> int:
    """As a terminal or a monospaced font shows it: a Chinese character takes two."""
    if text.isascii():
        return len(text)
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def join_counts(counts: Mapping[Any, int]) -> str:
    """{64: 720} -> "64"; {32: 700, 64: 20} -> "32 (700 modules), 64 (20 modules)"."""
    if len(counts) == 1:
        return show(next(iter(counts)))
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    shown = [show(value) + f" ({count})" for value, count in ordered[:4]]
    if len(ordered) > 4:
        shown.append(message("{count} more", count=len(ordered) - 4))
    return join_messages(", ", shown)


def show(value: Any) -> str:
    if isinstance(value, str):
        return value
    return f"{value:g}" if isinstance(value, float) else str(value)


def format_count(number: int, noun: str, plural: str = "") -> str:
    """ "1 module", "2 modules"; `plural` if it is not the noun with an s."""
    return message(f"{{n:,}} {noun if number == 1 else plural or f'{noun}s'}", n=number)


def format_number(value: float) -> str:
    """Three significant digits: 0.0123, 4.56, 1,230, 1.23e-05."""
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    rounded = float(f"{value:.3g}")
    if not 1e-4 <= abs(rounded) < 1e6:
        return f"{value:.3g}"
    return f"{rounded:,.0f}" if abs(rounded) >= 1000 else f"{rounded:.3g}"


def format_percent(share: float) -> str:
    """0.98839 -> "98.8 %"; 0.9997 -> "99.97 %", since less than all is not shown as 100 %."""
    percent = 100 * share
    if 99.9 <= percent < 99.995:
        return f"{percent:.2f} %"
    return f"{format_number(percent)} %"


def format_bytes(size: float, base: int = 1000) -> str:
    """B, kB, MB, GB of a file; with base 1024 B, KiB, MiB, GiB of memory."""
    units = ("B", "kB", "MB", "GB", "TB") if base == 1000 else ("B", "KiB", "MiB", "GiB", "TiB")
    for unit in units[:-1]:
        if float(f"{size:.3g}") < base:
            return f"{format_number(size)} {unit}"
        size /= base
    return f"{format_number(size)} {units[-1]}"


def format_duration(seconds: float) -> str:
    """ "0.251 s", "12.3 s", "12 min", "3 h 20 min"."""
    if float(f"{seconds:.3g}") < 60:
        return message("{seconds} s", seconds=format_number(seconds))
    minutes = round(seconds / 60)
    hours, minutes = divmod(minutes, 60)
    if not hours:
        return message("{minutes} min", minutes=minutes)
    if not minutes:
        return message("{hours:,} h", hours=hours)
    return message("{hours:,} h {minutes} min", hours=hours, minutes=minutes)


def shorten_list(items: list[str] | tuple[str, ...], limit: int) -> str:
    shown = list(items[:limit])
    if len(items) > limit:
        shown.append(message("and {count} more", count=len(items) - limit))
    return join_messages("; ", shown)


def build_natural_key(name: str) -> list[tuple[int, int, str]]:
    """A key for `sorted` under which `a_2` comes before `a_10`; upper case before lower case."""
    parts = re.split(r"(\d+)", name)
    return [(0, int(part), "") if i % 2 else (1, 0, part) for i, part in enumerate(parts)]
