"""MODEL + any number of adapters -> MODEL, as one side path."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..lora_core import ConfigError
from ..lora_core.strengths import Strengths
from .application import apply_adapters
from .apply import mode_input
from .sockets import CATEGORY, adapter_input, report_output, show_report, take_adapter

MAX_ADAPTERS = 50


def parse_strengths(text: str, count: int) -> list[float]:
    """One number per adapter, or one for all.

    Raises:
        ConfigError: not numbers, or another count than there are adapters.
    """
    try:
        numbers = [float(item) for item in text.split(",")]
    except ValueError:
        raise ConfigError(
            f"strengths is {text!r}; expected one number per adapter, such as '1, 0.8', or a "
            "single one for all"
        ) from None
    if len(numbers) == 1:
        numbers *= count
    if len(numbers) != count:
        raise ConfigError(
            f"strengths holds {len(numbers)} numbers for {count} adapters; expected one for each, "
            "in the order of the inputs, or a single one for all"
        )
    return numbers


class QwenEditLoraStack(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="QwenEditLoraStack",
            display_name="Stack Edit LoRAs",
            category=CATEGORY,
            description=(
                "Applies any number of adapters at once. Plain LoRAs that meet on a module run as "
                "one down and one up product, so ten of them cost little more than one."
            ),
            search_aliases=["lora stack", "multi lora", "power lora"],
            has_intermediate_output=True,
            inputs=[
                io.Model.Input("model", tooltip="The diffusion model, from UNETLoader."),
                io.String.Input(
                    "strengths",
                    default="1",
                    tooltip=(
                        "One strength per adapter in the order of the inputs, such as '1, 0.8, "
                        "-0.5', or a single number for all. 0 switches one off."
                    ),
                ),
                mode_input(),
                io.Autogrow.Input(
                    "adapters",
                    template=io.Autogrow.TemplatePrefix(
                        adapter_input(), prefix="adapter_", min=1, max=MAX_ADAPTERS
                    ),
                    tooltip="Connect one and the next socket appears.",
                ),
            ],
            outputs=[
                io.Model.Output("model", tooltip="The model with all adapters applied."),
                report_output(),
            ],
        )

    @classmethod
    def execute(
        cls, model: Any, strengths: str, mode: str, adapters: dict[str, Any]
    ) -> io.NodeOutput:
        connected = [take_adapter(value) for value in adapters.values() if value is not None]
        numbers = parse_strengths(strengths, len(connected))
        layers = [(a, Strengths(number)) for a, number in zip(connected, numbers, strict=True)]
        applied = apply_adapters(model, layers, mode)
        text = applied.to_text()
        ui = show_report(text, warning=bool(applied.warnings))
        return io.NodeOutput(applied.model, text, ui=ui)


NODES = [QwenEditLoraStack]
