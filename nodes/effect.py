"""MODEL + adapter + one prompt -> how far each strength moves the model's output."""

from __future__ import annotations

import math
from typing import Any

from comfy_api.latest import io, ui

from ..lora_core.disk.plain_json import write_json
from ..lora_core.messages import join_messages, message
from ..lora_core.sweep.advice import advise_effect
from ..lora_core.sweep.cells import MAX_CELLS
from ..lora_core.sweep.effect import DEFAULT_POINTS, Effect, parse_sigmas
from ..lora_core.sweep.effect_plot import draw_effect
from ..lora_core.sweep.strength_grammar import parse_strengths
from .sockets import (
    CATEGORY,
    adapter_input,
    build_image,
    report_output,
    show_report,
    take_adapter,
)
from .sweeping.effect_measure import measure_effect
from .sweeping.strengths import resolve_strengths


class QwenEditLoraEffect(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="QwenEditLoraEffect",
            display_name="Measure Qwen Edit LoRA Effect",
            category=CATEGORY,
            description=(
                "Says in seconds how far a LoRA moves the model's output at each strength, and "
                "through which blocks: one model call per strength and noise level, no rendering."
            ),
            search_aliases=["lora effect", "lora strength", "does my lora do anything"],
            is_output_node=True,
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The MODEL without the LoRA; other LoRAs on it stay as they are.",
                ),
                adapter_input(),
                io.Conditioning.Input(
                    "positive", tooltip="What to do, with the reference images, as for KSampler."
                ),
                io.Latent.Input(
                    "latent_image",
                    tooltip="Noised to each sigma: the encoded source image, or an empty latent.",
                ),
                io.String.Input(
                    "strengths",
                    default="0:2:0.5",
                    placeholder="0:2:0.5",
                    tooltip=(
                        "A list '0, 0.5, 1, 2', ranges '0:2:0.25' (start:stop:step), both mixed, "
                        "or 'auto, 5 points' to choose them from the LoRA's size."
                    ),
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=io.ControlAfterGenerate.fixed,
                    tooltip="The noise, the same for every strength.",
                ),
                io.String.Input(
                    "sigmas",
                    default="0.8, 0.4",
                    optional=True,
                    advanced=True,
                    placeholder="0.8, 0.4",
                    tooltip=(
                        "Noise levels above 0 and up to 1 at which to call the model: high ones "
                        "set the composition, low ones draw details. One call each per strength."
                    ),
                ),
                io.Int.Input(
                    "points",
                    default=DEFAULT_POINTS,
                    min=2,
                    max=MAX_CELLS,
                    optional=True,
                    advanced=True,
                    tooltip="How many strengths to choose for a sweep, 0 included.",
                ),
            ],
            outputs=[
                report_output(),
                io.String.Output("json", tooltip="All values, per strength, sigma and block."),
                io.Image.Output(
                    "plot", tooltip="Change of the output over strength, and through the blocks."
                ),
                io.String.Output(
                    "strengths",
                    tooltip=(
                        "Strengths chosen from what was measured, for the strengths of Sweep Qwen "
                        "Edit LoRA: the change grows in equal steps from one to the next."
                    ),
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, strengths: str | None = None, sigmas: str | None = None) -> bool:
        # None: connected. Raised, since ComfyUI would repeat a returned message for every input.
        parse_strengths("0" if strengths is None else strengths)
        parse_sigmas("1" if sigmas is None else sigmas)
        return True

    @classmethod
    def execute(
        cls,
        model: Any,
        adapter: Any,
        positive: Any,
        latent_image: Any,
        strengths: str,
        seed: int,
        sigmas: str = "0.8, 0.4",
        points: int = DEFAULT_POINTS,
    ) -> io.NodeOutput:
        levels = parse_sigmas(sigmas)
        adapter = take_adapter(adapter)
        numbers, note = resolve_strengths(strengths, model, [adapter])
        effect = measure_effect(model, adapter, positive, latent_image, numbers, levels, seed)
        chosen = ", ".join(f"{strength:g}" for strength in effect.choose_strengths(points))
        advice = advise_effect(effect)
        sweep = message("\nfor a sweep: {chosen}", chosen=chosen)
        text = join_messages("\n", filter(None, [advice, effect.to_text(), note, sweep]))
        plot = build_image(draw_effect(effect))
        shown = {
            **show_report(text, warning=needs_attention(effect), num_shown=2),
            "images": ui.PreviewImage(plot, cls=cls).values,
        }
        return io.NodeOutput(
            text,
            write_json({"advice": advice, **effect.to_dict()}, indent=1),
            plot,
            chosen,
            ui=shown,
        )


def needs_attention(effect: Effect) -> bool:
    changes = [found.change for found in effect.strengths if found.strength != 0]
    return not all(map(math.isfinite, changes)) or not any(changes)


NODES = [QwenEditLoraEffect]
