"""Two adapters -> how they relate to each other."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from ..lora_core import compare_adapters
from ..lora_core.disk.plain_json import write_json
from ..lora_core.inspection.advice import advise_comparison
from ..lora_core.inspection.plots import draw_comparison
from ..lora_core.inspection.tables import build_comparison_table
from ..lora_core.messages import join_messages
from . import host
from .sockets import (
    CATEGORY,
    Report,
    adapter_input,
    build_image,
    report_output,
    show_report,
    take_adapter,
)


class QwenEditLoraCompare(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="QwenEditLoraCompare",
            display_name="Compare Qwen Edit LoRAs",
            category=CATEGORY,
            description=(
                "Says whether two adapters pull in the same direction, how far apart two "
                "checkpoints of a run are, and what is lost when both are stacked. Ranks, kinds "
                "and targets may differ."
            ),
            search_aliases=["lora difference", "lora similarity", "cosine", "checkpoint drift"],
            is_output_node=True,
            inputs=[
                adapter_input(
                    "adapter_a", tooltip="The first adapter; of two checkpoints, the earlier one."
                ),
                adapter_input(
                    "adapter_b", tooltip="The second adapter; of two checkpoints, the later one."
                ),
            ],
            outputs=[
                report_output(),
                io.String.Output("json", tooltip="All statistics of every module."),
                io.Image.Output(
                    "heat_map", tooltip="The cosine by block (down) and module (across)."
                ),
            ],
        )

    @classmethod
    def execute(cls, adapter_a: Any, adapter_b: Any) -> io.NodeOutput:
        first, second = take_adapter(adapter_a), take_adapter(adapter_b)
        comparison = host.run_with_progress(compare_adapters, first, second)
        advice = advise_comparison(comparison)
        report = Report(join_messages("\n", [advice, comparison.to_text()]), comparison.findings)
        heat_map = build_image(draw_comparison(comparison))
        shown = {
            **show_report(report, num_shown=2),
            "images": ui.PreviewImage(heat_map, cls=cls).values,
        }
        return io.NodeOutput(
            Report(
                join_messages("\n\n", [report, build_comparison_table(comparison)]),
                comparison.findings,
            ),
            write_json({"advice": advice, **comparison.to_dict()}, indent=1),
            heat_map,
            ui=shown,
        )


NODES = [QwenEditLoraCompare]
