"""The plot of an Effect: change over strength above, change through the blocks below."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..drawing.style import (
    BLUE,
    DIM,
    ORANGE,
    VERMILION,
    YELLOW,
    add_note,
    build_panels,
    label_axes,
    render,
    shorten_name,
    show_legend,
    style_ticks,
)
from .effect import Effect

LINES = [(colour, style) for style in ("-", "--", ":") for colour in (BLUE, ORANGE, YELLOW)]
MAX_BLOCK_CURVES = 6


def draw_effect(effect: Effect) -> np.ndarray:
    """uint8 (height, width, 3)."""
    figure, (above, below) = build_panels(f"{shorten_name(effect.name)}: change of the output")
    draw_outputs(above, effect)
    draw_blocks(below, effect)
    for axes in (above, below):
        axes.set_ylim(bottom=0)
        style_ticks(axes)
    add_note(figure, effect.judge())
    return render(figure)


def draw_outputs(axes: Any, effect: Effect) -> None:
    found = sorted(effect.strengths, key=lambda e: e.strength)
    strengths = [e.strength for e in found]
    for index, sigma in enumerate(effect.sigmas):
        colour, style = LINES[index % len(LINES)]
        values = [100 * e.outputs[index] for e in found]
        label = f"sigma {sigma:g}"
        axes.plot(strengths, values, style, color=colour, linewidth=3, marker="o", label=label)
    broken = [e.strength for e in found if not math.isfinite(e.change)]
    for number, strength in enumerate(broken):
        name = "NaN" if number == 0 else None
        axes.axvline(strength, color=VERMILION, linewidth=3, label=name)
    axes.axvline(0, color=DIM, linewidth=1)
    label_axes(axes, "strength", "change, %")
    show_legend_beside(axes)


def draw_blocks(axes: Any, effect: Effect) -> None:
    from matplotlib.ticker import MaxNLocator

    shown = [e for e in effect.strengths if e.blocks and math.isfinite(sum(e.blocks))]
    shown = [e for e in shown if e.strength != 0]
    if len(shown) > MAX_BLOCK_CURVES:
        places = np.linspace(0, len(shown) - 1, MAX_BLOCK_CURVES).round().astype(int)
        shown = [shown[place] for place in places]
    for index, e in enumerate(shown):
        colour, style = LINES[index % len(LINES)]
        values = [100 * value for value in e.blocks]
        label = f"strength {e.strength:g}"
        axes.plot(values, style, color=colour, linewidth=3, label=label)
    label_axes(axes, "block: image tokens after it", "change, %")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(x=0.02)
    if shown:
        show_legend_beside(axes)


def show_legend_beside(axes: Any) -> None:
    """Not on the axes: curves of blocks are often level, one above the other."""
    show_legend(axes, "center left")
    axes.get_legend().set_bbox_to_anchor((1.0, 0.5))
