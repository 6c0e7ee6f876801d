"""MODEL + any number of adapters -> MODEL, as one side path."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..lora_core import Adapter, ConfigError, LoraError
from ..lora_core.adapter.strengths import Strengths
from ..lora_core.disk.safetensors_file import read_signature
from ..lora_core.findings import NOTE
from ..lora_core.messages import message
from ..lora_core.text import shorten
from . import host
from .apply import mode_input
from .load import open_lora
from .patching.application import AUTO, Application, apply_adapters
from .sockets import (
    CATEGORY,
    Report,
    adapter_input,
    report_output,
    show_report,
    strength_input,
    take_adapter,
)

MAX_FILES = 10
MAX_ADAPTERS = 50


def parse_strengths(text: str, count: int) -> list[float]:
    """One number per adapter, or one for all.

    Raises:
        ConfigError: not numbers, or not as many as there are adapters.
    """
    try:
        numbers = [float(item) for item in text.split(",")]
    except ValueError:
        raise ConfigError(
            "strengths is {text!r}; expected one number per adapter, such as '1, 0.8', or a "
            "single one for all",
            text=shorten(text),
        ) from None
    if len(numbers) == 1:
        numbers *= count
    if len(numbers) != count:
        raise ConfigError(
            "strengths holds {num_numbers} numbers for {count} adapters; expected one for each, "
            "in the order of the inputs, or a single one for all",
            num_numbers=len(numbers),
            count=count,
        )
    return numbers


#: A row without a file, as a new node starts: else it would apply whatever comes first in the list.
NO_FILE = "none"


def name_count(count: int) -> str:
    return "1 file" if count == 1 else f"{count} files"


COUNTS = {name_count(count): count for count in range(MAX_FILES + 1)}


def build_file_rows(count: int) -> list[io.Input]:
    """Widgets for `count` files: lora_1, strength_1, lora_2, ..."""
    rows: list[io.Input] = []
    for number in range(1, count + 1):
        rows += [
            io.Combo.Input(
                f"lora_{number}",
                options=[NO_FILE, *host.list_loras()],
                tooltip="A .safetensors or .sft file from models/loras; none leaves the row out.",
            ),
            strength_input(
                f"strength_{number}", tooltip="How strongly to apply it; 0 switches it off."
            ),
        ]
    return rows


def parse_row_numbers(text: str) -> set[int]:
    """The rows that are switched off; those beyond the last row are of a time with more rows.

    Raises:
        ConfigError: not numbers from 1.
    """
    items = [item.strip() for item in text.split(",") if item.strip()]
    if not all(len(item) < 4 and item.isdecimal() and int(item) for item in items):
        raise ConfigError(
            "switched_off is {text!r}; expected the numbers of rows, such as '2' or '1, 3', or "
            "nothing to use every row",
            text=shorten(text),
        )
    return set(map(int, items))


def read_file_rows(files: dict[str, Any] | None, switched_off: str = "") -> list[tuple[str, float]]:
    """(lora_name, strength) per row of the DynamicCombo's value that has a file and is on.

    Raises:
        ConfigError: it is not such a value, as in a graph written by hand.
    """
    files = files or {}
    off = parse_row_numbers(switched_off)
    try:
        count = COUNTS[files.get("files", name_count(0))]
        numbers = [n for n in range(1, count + 1) if n not in off]
        rows = [(files[f"lora_{n}"], files[f"strength_{n}"]) for n in numbers]
        return [(name, strength) for name, strength in rows if name != NO_FILE]
    except (KeyError, TypeError, AttributeError):
        raise ConfigError(
            "files is {files}; expected a number of files, such as '2 files', with lora_1, "
            "strength_1 and so on for each",
            files=shorten(repr(files)),
        ) from None


def report_file(applied: Application, adapter: Adapter) -> None:
    """Adds the findings from reading the file, as Load Qwen Edit LoRA would report them."""
    for finding in adapter.report.findings:
        add = applied.note if finding.severity == NOTE else applied.warn
        add(
            finding.kind,
            message("{adapter}: {text}", adapter=adapter.name, text=finding.text),
            finding.count,
        )


class QwenEditLoraStack(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        options = [
            # Not bare numbers: JavaScript would sort them and lose the default.
            io.DynamicCombo.Option(name, build_file_rows(count))
            for name, count in COUNTS.items()
        ]
        return io.Schema(
            node_id="QwenEditLoraStack",
            display_name="Stack Qwen Edit LoRAs",
            category=CATEGORY,
            description=(
                "Applies any number of LoRA files and adapters at once. Plain LoRAs on the same "
                "module run as one down and one up product, so ten of them cost little more than "
                "one."
            ),
            search_aliases=["lora stack", "multi lora", "power lora"],
            has_intermediate_output=True,
            hidden=[io.Hidden.dynprompt],
            inputs=[
                io.Model.Input("model", tooltip="The diffusion model, from UNETLoader."),
                mode_input(),
                io.DynamicCombo.Input(
                    "files",
                    options=[options[2], *options[:2], *options[3:]],  # the first is the default
                    optional=True,
                    tooltip="How many files to choose here; each gets its own strength.",
                ),
                io.String.Input(
                    "strengths",
                    display_name="adapter strengths",
                    default="1",
                    optional=True,
                    tooltip=(
                        "For the adapters connected below: one strength each in the order of the "
                        "inputs, such as '1, 0.8, -0.5', or a single number for all."
                    ),
                ),
                io.Autogrow.Input(
                    "adapters",
                    template=io.Autogrow.TemplatePrefix(
                        adapter_input(), prefix="adapter_", min=0, max=MAX_ADAPTERS
                    ),
                    tooltip="Adapters made by other nodes. Connect one and the next appears.",
                ),
                # Last, so that the values of older workflows keep their places. On the page
                # web/stack_switches.js shows a switch in each row instead.
                io.String.Input(
                    "switched_off",
                    display_name="rows switched off",
                    default="",
                    optional=True,
                    socketless=True,
                    placeholder="2, 3",
                    tooltip=(
                        "Numbers of the rows that are off, such as '2' or '1, 3': their files are "
                        "not read. The switches in the rows write it."
                    ),
                ),
            ],
            outputs=[
                io.Model.Output("model", tooltip="The model with all of them applied."),
                report_output(),
            ],
        )

    @classmethod
    def fingerprint_inputs(
        cls, files: dict[str, Any] | None = None, switched_off: str = "", **_: Any
    ) -> Any:
        try:
            names = [name for name, _ in read_file_rows(files, switched_off)]
            signatures = [read_signature(host.find_lora(name)) for name in names]
            return [*signatures, host.find_queued_readers()]
        except LoraError:
            return None  # execute raises the error

    @classmethod
    def execute(
        cls,
        model: Any,
        mode: str = AUTO,
        strengths: str = "1",
        files: dict[str, Any] | None = None,
        adapters: dict[str, Any] | None = None,
        switched_off: str = "",
    ) -> io.NodeOutput:
        rows = read_file_rows(files, switched_off)
        layers: list[tuple[Adapter, Strengths]] = [
            (open_lora(name), Strengths(strength)) for name, strength in rows
        ]
        connected = [
            take_adapter(value) for value in (adapters or {}).values() if value is not None
        ]
        numbers = parse_strengths(strengths, len(connected)) if connected else []
        layers += [(a, Strengths(number)) for a, number in zip(connected, numbers, strict=True)]
        if not layers:
            raise ConfigError(
                "the stack is empty; choose a file in a row that is on, or connect an adapter"
            )
        readers = host.find_weight_readers(cls.hidden.dynprompt)
        node = host.find_running_node(cls.hidden.dynprompt)
        applied = apply_adapters(model, layers, mode, readers, node)
        # No Load node read these files, so nothing else reports on them.
        opened = {id(adapter): adapter for adapter, _ in layers[: len(rows)]}
        for adapter in opened.values():
            report_file(applied, adapter)
        report = Report(applied.to_text(), applied.findings)
        return io.NodeOutput(applied.model, report, ui=show_report(report))


NODES = [QwenEditLoraStack]
