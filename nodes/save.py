"""Adapter -> file."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..lora_core import Adapter, write_adapter
from ..lora_core.findings import WARNING, Finding
from ..lora_core.formats.observations import report_family
from ..lora_core.formats.schemes import SCHEMES
from ..lora_core.messages import join_messages, message
from ..lora_core.text import format_bytes, format_count
from . import host
from .sockets import CATEGORY, Report, adapter_input, report_output, show_report, take_adapter


def find_warnings(adapter: Adapter, key_format: str) -> list[Finding]:
    """How ComfyUI's own LoraLoader (0.30) will read the file."""
    if key_format == "peft":
        text = message(
            "ComfyUI's own LoraLoader matches none of PEFT's keys and applies nothing; Load "
            "Qwen Edit LoRA reads them"
        )
        return [Finding("native_loads_nothing", WARNING, text, len(adapter))]
    found = []
    scaled = sum(weights.scale != 1 for weights in adapter.modules.values())
    if key_format == "diffusers" and scaled:
        text = message(
            "alpha is in the header, which ComfyUI's own LoraLoader does not read: it would "
            "apply scale 1; Load Qwen Edit LoRA reads it"
        )
        found.append(Finding("native_ignores_alpha", WARNING, text, scaled))
    if "DoRA" in adapter.kinds:
        text = message(
            "ComfyUI's own LoraLoader gives another result with a DoRA: it drops magnitudes "
            "in diffusers' keys, and normalises others by the base weight alone; Apply Qwen "
            "Edit LoRA follows PEFT and LyCORIS"
        )
        found.append(Finding("native_differs", WARNING, text))
    return found


class QwenEditLoraSave(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="QwenEditLoraSave",
            display_name="Save Qwen Edit LoRA",
            category=CATEGORY,
            description=(
                "Writes an adapter as safetensors in the format you choose: tensors unchanged, "
                "alpha explicit, metadata kept and completed. Files in output/loras appear in "
                "every LoRA loader."
            ),
            search_aliases=["export lora", "convert lora"],
            is_output_node=True,
            inputs=[
                adapter_input(),
                io.String.Input(
                    "filename_prefix",
                    default="loras/edit_lora",
                    optional=True,
                    tooltip=(
                        "Folder and name inside ComfyUI's output folder. A number is added, "
                        "nothing is overwritten."
                    ),
                ),
                io.Combo.Input(
                    "key_format",
                    options=list(SCHEMES),
                    default="comfyui",
                    optional=True,
                    tooltip=(
                        "comfyui: loads everywhere, and in diffusers. kohya: for musubi-tuner and "
                        "sd-scripts. diffusers, peft: plain LoRA and DoRA only; alpha is in the "
                        "header or adapter_config.json, which ComfyUI's own loader does not read."
                    ),
                ),
            ],
            outputs=[
                io.String.Output("lora_name", tooltip="The written file, below the output folder."),
                report_output(),
            ],
        )

    @classmethod
    def execute(
        cls, adapter: Any, filename_prefix: str = "loras/edit_lora", key_format: str = "comfyui"
    ) -> io.NodeOutput:
        adapter = take_adapter(adapter)
        target = host.choose_output_path(filename_prefix)
        if key_format != "peft":
            target = target.with_name(target.name + ".safetensors")
        written = write_adapter(adapter, target, key_format)
        name = host.name_below_output(written)
        lines = [
            message(
                "Wrote {name}: {num_modules}, {size}, format {key_format}",
                name=name,
                num_modules=format_count(len(adapter), "module"),
                size=format_bytes(written.stat().st_size),
                key_format=key_format,
            )
        ]
        warnings = find_warnings(adapter, key_format)
        licence = [
            finding
            for finding in report_family(adapter.base_family, len(adapter))
            if finding.kind == "licence"
        ]
        lines += [finding.text for finding in licence]
        lines += [message("Warning: {text}", text=finding.text) for finding in warnings]
        report = Report(join_messages("\n", lines), [*licence, *warnings])
        return io.NodeOutput(name, report, ui=show_report(report))


NODES = [QwenEditLoraSave]
