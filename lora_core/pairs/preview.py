"""A preflight as a report, a table and a contact sheet."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import numpy as np
from PIL import Image

from ..drawing.contact_sheet import Row, Tile, draw_sheet
from ..messages import join_messages, message
from ..text import align, count_columns, format_count, pad, shorten
from .pair import Level, Problem
from .preflight import CheckedPair, Preflight, count_sizes

MAX_PROBLEMS = 12  # a level in the report; the table has all
MAX_SIZES = 6
MAX_TILES = 18  # pairs on the contact sheet
ROW_IMAGES = 6  # side by side
TILE_PX = 224
GAP_PX = 4
CAPTION_LETTERS = 60
GREY = (38, 40, 46)
BACKGROUND_GREY = (90, 94, 102)

TITLES = (
    message("pair"),
    message("target"),
    message("trained at"),
    message("references"),
    message("caption"),
    message("found"),
)
PREFIXES = {
    Level.STOP: message("Stop: "),
    Level.QUESTION: message("Warning: "),
    Level.WARNING: message("Warning: "),
    Level.NOTE: "",
}


def describe_preflight(preflight: Preflight) -> str:
    """What was found, sizes, and the problems, the worst first."""
    lines = [
        message(
            "{preflight}: {num_pairs} of {num_found} pairs can be used",
            preflight=shorten(preflight.name),
            num_pairs=len(preflight.pairs),
            num_found=preflight.num_found,
        ),
        message("layout: {layout}", layout=preflight.layout),
    ]
    sizes = count_sizes(preflight.pairs).most_common()
    if sizes:
        shown = [f"{w} x {h} ({count})" for (w, h), count in sizes[:MAX_SIZES]]
        if len(sizes) > MAX_SIZES:
            shown.append(message("{count} more", count=len(sizes) - MAX_SIZES))
        lines.append(message("sizes: {shown}", shown=join_messages(", ", shown)))
        numbers = sorted({len(one.pair.references) for one in preflight.pairs})
        masks = sum(one.pair.mask is not None for one in preflight.pairs)
        lines.append(
            message("references per pair: {numbers}", numbers=", ".join(map(str, numbers)))
            + (message("; {count} masks", count=masks) if masks else "")
        )
    for level in sorted(PREFIXES, reverse=True):
        texts = [p.text for p in preflight.problems if p.level == level]
        lines += [PREFIXES[level] + text for text in texts[:MAX_PROBLEMS]]
        if len(texts) > MAX_PROBLEMS:
            more = message("{count} more like these", count=len(texts) - MAX_PROBLEMS)
            lines.append(PREFIXES[level] + more)
    return join_messages("\n", lines)


def build_table(preflight: Preflight, show: Callable[[str], str] = str) -> str:
    """A line per pair: sizes, caption, and what was found.

    Args:
        show: makes each text what the reader reads; columns are aligned by its result.
    """
    by_pair: dict[str | None, list[str]] = defaultdict(list)
    for problem in preflight.problems:
        by_pair[problem.pair].append(show(problem.text))
    rows = [[show(title) for title in TITLES]]
    for one in preflight.pairs:
        target = one.facts.target
        rows.append(
            [
                shorten(one.pair.name, 40),
                f"{target.width} x {target.height}",
                f"{one.size[0]} x {one.size[1]}",
                ", ".join(f"{r.width} x {r.height}" for r in one.facts.references),
                cut_caption(one.pair.caption or ""),
                "; ".join(by_pair.pop(one.pair.name, [])) or "-",
            ]
        )
    rows += [
        [shorten(pair, 40), "-", "-", "-", "-", "; ".join(texts)]
        for pair, texts in by_pair.items()
        if pair is not None
    ]
    return "\n".join([*align_left(rows), *by_pair.get(None, [])])


def align_left(rows: list[list[str]]) -> list[str]:
    """`tables.align` puts numbers to the right; here everything but the sizes is text."""
    widths = [max(map(count_columns, column)) for column in zip(*rows, strict=True)]
    padded = [[pad(cell, w) for cell, w in zip(row, widths, strict=True)] for row in rows]
    return [line.rstrip() for line in align(padded)]


def cut_caption(text: str, letters: int = CAPTION_LETTERS) -> str:
    line = " ".join(text.split())
    return line if len(line) <= letters else f"{line[: letters - 3]}..."


# --- the contact sheet ----------------------------------------------------------------------------


def draw_pairs(preflight: Preflight) -> np.ndarray:
    """uint8 (height, width, 3): a tile per pair, references left of the target, the worst first."""
    worst: dict[str | None, Problem] = {}
    for problem in preflight.problems:  # the worst come first
        worst.setdefault(problem.pair, problem)
    pairs = sorted(
        preflight.pairs,
        key=lambda one: -worst[one.pair.name].level if one.pair.name in worst else 1,
    )
    shown = pairs[:MAX_TILES]
    widest = max((len(one.pair.references) for one in shown), default=1) + 1
    tiles = [build_tile(one, worst.get(one.pair.name), widest) for one in shown]
    per_row = min(len(tiles), ROW_IMAGES // widest)
    rows = [Row("", tuple(tiles[i : i + per_row])) for i in range(0, len(tiles), per_row or 1)]
    rows = rows or [Row("no pair can be used", (Tile(None, ""),))]
    name = shorten(preflight.name)
    title = f"{name}: {format_count(len(preflight.pairs), 'pair')}, references left, target right"
    if len(pairs) > MAX_TILES:
        title += f"; {MAX_TILES} of them"
    whole = [p.text for p in preflight.problems if p.pair is None and p.level > Level.NOTE]
    return draw_sheet(title, rows, whole[:4])


def build_tile(one: CheckedPair, problem: Problem | None, widest: int) -> Tile:
    """The pair as one image, as wide as the widest pair's."""
    images = [*one.pair.references, one.pair.target]
    blank = np.full((TILE_PX, TILE_PX, 3), GREY, np.uint8)
    frames = [blank] * (widest - len(images))
    frames += [pad_to_square(image.read_small(TILE_PX)) for image in images]
    gap = np.full((TILE_PX, GAP_PX, 3), BACKGROUND_GREY, np.uint8)
    joined = [part for frame in frames for part in (gap, frame)][1:]
    target = one.facts.target
    size = f"{target.width} x {target.height}, trained at {one.size[0]} x {one.size[1]}"
    caption = cut_caption(one.pair.caption or "empty caption")
    notes: tuple[str, ...] = (caption, size)
    is_marked = False
    if problem is not None and problem.level >= Level.WARNING:
        notes, is_marked = (problem.short or problem.text, *notes), True
    return Tile(np.concatenate(joined, axis=1), one.pair.name, notes, is_marked=is_marked)


def pad_to_square(pixels: np.ndarray) -> np.ndarray:
    """The whole image in a square: tiles have one size, and nothing should be cropped."""
    image = Image.fromarray(pixels)
    scale = TILE_PX / max(image.size)
    width, height = (max(1, round(length * scale)) for length in image.size)
    square = Image.new("RGB", (TILE_PX, TILE_PX), GREY)
    square.paste(
        image.resize((width, height), Image.Resampling.LANCZOS),
        ((TILE_PX - width) // 2, (TILE_PX - height) // 2),
    )
    return np.asarray(square)
