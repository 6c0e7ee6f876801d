"""New adapters from old ones, and from the difference of two models."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..lora_core import (
    FAMILIES,
    Composition,
    ConfigError,
    LoraError,
    extract_adapter,
    merge_adapters,
    resize_adapter,
)
from ..lora_core.disk.safetensors_file import read_signature
from . import host
from .sockets import (
    CATEGORY,
    AdapterSocket,
    Report,
    adapter_input,
    report_output,
    show_report,
    take_adapter,
)
from .stack import MAX_ADAPTERS, parse_strengths

MAX_RANK = max(family.width for family in FAMILIES)


def adapter_output(tooltip: str) -> io.Output:
    return AdapterSocket.Output("adapter", tooltip=tooltip)


def build_output(composition: Composition) -> io.NodeOutput:
    report = Report(composition.to_text(), composition.adapter.report.findings)
    return io.NodeOutput(composition.adapter, report, ui=show_report(report))


class QwenEditLoraResize(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="QwenEditLoraResize",
            display_name="Resize Qwen Edit LoRA",
            category=CATEGORY,
            description=(
                "Lowers the rank of every module to the best approximation of its delta, and says "
                "how much of it is kept. LoHa and LoKr become LoRA."
            ),
            search_aliases=["shrink lora", "reduce rank", "lora svd"],
            has_intermediate_output=True,
            inputs=[
                adapter_input(),
                io.Int.Input(
                    "rank",
                    default=16,
                    min=0,
                    max=MAX_RANK,
                    tooltip="The highest rank of any module. 0: no limit, energy alone decides.",
                ),
                io.Float.Input(
                    "energy",
                    default=1.0,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    round=0.0001,
                    optional=True,
                    tooltip=(
                        "Share of each module's squared norm to keep, such as 0.99: the smallest "
                        "sufficient rank is used, up to the rank above. 1: the rank alone decides."
                    ),
                ),
            ],
            outputs=[
                adapter_output("The smaller adapter; Save Qwen Edit LoRA writes it."),
                report_output(),
            ],
        )

    @classmethod
    def execute(cls, adapter: Any, rank: int, energy: float = 1.0) -> io.NodeOutput:
        limits = {
            "rank": rank or None,
            "energy": None if rank and energy >= 1 else energy,
        }
        adapter = take_adapter(adapter)
        return build_output(host.run_with_progress(resize_adapter, adapter, **limits))


class QwenEditLoraMerge(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="QwenEditLoraMerge",
            display_name="Merge Qwen Edit LoRAs",
            category=CATEGORY,
            description=(
                "Adds adapters up into one, each at its strength. Without a rank the sum is exact "
                "and the ranks add up; with one it is the best approximation of that rank."
            ),
            search_aliases=["combine loras", "add loras", "lora merge"],
            has_intermediate_output=True,
            inputs=[
                io.String.Input(
                    "strengths",
                    default="1",
                    tooltip=(
                        "One strength for each adapter in the order of the inputs, such as "
                        "'1, 0.8, -0.5', or a single number for all."
                    ),
                ),
                io.Int.Input(
                    "rank",
                    default=0,
                    min=0,
                    max=MAX_RANK,
                    optional=True,
                    tooltip="The highest rank of any module of the sum. 0: the exact sum.",
                ),
                io.Autogrow.Input(
                    "adapters",
                    template=io.Autogrow.TemplatePrefix(
                        adapter_input(), prefix="adapter_", min=1, max=MAX_ADAPTERS
                    ),
                    tooltip="What to add up. Connect one and the next appears.",
                ),
            ],
            outputs=[
                adapter_output("The sum as one adapter; Save Qwen Edit LoRA writes it."),
                report_output(),
            ],
        )

    @classmethod
    def execute(
        cls, strengths: str, rank: int = 0, adapters: dict[str, Any] | None = None
    ) -> io.NodeOutput:
        connected = [
            take_adapter(value) for value in (adapters or {}).values() if value is not None
        ]
        if not connected:
            raise ConfigError("there is nothing to merge; connect at least one adapter")
        pairs = list(zip(connected, parse_strengths(strengths, len(connected)), strict=True))
        return build_output(host.run_with_progress(merge_adapters, pairs, rank=rank or None))


class QwenEditLoraExtract(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="QwenEditLoraExtract",
            display_name="Extract Qwen Edit LoRA",
            category=CATEGORY,
            description=(
                "Makes a LoRA from the difference between a fine-tuned model and its original. "
                "Both files are read layer by layer; neither is loaded as a whole."
            ),
            search_aliases=["extract lora", "model difference", "lora from checkpoint"],
            has_intermediate_output=True,
            inputs=[
                io.Combo.Input(
                    "base_name",
                    options=host.list_diffusion_models(),
                    tooltip="The original model, a .safetensors file in models/diffusion_models.",
                ),
                io.Combo.Input(
                    "tuned_name",
                    options=host.list_diffusion_models(),
                    tooltip="The fine-tuned model, best in bf16: fp8 rounding is a difference too.",
                ),
                io.Int.Input(
                    "rank",
                    default=32,
                    min=1,
                    max=MAX_RANK,
                    tooltip=(
                        "The rank of the LoRA. The report says how much of the change it captures."
                    ),
                ),
                io.Boolean.Input(
                    "biases",
                    default=True,
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "Also include biases and norms that differ, in full. ComfyUI's loader and "
                        "ours apply them; some other tools support only the low-rank part."
                    ),
                ),
                io.Combo.Input(
                    "device",
                    options=list(host.COMPUTE_DEVICES),
                    default="auto",
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "Where the differences are decomposed, one layer at a time. 'auto': "
                        "ComfyUI's device, usually the GPU; 'cpu' leaves the GPU alone."
                    ),
                ),
            ],
            outputs=[
                adapter_output("The difference as an adapter; Save Qwen Edit LoRA writes it."),
                report_output(),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, base_name: str, tuned_name: str, **_: Any) -> Any:
        try:
            names = (base_name, tuned_name)
            return [read_signature(host.find_diffusion_model(name)) for name in names]
        except LoraError:
            return None  # execute raises the error

    @classmethod
    def execute(
        cls,
        base_name: str,
        tuned_name: str,
        rank: int,
        biases: bool = True,
        device: str = "auto",
    ) -> io.NodeOutput:
        base, tuned = (host.find_diffusion_model(name) for name in (base_name, tuned_name))
        options = {"biases": biases, "device": host.choose_compute_device(device)}
        return build_output(host.run_with_progress(extract_adapter, base, tuned, rank, **options))


NODES = [QwenEditLoraResize, QwenEditLoraMerge, QwenEditLoraExtract]
