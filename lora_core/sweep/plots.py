"""A sweep as images: contact sheet, differences to strength 0, and the curve of change."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..drawing.contact_sheet import Row, Tile, draw_sheet
from ..drawing.style import (
    BACKGROUND,
    BLUE,
    DIM,
    DPI,
    FOREGROUND,
    LARGE,
    ORANGE,
    PANEL,
    SIZE_PX,
    SMALL,
    VERMILION,
    YELLOW,
    add_note,
    draw_message,
    render,
    shorten_name,
    show_legend,
    style_ticks,
)
from .image_metrics import STEP
from .measures import WHOLE, CellMeasures
from .verdict import VISIBLE_RMS, find_main_side, show

if TYPE_CHECKING:
    from .measures import SweepMeasures
    from .verdict import AdapterVerdict, SweepVerdict

MAX_FACTOR = 64
#: Share of a difference image's values that the factor keeps below white.
UNCLIPPED = 0.99
CURVE_COLOURS = (BLUE, ORANGE, YELLOW, "#009e73", "#cc79a7", FOREGROUND)
CURVE_STYLES = ("-", "--", "-.", (0, (1, 1.5)))  # curves that coincide show both
MISSING = "no image"


def draw_contact_sheet(sweep: SweepMeasures, verdict: SweepVerdict) -> np.ndarray:
    """The images by strength (across) and by adapter and seed (down), with their metrics."""
    rows = [
        Row(heading, tuple(build_tile(sweep, verdict, place) for place in places))
        for heading, places in arrange(sweep)
    ]
    width, height = sweep.size
    frames = f", the first of {sweep.num_frames}" if sweep.num_frames > 1 else ""
    title = f"strength sweep, {width} x {height}{frames}; RMS (of 255), SSIM: to strength 0"
    return draw_sheet(title, rows, verdict.to_text().splitlines())


def draw_differences(sweep: SweepMeasures, verdict: SweepVerdict) -> np.ndarray:
    """|image - strength 0|, all amplified by the same factor, laid out as the contact sheet."""
    factor = choose_factor(sweep, verdict)
    rows = [
        Row(heading, tuple(build_difference_tile(place, factor) for place in places))
        for heading, places in arrange(sweep)
    ]
    title = f"difference from strength 0, x {factor}"
    return draw_sheet(
        title, rows, [f"full brightness is a difference of {255 / factor:.3g} of 255 or more"]
    )


Place = tuple[float, "CellMeasures | None"]


def arrange(sweep: SweepMeasures) -> list[tuple[str, list[Place]]]:
    """Heading -> the cells of its row; None where the sweep has no image."""
    rows = []
    adapters, seeds, strengths = sweep.adapters, sweep.seeds, sweep.strengths
    # A table with more holes than images is no table: each row then has only what exists.
    is_sparse = len(adapters) * len(seeds) * len(strengths) > 2 * len(sweep.cells) + len(strengths)
    for adapter in adapters:
        for seed in seeds:
            places = [(s, sweep.find(s, seed, adapter)) for s in strengths]
            if is_sparse:
                places = [place for place in places if place[1] is not None]
            if any(measures is not None for _, measures in places):
                rows.append((describe_row(sweep, adapter, seed), places))
    return rows


def describe_row(sweep: SweepMeasures, adapter: str, seed: int | None) -> str:
    parts = [adapter] if adapter else []
    if seed is not None:
        parts.append(f"seed {seed}")
    return ", ".join(parts)


def build_tile(sweep: SweepMeasures, verdict: SweepVerdict, place: Place) -> Tile:
    strength, measures = place
    caption = f"{strength:.4g}"
    if measures is None:
        return Tile(None, caption, (MISSING,))
    notes = []
    damage = verdict.damages.get(measures.cell, "")
    if damage:
        notes.append(damage)
    elif strength == 0:
        notes.append("reference")
    if measures.change and strength != 0:
        change = measures.change[WHOLE]
        notes += [f"RMS {show(change.rms)}", f"SSIM {change.ssim:.2f}"]
    return Tile(measures.thumbnail, caption, tuple(notes), bool(damage), is_reference=strength == 0)


def build_difference_tile(place: Place, factor: int) -> Tile:
    strength, measures = place
    caption = f"{strength:.4g}"
    if measures is None or measures.change_thumbnail is None:
        return Tile(None, caption, (MISSING if measures is None else "NaN",))
    amplified = measures.change_thumbnail.astype(np.float32) * factor
    image = (amplified.clip(0, 1) * 255).round().astype(np.uint8)
    if strength == 0:
        return Tile(image, caption, ("reference",), is_reference=True)
    return Tile(image, caption, (f"RMS {show(measures.change[WHOLE].rms)}",))


def choose_factor(sweep: SweepMeasures, verdict: SweepVerdict) -> int:
    """The largest power of two that keeps the median of the undamaged images below white."""
    found = [
        float(np.quantile(m.change_thumbnail.astype(np.float32), UNCLIPPED))
        for m in sweep.cells.values()
        if m.change_thumbnail is not None and m.cell.strength and m.cell not in verdict.damages
    ]
    middle = float(np.median(found)) if found else 1.0
    factor = 1
    while factor < MAX_FACTOR and middle * factor * 2 <= 1:
        factor *= 2
    return factor


# --- the curve -----------------------------------------------------------------------------------


def draw_curve(verdict: SweepVerdict) -> np.ndarray:
    """Change and structure over the strength: means over the seeds and their spread."""
    from matplotlib.figure import Figure

    adapters = {
        name: adapter
        for name, adapter in verdict.adapters.items()
        if any(point.rms is not None and point.strength != 0 for point in adapter.curve)
    }
    if not adapters:
        return draw_message("change over strength\n\nno image can be compared with strength 0")
    width, height = SIZE_PX
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor=BACKGROUND)
    figure.set_layout_engine("constrained", rect=(0.01, 0.01, 0.97, 0.98))
    upper, lower = figure.subplots(2, sharex=True, height_ratios=(3, 2))
    upper.set_title("change from strength 0", color=FOREGROUND, fontsize=LARGE, pad=14)
    for number, (name, adapter) in enumerate(adapters.items()):
        colour = CURVE_COLOURS[number % len(CURVE_COLOURS)]
        style = CURVE_STYLES[number % len(CURVE_STYLES)]
        draw_adapter(upper, lower, adapter, shorten_name(name, 24), colour, style)
    if len(adapters) == 1:
        adapter = next(iter(adapters.values()))
        mark_range(upper, adapter)
        draw_proportion(upper, adapter)
    mark_collapses(upper, lower, list(adapters.values()))
    upper.axhline(VISIBLE_RMS / STEP, color=DIM, linestyle=":", linewidth=2.5, label="visible")
    upper.set_ylim(bottom=0)
    upper.set_ylabel("RMS of 255", color=FOREGROUND, fontsize=SMALL)
    lower.set_ylabel("SSIM", color=FOREGROUND, fontsize=SMALL)
    lower.set_xlabel("strength", color=FOREGROUND, fontsize=SMALL)
    lower.set_ylim(min(0.0, lower.get_ylim()[0]), 1.03)
    for axes in (upper, lower):
        axes.set_facecolor(PANEL)
        axes.margins(x=0.03)
        style_ticks(axes)
    seeds = max(point.num_seeds for a in adapters.values() for point in a.curve)
    spread = f"mean of {seeds} seeds, shaded from least to most; " if seeds > 1 else ""
    add_note(figure, f"{spread}SSIM 1: same structure as strength 0, 0: none in common")
    handles, _ = upper.get_legend_handles_labels()
    if len(handles) <= 8:
        show_legend(upper, "best")
    return render(figure)


def draw_adapter(
    upper: Any, lower: Any, adapter: AdapterVerdict, name: str, colour: str, style: Any
) -> None:
    points = [point for point in adapter.curve if point.rms is not None]
    x = [point.strength for point in points]
    low, middle, high = (
        [getattr(p, key) / STEP for p in points] for key in ("rms_low", "rms", "rms_high")
    )
    line = {"color": colour, "linestyle": style, "linewidth": 3.5, "marker": "o", "markersize": 8}
    upper.plot(x, middle, label=name or "change", **line)
    lower.plot(x, [point.ssim for point in points], **line)
    if any(a != b for a, b in zip(low, high, strict=True)):
        upper.fill_between(x, low, high, color=colour, alpha=0.25, linewidth=0)
    damaged = [point for point in points if point.damage]
    if damaged:
        marks = {"s": 220, "marker": "X", "color": VERMILION, "zorder": 4, "linewidth": 0}
        upper.scatter([p.strength for p in damaged], [p.rms / STEP for p in damaged], **marks)
        lower.scatter([p.strength for p in damaged], [p.ssim for p in damaged], **marks)


def mark_range(axes: Any, adapter: AdapterVerdict) -> None:
    if adapter.suggested:
        low, high = sorted(adapter.suggested)
        axes.axvspan(
            low, high, color="#009e73", alpha=0.22, linewidth=0, label="suggested range", zorder=0
        )


def draw_proportion(axes: Any, adapter: AdapterVerdict) -> None:
    """Where the change would be if it grew in proportion to the strength from the first point."""
    points = [p for p in find_main_side(adapter.curve) if p.rms]
    if len(points) < 2:
        return
    first, highest = points[0], max(p.rms / STEP for p in points)
    slope = first.rms / STEP / first.strength
    end = points[-1].strength
    end = end if slope * end <= 1.1 * highest else 1.1 * highest / slope
    axes.plot(
        [0, end], [0, slope * end], color=FOREGROUND, linestyle=":", linewidth=2.5, zorder=1,
        label="in proportion",
    )  # fmt: skip


def mark_collapses(upper: Any, lower: Any, adapters: list[AdapterVerdict]) -> None:
    strengths = sorted({strength for adapter in adapters for strength in adapter.collapses_at})
    for number, strength in enumerate(strengths):
        label = "collapses" if number == 0 else None
        line = {"color": VERMILION, "linestyle": "--", "linewidth": 2.5}
        upper.axvline(strength, label=label, **line)
        lower.axvline(strength, **line)
