"""A sweep as text: one line per image."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..messages import join_messages, message
from ..text import align, format_count
from .measures import INSIDE, OUTSIDE, WHOLE
from .verdict import show

if TYPE_CHECKING:
    from .image_metrics import Difference
    from .measures import CellMeasures, SweepMeasures
    from .verdict import SweepVerdict


def build_sweep_table(sweep: SweepMeasures, verdict: SweepVerdict) -> str:
    """Change from strength 0, inside and outside the mask, and distance to the source."""
    header = ["image", "RMS", "PSNR", "SSIM"]
    if sweep.has_mask:
        header += ["in RMS", "in SSIM", "out RMS", "out SSIM"]
    if sweep.has_source:
        header += ["source RMS", "source SSIM"]
    header.append("")
    rows = [build_row(measures, sweep, verdict) for measures in sweep.cells.values()]
    about = message(
        "{num_images}; change from strength 0, RMS of 255, PSNR in dB",
        num_images=format_count(len(rows), "image"),
    )
    return join_messages("\n", [about, *(line.rstrip() for line in align([header, *rows]))])


def build_row(measures: CellMeasures, sweep: SweepMeasures, verdict: SweepVerdict) -> list[str]:
    change = measures.change.get(WHOLE)
    row = [measures.label, *show_pair(change)]
    row.insert(2, "-" if change is None or change.psnr is None else f"{change.psnr:.1f}")
    if sweep.has_mask:
        row += show_pair(measures.change.get(INSIDE)) + show_pair(measures.change.get(OUTSIDE))
    if sweep.has_source:
        row += show_pair(measures.kept)
    return [*row, verdict.damages.get(measures.cell, "")]


def show_pair(difference: Difference | None) -> list[str]:
    """RMS and SSIM."""
    if difference is None:
        return ["-", "-"]
    return [show(difference.rms), f"{difference.ssim:.3f}"]
