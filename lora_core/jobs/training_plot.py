"""The plot of a training: loss, and the size of the LoRA and its gradients."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

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
    YELLOW,
    add_note,
    draw_message,
    render,
    shorten_name,
    show_legend,
    style_ticks,
)
from ..inspection.verdict import GOOD_STD
from ..text import format_duration, format_number

#: Points drawn per curve: each is the mean of the steps around it.
MAX_POINTS = 1000
#: Raw losses above this quantile do not stretch the axis.
SHOWN_QUANTILE = 0.995


def draw_training(name: str, metrics: Sequence[Mapping[str, Any]], num_steps: int) -> np.ndarray:
    """Loss above, size of the deltas and gradient norm below.

    Args:
        metrics: lines of metrics.jsonl, in order; see `training.run.metrics.StepReport`.
        num_steps: of the whole run, the width of the plot.

    Returns:
        uint8 (height, width, 3).
    """
    if not metrics:
        return draw_message("No step yet. The loss appears here after the first one.")
    from matplotlib.figure import Figure

    width, height = SIZE_PX
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor=BACKGROUND)
    figure.set_layout_engine("constrained")
    above, below = figure.subplots(2, sharex=True, height_ratios=(3, 2))
    last = metrics[-1]
    title = f"{shorten_name(name)}: step {last['step']} of {num_steps}"
    above.set_title(title, color=FOREGROUND, fontsize=LARGE, pad=14)
    draw_loss(above, metrics)
    draw_sizes(below, metrics)
    below.set_xlim(0, max(num_steps, last["step"]))
    below.set_xlabel("step", color=FOREGROUND, fontsize=SMALL)
    for axes in (above, below):
        axes.set_facecolor(PANEL)
        style_ticks(axes)
    add_note(figure, describe(metrics))
    return render(figure)


def draw_loss(axes: Any, metrics: Sequence[Mapping[str, Any]]) -> None:
    steps, losses = average_groups(metrics, lambda line: line["loss"])
    axes.plot(steps, losses, color=BLUE, alpha=0.35, linewidth=1, label="loss")
    steps, smoothed = average_groups(metrics, lambda line: line["smoothed_loss"])
    axes.plot(steps, smoothed, color=ORANGE, linewidth=3, label="smoothed")
    axes.set_ylabel("loss", color=FOREGROUND, fontsize=SMALL)
    axes.set_ylim(0, 1.05 * max(np.quantile(losses, SHOWN_QUANTILE), *smoothed))
    saved = [line["step"] for line in metrics if line.get("adapters")]
    for step in saved:
        axes.axvline(step, color=DIM, linewidth=1)
    if saved:
        axes.plot([], [], color=DIM, linewidth=1, label="adapter saved")
    show_legend(axes, "upper right")


def draw_sizes(axes: Any, metrics: Sequence[Mapping[str, Any]]) -> None:
    """Logarithmic; the band is where known-good LoRAs end."""
    steps, norms = average_groups(metrics, lambda line: line["grad_norm"])
    axes.plot(steps, norms, color=YELLOW, linewidth=1, label="gradient norm")
    axes.set_yscale("log", nonpositive="mask")
    looked = [line for line in metrics if line.get("health")]
    if looked:
        stds = [line["health"]["std"] for line in looked]
        label = "std of the delta"
        axes.plot([line["step"] for line in looked], stds, color=BLUE, linewidth=3, label=label)
        axes.axhspan(*GOOD_STD, color=BLUE, alpha=0.15, label="known-good LoRAs")
    show_legend(axes, "center right")


def average_groups(metrics: Sequence[Mapping[str, Any]], get: Any) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values, means of equal groups where there are too many to draw."""
    values = np.array([get(line) for line in metrics], dtype=np.float64)
    steps = np.array([line["step"] for line in metrics], dtype=np.float64)
    num_groups = min(len(values), MAX_POINTS)
    groups = zip(np.array_split(steps, num_groups), np.array_split(values, num_groups), strict=True)
    means = [(step.mean(), value.mean()) for step, value in groups]
    return tuple(np.array(means).T)


def describe(metrics: Sequence[Mapping[str, Any]]) -> str:
    """The latest metrics in a sentence."""
    last = metrics[-1]
    parts = [
        f"loss {format_number(last['smoothed_loss'])} (smoothed), learning rate "
        f"{last['learning_rate']:.2g}, {format_duration(last['seconds'])} per step"
    ]
    stds = [line["health"]["std"] for line in metrics if line.get("health")]
    if stds and math.isfinite(stds[-1]):
        parts.append(f"std of the delta {stds[-1]:.1e}")
    return ", ".join(parts)
