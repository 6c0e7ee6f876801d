"""Plots of inspections and comparisons; `drawing.style` defines their look."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..base_model import module_paths
from ..base_model.families import BLOCK_LABELS, BLOCK_ORDER
from ..base_model.family import Family
from ..drawing.style import (
    BLUE,
    DIM,
    FOREGROUND,
    ORANGE,
    PANEL,
    SMALL,
    VERMILION,
    YELLOW,
    add_note,
    build_figure,
    draw_message,
    render,
    shorten_name,
    show_legend,
    style_ticks,
)
from ..errors import ConfigError
from ..text import format_count, format_percent
from .entries import THRESHOLD, TO_POWER_OF_TWO
from .statistics import get_statistic

if TYPE_CHECKING:
    from .compare import Comparison
    from .inspection import Inspection, ModuleInspection

NO_STATISTICS, DELTA_IS_ZERO, NON_FINITE = "no statistics", "delta is 0", "NaN or Inf"
#: Why a cell has no colour -> what is drawn there instead.
MARKS = {
    DELTA_IS_ZERO: ("cross", "x", ORANGE),
    NON_FINITE: ("plus", "P", VERMILION),
    NO_STATISTICS: ("dot", "o", DIM),
}
MAX_HISTOGRAM_ORDERS = 8  # orders of magnitude below the largest entry
SPECTRUM_FLOOR = 1e-6  # of the largest singular value; below it is rounding
NUM_EXTREMES = 2


def draw_heat_map(inspection: Inspection, statistic: str = "std") -> np.ndarray:
    """Blocks by modules, uint8 (height, width, 3).

    Raises:
        ConfigError: no such statistic.
    """
    chosen = get_statistic(statistic)
    if chosen.needs_exact and inspection.modules and not inspection.is_exact:
        return draw_message(f"{chosen.label}\n\nneeds exact: turn it on to examine every entry")
    zero = [path for path, module in inspection.modules.items() if module.frobenius == 0]
    values = {path: chosen.read(module) for path, module in inspection.modules.items()}
    return draw_map(
        {path: value for path, value in values.items() if value is not None and path not in zero},
        f"{shorten_name(inspection.name)}: {chosen.label}",
        inspection.base_family,
        is_logarithmic=chosen.is_logarithmic,
        marked={
            **dict.fromkeys(inspection.skipped, NO_STATISTICS),
            **dict.fromkeys(zero, DELTA_IS_ZERO),
            **dict.fromkeys(inspection.non_finite, NON_FINITE),
        },
    )


def draw_comparison(comparison: Comparison) -> np.ndarray:
    """The cosine between two adapters' deltas, blocks by modules."""
    cosines = {path: module.cosine for path, module in comparison.modules.items()}
    zero = [path for path, cosine in cosines.items() if cosine is None]
    return draw_map(
        {path: cosine for path, cosine in cosines.items() if cosine is not None},
        "cosine of a and b: 1 same, 0 independent, -1 opposed",
        comparison.base_family,
        limits=(-1.0, 1.0),
        marked={
            **dict.fromkeys(comparison.not_comparable, NO_STATISTICS),
            **dict.fromkeys(zero, DELTA_IS_ZERO),
        },
        absent="absent from one of them",
    )


def draw_map(
    values: Mapping[str, float],
    title: str,
    family: Family | None = None,
    *,
    is_logarithmic: bool = False,
    limits: tuple[float, float] | None = None,
    marked: Mapping[str, str] | None = None,
    absent: str = "absent",
) -> np.ndarray:
    """A map of one statistic per module, by block and module; absent modules are hatched.

    Args:
        values: module path -> value. Modules outside the blocks are counted below the map.
        family: whose blocks and modules are shown; None for those that have a value or a mark.
        limits: ends of the colour scale; a scale around zero gets diverging colours.
        marked: module path -> why it has no value: DELTA_IS_ZERO, NON_FINITE or NO_STATISTICS.
        absent: what the hatching means.
    """
    marked = marked or {}
    columns = list_columns([*values, *marked], family)
    grid = fill_grid(values, columns, family.num_blocks if family else 1)
    figure, axes = build_figure(title)
    axes.patch.set(facecolor=PANEL, edgecolor="#3c414a", hatch="////", linewidth=0)
    if np.isfinite(grid).any():
        shown = clip_to_positive(grid) if is_logarithmic else grid
        scale = choose_scale(shown, is_logarithmic, limits)
        image = axes.imshow(
            shown, aspect="auto", interpolation="nearest", cmap=choose_colours(limits), **scale
        )
        bar = figure.colorbar(image, ax=axes, fraction=0.06, pad=0.03)
        style_ticks(bar.ax)
        bar.outline.set_visible(False)
    notes = [f"hatched: {absent}", *draw_marks(axes, marked, columns)]
    num_rows, num_columns = grid.shape
    axes.set(xlim=(-0.5, num_columns - 0.5), ylim=(num_rows - 0.5, -0.5))
    axes.set_xticks(range(num_columns), [label_column(name) for name in columns])
    axes.tick_params(axis="x", labelrotation=60)
    for label in axes.get_xticklabels():
        label.set(ha="right", rotation_mode="anchor")
    axes.set_yticks(range(0, num_rows, 5))
    axes.set_ylabel("block", color=FOREGROUND, fontsize=SMALL)
    style_ticks(axes)
    outside = sum(module_paths.split_path(path)[0] is None for path in values)
    if outside:
        notes.append(f"not shown: {outside} outside the blocks")
    add_note(figure, "; ".join(notes))
    return render(figure)


def choose_colours(limits: tuple[float, float] | None) -> Any:
    """viridis; around zero orange and blue, with zero as dark as the rest of the plot."""
    from matplotlib.colors import LinearSegmentedColormap

    if limits and limits[0] < 0 < limits[1]:
        shades = ("#ffb83d", "#a8741a", "#3d3f47", "#3a7ca8", "#6cc4f7")
        return LinearSegmentedColormap.from_list("around zero", shades)
    return "viridis"


def list_columns(paths: Iterable[str], family: Family | None) -> list[str]:
    """Names inside a block: the family's, or those that occur."""
    if family is not None:
        return list(family.block_linears)
    names = {name for block, name in map(module_paths.split_path, paths) if block is not None}
    return sorted(names & BLOCK_ORDER.keys(), key=BLOCK_ORDER.__getitem__)


def fill_grid(values: Mapping[str, float], columns: Sequence[str], num_blocks: int) -> np.ndarray:
    """(blocks, modules); NaN where there is no value."""
    places = {path: find_place(path, columns) for path in values}
    rows = [place[0] for place in places.values() if place]
    grid = np.full((max([*rows, num_blocks - 1]) + 1, max(len(columns), 1)), np.nan)
    for path, place in places.items():
        if place:
            grid[place] = values[path]
    return grid


def find_place(module_path: str, columns: Sequence[str]) -> tuple[int, int] | None:
    block, name = module_paths.split_path(module_path)
    return None if block is None or name not in columns else (block, columns.index(name))


def label_column(name: str) -> str:
    return BLOCK_LABELS.get(name, name.removeprefix("attn."))


def clip_to_positive(grid: np.ndarray) -> np.ndarray:
    """Zeros take the colour of the smallest value above zero: a logarithm has none for them."""
    positive = grid[grid > 0]
    return np.maximum(grid, positive.min() if positive.size else 1.0)


def choose_scale(
    shown: np.ndarray, is_logarithmic: bool, limits: tuple[float, float] | None
) -> dict[str, Any]:
    from matplotlib.colors import LogNorm, Normalize

    low, high = limits or (float(np.nanmin(shown)), float(np.nanmax(shown)))
    if is_logarithmic:
        # At least a factor of two, so that rounding does not fill the whole scale.
        middle = math.sqrt(low) * math.sqrt(high)
        return {"norm": LogNorm(min(low, middle / 2**0.5), max(high, middle * 2**0.5))}
    margin = max(1e-3, 0.05 * abs(high)) if high - low < 1e-3 * abs(high) or high == low else 0
    return {"norm": Normalize(low - margin, high + margin)}


def draw_marks(axes: Any, marked: Mapping[str, str], columns: Sequence[str]) -> list[str]:
    """Marks on cells without a colour; returns what they mean."""
    notes = []
    for reason, (name, marker, colour) in MARKS.items():
        places = [find_place(path, columns) for path, why in marked.items() if why == reason]
        places = [place for place in places if place]
        if places:
            rows, columns = zip(*places, strict=True)
            axes.scatter(columns, rows, s=45, marker=marker, color=colour, linewidth=2, zorder=3)
            notes.append(f"{name}: {reason}")
    return notes


def draw_histogram(inspection: Inspection, module_path: str | None = None) -> np.ndarray:
    """How many entries of the delta have which magnitude, both logarithmic.

    Args:
        module_path: only this module; None means all of them together.

    Raises:
        ConfigError: the inspection has no such module.
    """
    modules = choose_modules(inspection, module_path)
    if not modules:
        return draw_message("no module with statistics")
    if any(module.histogram is None for module in modules.values()):
        return draw_message("histogram of the entries\n\nneeds exact: turn it on to see it")
    bins: dict[float, int] = {}
    for module in modules.values():
        for edge, number in module.histogram or ():
            bins[edge] = bins.get(edge, 0) + number
    largest = max(module.abs_max or 0.0 for module in modules.values())
    if largest == 0:
        return draw_message("histogram of the entries\n\nevery entry is exactly 0")
    figure, axes = build_figure(f"{shorten_name(module_path or inspection.name)}: entries by size")
    floor = largest * 10.0**-MAX_HISTOGRAM_ORDERS
    edges = np.array(sorted(edge for edge in bins if edge >= floor))
    widths = compute_bin_widths(edges)
    # Bins are a quarter octave wide, but not on a logarithmic axis: else they look like a saw.
    density = np.array([bins[edge] for edge in edges]) / np.log2(1 + widths / edges)
    axes.bar(edges, density, width=widths, align="edge", color=BLUE, linewidth=0)
    axes.set(xscale="log", yscale="log", xlim=(floor, largest * 3))
    axes.set_ylim(max(density.min() / 2, density.max() * 1e-9), density.max() * 30)
    total = sum(bins.values())
    draw_lines(axes, describe_entries(inspection, module_path, modules, largest))
    axes.set_xlabel("size of an entry of the delta", color=FOREGROUND, fontsize=SMALL)
    axes.set_ylabel("entries per doubling of size", color=FOREGROUND, fontsize=SMALL)
    below = sum(number for edge, number in bins.items() if edge < floor)
    note = f"{format_count(len(modules), 'module')}, {total:,} entries"
    note += f"; {format_percent(below / total)} left of the plot" if below else ""
    add_note(figure, note)
    style_ticks(axes)
    return render(figure)


def compute_bin_widths(edges: np.ndarray) -> np.ndarray:
    """The histogram's bins: four equal parts of each octave (see entries.py)."""
    _, exponents = np.frexp(edges * TO_POWER_OF_TWO)
    return np.ldexp(0.125, exponents) / TO_POWER_OF_TWO


def describe_entries(
    inspection: Inspection,
    module_path: str | None,
    modules: Mapping[str, ModuleInspection],
    largest: float,
) -> list[tuple[float, str, str, str]]:
    """(place, line style, colour, label) of each line in the histogram."""
    chosen = inspection if module_path is None else modules[module_path]
    below = format_percent(chosen.fraction_below_1e6 or 0.0)
    return [
        (THRESHOLD, ":", ORANGE, f"1e-6: {below} are below"),
        (chosen.std, "--", YELLOW, f"std {chosen.std:.2e}"),
        (largest, "-", FOREGROUND, f"largest {largest:.2e}"),
    ]


def draw_lines(axes: Any, lines: list[tuple[float, str, str, str]]) -> None:
    for place, style, colour, label in lines:
        axes.axvline(place, linestyle=style, color=colour, linewidth=3, label=label)
    show_legend(axes, "upper left")


def draw_spectrum(inspection: Inspection, module_path: str | None = None) -> np.ndarray:
    """Singular values over the largest: median and spread of all modules, and the extremes.

    Args:
        module_path: only this module; None means all of them.

    Raises:
        ConfigError: the inspection has no such module.
    """
    modules = choose_modules(inspection, module_path)
    modules = {path: module for path, module in modules.items() if module.spectral > 0}
    if not modules:
        return draw_message("spectrum\n\nno module with a delta other than 0")
    curves = {
        path: np.asarray(module.singular_values) / module.spectral
        for path, module in modules.items()
    }
    longest = max(map(len, curves.values()))
    table = np.full((len(curves), longest), np.nan)
    for row, curve in zip(table, curves.values(), strict=True):
        row[: len(curve)] = curve
    table = np.maximum(table, SPECTRUM_FLOOR / 10)
    figure, axes = build_figure(f"{shorten_name(module_path or inspection.name)}: spectrum")
    x = np.arange(1, longest + 1)
    if len(curves) > 1:
        low, middle, high = np.nanpercentile(table, (10, 50, 90), axis=0)
        axes.fill_between(x, low, high, color=BLUE, alpha=0.3, linewidth=0, label="10 to 90 %")
        axes.plot(
            x,
            middle,
            color=BLUE,
            linewidth=4,
            label=(f"median of {format_count(len(curves), 'module')}"),
        )
        ordered = sorted(modules, key=lambda path: compute_flatness(modules[path]))
        extremes = [(path, "steepest", VERMILION) for path in ordered[:NUM_EXTREMES]]
        rest = ordered[NUM_EXTREMES:]
        extremes += [(path, "flattest", YELLOW) for path in reversed(rest[-NUM_EXTREMES:])]
    else:
        extremes = [(path, "singular values", BLUE) for path in curves]
    for number, (path, word, colour) in enumerate(extremes):
        style = "-" if number % 2 == 0 else "--"
        label = f"{word}: {label_path(path)}"
        curve = np.maximum(curves[path], SPECTRUM_FLOOR / 10)
        axes.plot(x[: len(curve)], curve, style, color=colour, linewidth=2.5, label=label)
    lowest = max(SPECTRUM_FLOOR, float(np.nanmin(table)) / 2)
    axes.set(yscale="log", ylim=(min(lowest, 0.05), 1.3), xlim=(1, max(longest, 2)))
    if longest > 512:
        axes.set_xscale("log")
    axes.set_xlabel("index of the singular value", color=FOREGROUND, fontsize=SMALL)
    axes.set_ylabel("over the largest", color=FOREGROUND, fontsize=SMALL)
    ranks = np.array([module.effective_rank for module in modules.values()])
    ends = "" if len(ranks) == 1 else f" (from {ranks.min():.1f} to {ranks.max():.1f})"
    note = f"effective rank {np.median(ranks):.1f} of {longest}{ends}"
    add_note(figure, note)
    style_ticks(axes)
    show_legend(axes, "lower left")
    return render(figure)


def compute_flatness(module: ModuleInspection) -> float:
    return module.effective_rank / max(len(module.singular_values), 1)


def label_path(module_path: str) -> str:
    """`transformer_blocks.12.attn.to_out.0` -> "12 to_out"."""
    block, name = module_paths.split_path(module_path)
    return shorten_name(name) if block is None else f"{block} {label_column(name)}"


def choose_modules(
    inspection: Inspection, module_path: str | None
) -> Mapping[str, ModuleInspection]:
    if module_path is None:
        return inspection.modules
    if module_path not in inspection.modules:
        raise ConfigError(
            "{module_path!r} is not a module of {inspection} with statistics; expected a path "
            "such as 'transformer_blocks.0.attn.to_q', or nothing for all of them",
            module_path=module_path,
            inspection=inspection.name,
        )
    return {module_path: inspection.modules[module_path]}
