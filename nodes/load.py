"""File -> adapter."""

from __future__ import annotations

from typing import Any
from weakref import WeakValueDictionary

from comfy_api.latest import io

from ..lora_core import Adapter, LoraError, build_state_dict, read_adapter
from ..lora_core.disk.safetensors_file import read_signature
from . import host
from .sockets import (
    CATEGORY,
    AdapterSocket,
    Report,
    report_output,
    show_report,
    take_adapter,
)

# One adapter per file as long as it is referenced, so that two nodes with the same file share
# the memory of its side path.
_open: WeakValueDictionary[tuple, Adapter] = WeakValueDictionary()

# ComfyUI validates before anything runs: a connected input is None then, an unconnected one absent.
NOT_CONNECTED = object()


def open_lora(lora_name: str) -> Adapter:
    """The adapter in a file of the loras folders, read once while the file is unchanged on disk."""
    path = host.find_lora(lora_name)
    identity = (str(path), *read_signature(path))
    adapter = _open.get(identity)
    if adapter is None:
        adapter = _open[identity] = read_adapter(path)
    return adapter


class QwenEditLoraLoad(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="QwenEditLoraLoad",
            display_name="Load Qwen Edit LoRA",
            category=CATEGORY,
            description=(
                "Reads a LoRA, LoKr, LoHa, DoRA or OFT file for Qwen-Image or Qwen-Image-Edit in "
                "any known key format and says what it found. A file that matches nothing is an "
                "error, not a silent no-op."
            ),
            search_aliases=["lora", "qwen lora", "load lora", "lokr", "dora"],
            has_intermediate_output=True,
            inputs=[
                io.Combo.Input(
                    "lora_name",
                    options=host.list_loras(),
                    tooltip=(
                        "A .safetensors or .sft file from models/loras (press R to see new ones). "
                        "Any trainer's format; pickles (.pt, .ckpt) are refused."
                    ),
                ),
                io.LoraModel.Input(
                    "lora_model",
                    optional=True,
                    tooltip=(
                        "Instead of the file: a LORA_MODEL from ComfyUI's Train LoRA node, to "
                        "bring it into these nodes."
                    ),
                ),
            ],
            outputs=[
                AdapterSocket.Output(
                    "adapter", tooltip="For Apply, Stack, Save and the other Qwen Edit LoRA nodes."
                ),
                io.LoraModel.Output(
                    "lora_model",
                    tooltip="The same adapter with ComfyUI's own keys, for native LoRA nodes.",
                ),
                report_output(),
            ],
        )

    @classmethod
    def validate_inputs(
        cls, lora_name: str | None = None, lora_model: Any = NOT_CONNECTED
    ) -> bool | str:
        if lora_model is not NOT_CONNECTED:  # then the file is ignored
            return True
        try:
            host.find_lora(lora_name)
        except LoraError as e:
            return e.message
        return True

    @classmethod
    def fingerprint_inputs(cls, lora_name: str, lora_model: Any = NOT_CONNECTED) -> Any:
        if lora_model is not NOT_CONNECTED:
            return None
        return read_signature(host.find_lora(lora_name))

    @classmethod
    def execute(cls, lora_name: str, lora_model: Any = None) -> io.NodeOutput:
        adapter = open_lora(lora_name) if lora_model is None else take_adapter(lora_model)
        text = Report(adapter.report.to_text(), adapter.report.findings)
        ui = show_report(text, "QwenEditLoraLoad")
        return io.NodeOutput(adapter, build_state_dict(adapter), text, ui=ui)


NODES = [QwenEditLoraLoad]
