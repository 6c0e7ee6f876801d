"""MODEL + adapter -> MODEL."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..lora_core import parse_block_ranges
from ..lora_core.adapter.strengths import Strengths
from . import host
from .patching.application import AUTO, MODES, apply_adapters
from .sockets import (
    CATEGORY,
    Report,
    adapter_input,
    report_output,
    show_report,
    strength_input,
    take_adapter,
)

MODE_TOOLTIP = (
    "side path: runs the LoRA alongside the weights, exact on fp8 bases, and a new strength costs "
    "nothing. merge: adds it to the weights as ComfyUI's LoraLoader does. auto: side path "
    "wherever possible; merged if a ModelSave or ModelMerge comes after this node, since these "
    "see only weights. The report says what was merged and why."
)


def mode_input() -> io.Combo.Input:
    return io.Combo.Input(
        "mode", options=list(MODES), default=AUTO, optional=True, tooltip=MODE_TOOLTIP
    )


class QwenEditLoraApply(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="QwenEditLoraApply",
            display_name="Apply Qwen Edit LoRA",
            category=CATEGORY,
            description=(
                "Applies an adapter to a Qwen-Image-Edit MODEL. By default it runs alongside the "
                "weights, so that fp8 rounding cannot drown it and changing the strength is free. "
                "Chain several, or use Stack."
            ),
            search_aliases=["lora", "apply lora", "lora strength", "block weights"],
            has_intermediate_output=True,
            hidden=[io.Hidden.dynprompt],
            inputs=[
                io.Model.Input("model", tooltip="The diffusion model, from UNETLoader."),
                adapter_input(),
                strength_input(
                    tooltip=(
                        "How strongly to apply it. 0 leaves the model bit-identical; negative "
                        "values push the other way."
                    )
                ),
                mode_input(),
                strength_input(
                    "image_strength",
                    optional=True,
                    advanced=True,
                    tooltip="Additional factor on the image stream (to_q, img_mlp, ...).",
                ),
                strength_input(
                    "text_strength",
                    optional=True,
                    advanced=True,
                    tooltip="Additional factor on the text stream (add_q_proj, txt_mlp, ...).",
                ),
                io.String.Input(
                    "blocks",
                    default="",
                    optional=True,
                    advanced=True,
                    placeholder="0-19, 40",
                    tooltip=(
                        "Only these of the model's blocks, for example '0-19, 40'. Empty: "
                        "everything, including layers outside the blocks."
                    ),
                ),
            ],
            outputs=[
                io.Model.Output("model", tooltip="The model with the adapter applied."),
                report_output(),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> Any:
        return host.find_queued_readers()

    @classmethod
    def execute(
        cls,
        model: Any,
        adapter: Any,
        strength: float,
        mode: str = AUTO,
        image_strength: float = 1.0,
        text_strength: float = 1.0,
        blocks: str = "",
    ) -> io.NodeOutput:
        strengths = Strengths(strength, image_strength, text_strength, parse_block_ranges(blocks))
        readers = host.find_weight_readers(cls.hidden.dynprompt)
        node = host.find_running_node(cls.hidden.dynprompt)
        applied = apply_adapters(model, [(take_adapter(adapter), strengths)], mode, readers, node)
        report = Report(applied.to_text(), applied.findings)
        ui = show_report(report, "QwenEditLoraApply")
        return io.NodeOutput(applied.model, report, ui=ui)


NODES = [QwenEditLoraApply]
