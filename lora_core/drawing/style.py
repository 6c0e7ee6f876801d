"""The look of all plots: dark backgrounds, colours for colour-blind eyes, legible letters.

Drawn at twice the width at which ComfyUI shows an image on a node, so every letter is at least 20
pixels high. matplotlib is imported when something is drawn, and its global state is left alone.
"""

from __future__ import annotations

import textwrap
from typing import Any

import numpy as np

SIZE_PX = (1024, 1024)
DPI = 100
SMALL, LARGE = 15.5, 18  # points: 22 and 25 pixels
BACKGROUND, PANEL, FOREGROUND, DIM = "#181a1f", "#22252b", "#e8e8e8", "#8a8f98"
# Okabe and Ito's colours, which colour-blind eyes can distinguish.
BLUE, ORANGE, VERMILION, YELLOW = "#56b4e9", "#e69f00", "#ff7f41", "#f0e442"
NOTE_CHARACTERS = 74
LAST_LETTER = 0x530  # Latin, Greek and Cyrillic; DejaVu Sans has no Chinese and no emoji


def build_figure(title: str) -> tuple[Any, Any]:
    """A figure of SIZE_PX with one set of axes."""
    figure, (axes,) = build_panels(title, 1)
    return figure, axes


def build_panels(title: str, count: int = 2, **layout: Any) -> tuple[Any, Any]:
    """A figure of SIZE_PX with `count` sets of axes below each other, and those.

    Args:
        layout: further arguments of matplotlib's `subplots`.
    """
    figure = build_canvas()
    figure.set_layout_engine("constrained", rect=(0.01, 0.01, 0.97, 0.98))
    panels = figure.subplots(count, squeeze=False, **layout)[:, 0]
    for axes in panels:
        axes.set_facecolor(PANEL)
    panels[0].set_title(title, color=FOREGROUND, fontsize=LARGE, pad=14)
    return figure, panels


def build_canvas() -> Any:
    from matplotlib.figure import Figure

    width, height = SIZE_PX
    return Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor=BACKGROUND)


def label_axes(axes: Any, x: str = "", y: str = "") -> None:
    axes.set_xlabel(x, color=FOREGROUND, fontsize=SMALL)
    axes.set_ylabel(y, color=FOREGROUND, fontsize=SMALL)


def add_note(figure: Any, text: str) -> None:
    """One or two lines below the axes."""
    lines = textwrap.wrap(text, NOTE_CHARACTERS)[:2]
    figure.text(0.02, 0.01, "\n".join(lines), color=DIM, fontsize=SMALL, ha="left", va="bottom")
    height = 0.045 if len(lines) < 2 else 0.075
    figure.get_layout_engine().set(rect=(0.01, height, 0.97, 0.99 - height))


def style_ticks(axes: Any) -> None:
    axes.tick_params(which="both", colors=FOREGROUND, labelsize=SMALL)
    for spine in axes.spines.values():
        spine.set_color(DIM)


def show_legend(axes: Any, place: str) -> None:
    axes.legend(
        loc=place,
        fontsize=SMALL,
        facecolor=BACKGROUND,
        edgecolor=DIM,
        labelcolor=FOREGROUND,
        framealpha=0.9,
    )


def draw_message(text: str) -> np.ndarray:
    """A placeholder image that says why there is no plot."""
    figure = build_canvas()
    figure.text(0.5, 0.5, text, color=FOREGROUND, fontsize=LARGE, ha="center", va="center")
    return render(figure)


def render(figure: Any) -> np.ndarray:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def shorten_name(name: str, limit: int = 32) -> str:
    """A name that fits, without what matplotlib's font lacks or reads as a formula."""
    name = name if len(name) <= limit else f"{name[: limit - 12]}...{name[-9:]}"
    return "".join(c if 32 <= ord(c) < LAST_LETTER else "\u25a1" for c in name).replace("$", r"\$")
