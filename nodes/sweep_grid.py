"""The images of a sweep -> contact sheet, differences, curve, metrics and a verdict."""

from __future__ import annotations

import torch
from comfy_api.latest import io, ui

from ..lora_core import ConfigError, FileError
from ..lora_core.disk.plain_json import write_json
from ..lora_core.errors import get_reason
from ..lora_core.messages import join_messages
from ..lora_core.sweep.advice import advise_sweep
from ..lora_core.sweep.cells import MAX_CELLS
from ..lora_core.sweep.measures import measure_sweep
from ..lora_core.sweep.plots import draw_contact_sheet, draw_curve, draw_differences
from ..lora_core.sweep.table import build_sweep_table
from ..lora_core.sweep.verdict import SweepVerdict, judge_sweep
from . import host
from .sockets import CATEGORY, Report, build_image, report_output, show_report

DEFAULT_PREFIX = "qwen_edit_lora/sweep"
DEFAULT_THUMBNAIL_PX = 256


class QwenEditLoraSweepGrid(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="QwenEditLoraSweepGrid",
            display_name="Sweep Grid (Qwen Edit LoRA)",
            category=CATEGORY,
            description=(
                "Lays out the images of a sweep as a labelled contact sheet, measures how far "
                "each is from strength 0, and says whether the LoRA has no effect, acts smoothly, "
                "or collapses, and which strengths to use. Saves the sheet with the workflow in "
                "it."
            ),
            search_aliases=["xy plot", "contact sheet", "ssim", "psnr", "compare images"],
            is_output_node=True,
            is_input_list=True,
            inputs=[
                io.Image.Input(
                    "images",
                    tooltip=(
                        "The images of Sweep Qwen Edit LoRA, or a batch with one image per label."
                    ),
                ),
                io.String.Input(
                    "labels",
                    default="",
                    placeholder="0, 0.5, 1",
                    tooltip=(
                        "The labels of Sweep Qwen Edit LoRA. For images of your own, their "
                        "strengths, 0 among them: '0, 0.5, 1', or one per line."
                    ),
                ),
                io.String.Input(
                    "filename_prefix",
                    default=DEFAULT_PREFIX,
                    tooltip="Where the sheet is saved, below ComfyUI's output folder.",
                ),
                io.Image.Input(
                    "source",
                    optional=True,
                    tooltip=(
                        "The image that was edited: also measures how well each cell keeps it. "
                        "Any size; it is centre-cropped and resized to the cells."
                    ),
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip=(
                        "Where the edit should be: also measures inside and outside it, and the "
                        "source only outside."
                    ),
                ),
                io.Int.Input(
                    "thumbnail_px",
                    default=DEFAULT_THUMBNAIL_PX,
                    min=64,
                    max=768,
                    step=32,
                    optional=True,
                    advanced=True,
                    tooltip="Longer side of each image on the sheet, in pixels.",
                ),
            ],
            outputs=[
                report_output(),
                io.Image.Output(
                    "contact_sheet", tooltip="The cells: strengths across, adapters and seeds down."
                ),
                io.Image.Output(
                    "differences", tooltip="Each cell's distance from strength 0, amplified."
                ),
                io.Image.Output("curve", tooltip="Change and structure over the strength."),
                io.String.Output("table", tooltip="The metrics of each cell, one cell per line."),
                io.String.Output("json", tooltip="All metrics of every cell, and the verdict."),
            ],
        )

    @classmethod
    def execute(
        cls,
        images: list[torch.Tensor],
        labels: list[str],
        filename_prefix: list[str],
        source: list[torch.Tensor] | None = None,
        mask: list[torch.Tensor] | None = None,
        thumbnail_px: list[int] | None = None,
    ) -> io.NodeOutput:
        prefix = filename_prefix[0]
        host.choose_output_path(prefix)  # a bad name fails before the work, not after it
        sweep = host.run_with_progress(
            measure_sweep,
            images,
            split_labels(labels),
            source[0] if source else None,
            mask[0] if mask else None,
            (thumbnail_px or [DEFAULT_THUMBNAIL_PX])[0],
        )
        verdict = judge_sweep(sweep)
        advice = advise_sweep(verdict)
        report = Report(join_messages("\n", [advice, verdict.to_text()]), verdict.findings)
        table = build_sweep_table(sweep, verdict)
        sheet = build_image(draw_contact_sheet(sweep, verdict))
        figures = {
            "advice": advice,
            **verdict.to_dict(),
            "size": sweep.size,
            "cells": [
                {**measures.to_dict(), "damage": verdict.damages.get(cell, "")}
                for cell, measures in sweep.cells.items()
            ],
        }
        return io.NodeOutput(
            Report(join_messages("\n\n", [report, table]), verdict.findings),
            sheet,
            build_image(draw_differences(sweep, verdict)),
            build_image(draw_curve(verdict)),
            table,
            write_json(figures, indent=1),
            ui={**show_report(report, num_shown=count_shown(verdict)), **cls.save(sheet, prefix)},
        )

    @classmethod
    def save(cls, sheet: torch.Tensor, prefix: str) -> dict[str, list]:
        """Saves as SaveImage does, with the graph in the file unless --disable-metadata."""
        try:
            return ui.ImageSaveHelper.get_save_images_ui(sheet, prefix, cls=cls).as_dict()
        except OSError as e:
            raise FileError(
                "the contact sheet cannot be saved: {reason}.", reason=get_reason(e)
            ) from None


def count_shown(verdict: SweepVerdict) -> int:
    """The advice, and of a single adapter its verdict; of several the figures hold them all."""
    return 2 if len(verdict.adapters) == 1 else 1


def split_labels(labels: list[str]) -> list[str]:
    """One label per cell; a single text has one per line, or numbers separated by commas."""
    if len(labels) == 1:
        # Labels of a sweep keep their commas: file names may contain them.
        text = labels[0] if "strength=" in labels[0] else labels[0].replace(",", "\n")
        labels = [line.strip() for line in text.splitlines() if line.strip()]
    if not labels:
        raise ConfigError(
            "labels is empty; connect the labels of Sweep Qwen Edit LoRA, or write the "
            "strengths, such as '0, 0.5, 1', for up to {max_cells} images",
            max_cells=MAX_CELLS,
        )
    return labels


NODES = [QwenEditLoraSweepGrid]
