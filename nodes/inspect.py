"""Adapter -> what its deltas look like, as text, JSON and images."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from comfy_api.latest import io, ui

from ..lora_core import ConfigError, LoraError
from ..lora_core.disk.plain_json import write_json
from ..lora_core.disk.safetensors_file import read_signature
from ..lora_core.inspection.advice import advise_inspection
from ..lora_core.inspection.plots import draw_heat_map, draw_histogram, draw_spectrum
from ..lora_core.inspection.statistics import SORT_KEYS, STATISTICS
from ..lora_core.inspection.tables import build_table, describe_verdict, find_skipped
from ..lora_core.messages import join_messages
from . import host
from .inspections import get_inspection
from .sockets import (
    CATEGORY,
    Report,
    adapter_input,
    build_image,
    report_output,
    show_report,
    take_adapter,
)

NO_BASE = "none"


class QwenEditLoraInspect(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="QwenEditLoraInspect",
            display_name="Inspect Qwen Edit LoRA",
            category=CATEGORY,
            description=(
                "Measures what an adapter adds to every module: size, spectrum, effective rank, "
                "dead parts. Says in plain words whether that is normal, and given a base model, "
                "whether it would survive being merged."
            ),
            search_aliases=["lora analysis", "lora statistics", "heat map", "svd", "rank"],
            is_output_node=True,
            inputs=[
                adapter_input(),
                io.Combo.Input(
                    "statistic",
                    options=list(STATISTICS),
                    default="std",
                    optional=True,
                    tooltip=(
                        "What the heat map shows. 'abs max' and 'fraction below 1e-6' need exact."
                    ),
                ),
                io.Boolean.Input(
                    "exact",
                    default=False,
                    optional=True,
                    tooltip=(
                        "Also examine every entry: the largest one, the share below 1e-6, the "
                        "histogram. Takes longer; the result is kept for the next time."
                    ),
                ),
                io.Combo.Input(
                    "sort_by",
                    options=list(SORT_KEYS),
                    default="std",
                    optional=True,
                    advanced=True,
                    tooltip="Order of the table, the worst first; 'block' is the model's order.",
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip=(
                        "Also compare with this loaded model's weights, as stored: LoRAs applied "
                        "to it before are not part of them. Use either this or base_model."
                    ),
                ),
                # Last, because saved workflows store widget values by position.
                io.Combo.Input(
                    "base_model",
                    options=[NO_BASE, *host.list_diffusion_models()],
                    default=NO_BASE,
                    optional=True,
                    tooltip=(
                        "Also compare with this model's weights, read from its file one module at "
                        "a time: size relative to them, and how much would survive a merge."
                    ),
                ),
            ],
            outputs=[
                report_output(),
                io.String.Output("json", tooltip="All statistics of every module."),
                io.Image.Output(
                    "heat_map", tooltip="The statistic by block (down) and module (across)."
                ),
                io.Image.Output("histogram", tooltip="Entries by size; needs exact."),
                io.Image.Output("spectrum", tooltip="Singular values relative to the largest."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, base_model: str = NO_BASE, **_: Any) -> Any:
        try:
            return (
                None
                if base_model == NO_BASE
                else read_signature(host.find_diffusion_model(base_model))
            )
        except LoraError:
            return None  # execute raises the error

    @classmethod
    def execute(
        cls,
        adapter: Any,
        statistic: str = "std",
        base_model: str = NO_BASE,
        exact: bool = False,
        sort_by: str = "std",
        model: Any = None,
    ) -> io.NodeOutput:
        if model is not None and base_model != NO_BASE:
            raise ConfigError(
                "both a model and base_model ({base_model}) are given, and only one can be the "
                "base; disconnect the model, or set base_model to {no_base!r}",
                base_model=base_model,
                no_base=NO_BASE,
            )
        base = model
        if base_model != NO_BASE:
            base = host.find_diffusion_model(base_model)
        inspection = get_inspection(take_adapter(adapter), exact, base)
        findings = [*inspection.findings, *find_skipped(inspection)]
        advice = advise_inspection(inspection)
        verdict = Report(join_messages("\n", [advice, describe_verdict(inspection)]), findings)
        table = build_table(inspection, sort_by)
        heat_map = build_image(draw_heat_map(inspection, statistic))
        shown = {
            **show_report(verdict, num_shown=2),
            "images": ui.PreviewImage(heat_map, cls=cls).values,
        }
        return io.NodeOutput(
            Report(join_messages("\n\n", [verdict, table]), findings),
            write_json(
                {
                    "advice": advice,
                    **inspection.to_dict(),
                    "findings": [asdict(one) for one in findings],
                },
                indent=1,
            ),
            heat_map,
            build_image(draw_histogram(inspection)),
            build_image(draw_spectrum(inspection)),
            ui=shown,
        )


NODES = [QwenEditLoraInspect]
