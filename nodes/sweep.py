"""MODEL + adapters + strengths -> one image per strength, seed and adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import chain
from typing import Any

from comfy_api.latest import io

from ..lora_core import Adapter, ConfigError, LoraError
from ..lora_core.disk.safetensors_file import read_signature
from ..lora_core.findings import ERROR, NOTE, WARNING
from ..lora_core.messages import join_messages, message
from ..lora_core.sweep.cells import Cell, build_cells, build_label, name_adapters
from ..lora_core.sweep.lora_patterns import find_loras
from ..lora_core.sweep.strength_grammar import parse_seeds, parse_strengths
from ..lora_core.text import format_count, shorten_list
from . import host
from .load import open_lora
from .patching.application import AUTO, MERGE
from .sockets import (
    CATEGORY,
    Report,
    adapter_input,
    get_findings,
    report_output,
    show_report,
    take_adapter,
)
from .stack import MAX_ADAPTERS
from .sweeping.graph import Sampling, SweepGraph
from .sweeping.strengths import resolve_strengths

SETTINGS = ("steps", "cfg", "sampler_name", "scheduler", "denoise")
SAMPLING_LINKS = ("positive", "negative", "latent_image", "vae", "sampler", "sigmas")
TITLES = {ERROR: message("Warning"), WARNING: message("Warning"), NOTE: message("Note")}
IMAGES, LATENTS = 0, 1  # output positions

NO_IMAGES = message(
    "this sweep makes no images: connect positive, negative, latent_image and vae to Sweep "
    "Qwen Edit LoRA, or sample its models yourself"
)
NO_LATENTS = message(
    "this sweep makes no latents: connect positive, negative and latent_image to Sweep Qwen "
    "Edit LoRA, or sample its models yourself"
)


class QwenEditLoraSweep(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="QwenEditLoraSweep",
            display_name="Sweep Qwen Edit LoRA",
            category=CATEGORY,
            description=(
                "Renders the same prompt and seed at several strengths of a LoRA, 0 included. "
                "Every image is cached by itself, so adding a strength renders only that one."
            ),
            search_aliases=["lora sweep", "xy plot", "strength test", "compare checkpoints"],
            is_input_list=True,
            enable_expand=True,
            has_intermediate_output=True,
            hidden=[io.Hidden.dynprompt, io.Hidden.unique_id],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The MODEL without the swept LoRA; other LoRAs on it stay as they are.",
                ),
                adapter_input(optional=True),
                io.String.Input(
                    "strengths",
                    default="0, 0.5, 1, 2",
                    placeholder="0, 0.5, 1, 2",
                    tooltip=(
                        "A list '0, 0.5, 1, 2', ranges '0:2:0.25' (start:stop:step), both mixed, "
                        "or 'auto, 5 points' to choose them from the LoRA's size. 0 is always "
                        "added. At most 64 images in all."
                    ),
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=io.ControlAfterGenerate.fixed,
                    tooltip="The noise, the same for every strength. Keep it fixed to reuse cells.",
                ),
                io.Int.Input("steps", default=20, min=1, max=10000, tooltip="Sampling steps."),
                io.Float.Input(
                    "cfg",
                    default=4.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="Guidance. 1 for Lightning LoRAs, about 4 without.",
                ),
                io.Combo.Input(
                    "sampler_name",
                    options=host.list_samplers(),
                    default="euler",
                    tooltip="As on KSampler.",
                ),
                io.Combo.Input(
                    "scheduler",
                    options=host.list_schedulers(),
                    default="simple",
                    tooltip="As on KSampler.",
                ),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="As on KSampler: 1 starts from pure noise.",
                ),
                io.Conditioning.Input(
                    "positive",
                    optional=True,
                    tooltip="What to do, with the reference images; encoded once for all cells.",
                ),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="The negative prompt. KSampler needs one even if cfg is 1.",
                ),
                io.Latent.Input(
                    "latent_image",
                    optional=True,
                    tooltip="What is denoised: the encoded source image, or an empty latent.",
                ),
                io.Vae.Input(
                    "vae", optional=True, tooltip="Decodes the images; without it only latents."
                ),
                io.String.Input(
                    "seeds",
                    default="",
                    optional=True,
                    placeholder="1, 2, 3",
                    tooltip=(
                        "Several seeds instead of the one above: '1, 2, 3' or '1:4:1'. Every "
                        "strength is rendered with each."
                    ),
                ),
                io.String.Input(
                    "loras",
                    default="",
                    optional=True,
                    multiline=True,
                    placeholder="my_run/*",
                    tooltip=(
                        "More files of the loras folders to sweep: one name or pattern per line, "
                        "such as 'my_run/*' for all checkpoints of a run, in the order of their "
                        "steps."
                    ),
                ),
                io.Sampler.Input(
                    "sampler",
                    optional=True,
                    tooltip=(
                        "With sigmas: samples through SamplerCustomAdvanced, and steps, "
                        "sampler_name, scheduler and denoise are not used."
                    ),
                ),
                io.Sigmas.Input(
                    "sigmas", optional=True, tooltip="The noise levels for the sampler above."
                ),
                io.Autogrow.Input(
                    "adapters",
                    template=io.Autogrow.TemplatePrefix(
                        adapter_input(), prefix="adapter_", min=0, max=MAX_ADAPTERS
                    ),
                    optional=True,  # otherwise it is placed before adapter
                    tooltip="Further adapters; each is swept over the same strengths.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    "images", is_output_list=True, tooltip="One image per cell; needs vae."
                ),
                io.Latent.Output("latents", is_output_list=True, tooltip="One latent per cell."),
                io.String.Output(
                    "labels",
                    is_output_list=True,
                    tooltip="What each cell is, such as 'strength=0.5 seed=7'.",
                ),
                io.Float.Output("strengths", is_output_list=True, tooltip="Each cell's strength."),
                io.Model.Output(
                    "models",
                    is_output_list=True,
                    tooltip="Each cell's MODEL, for a sampler graph of your own.",
                ),
                io.Int.Output("seeds", is_output_list=True, tooltip="Each cell's seed."),
                report_output(),
            ],
        )

    @classmethod
    def validate_inputs(
        cls, strengths: Any, seeds: Any = None, loras: Any = None, adapters: Any = None
    ) -> bool:
        # None: connected. Raised, since ComfyUI would repeat a returned message for every input.
        # adapters is not checked, but is always passed.
        parse_strengths("0" if strengths[0] is None else strengths[0])
        parse_seeds((seeds or [None])[0] or "", 0)
        find_loras((loras or [None])[0] or "", host.list_loras())
        return True

    @classmethod
    def fingerprint_inputs(cls, loras: Any = None, **_: Any) -> Any:
        try:
            names = find_loras((loras or [""])[0] or "", host.list_loras())
            signatures = [(name, *read_signature(host.find_lora(name))) for name in names]
            return [*signatures, host.find_queued_readers()]
        except LoraError:
            return None  # execute raises the error

    @classmethod
    def execute(
        cls, model: list, strengths: list, adapters: dict | None = None, **inputs: list
    ) -> io.NodeOutput:
        given = {
            name: take_one(name, values)
            for name, values in {"model": model, "strengths": strengths, **inputs}.items()
        }
        sockets = {"adapter": given.get("adapter")} | {
            f"adapters.{name}": take_one(name, values) for name, values in (adapters or {}).items()
        }
        connected = {name: take_adapter(v) for name, v in sockets.items() if v is not None}
        dynprompt, node_id = cls.hidden.dynprompt, cls.hidden.unique_id
        links = host.get_links(dynprompt, node_id)
        sources = find_sources(connected, links, given.get("loras") or "")
        files = (source for source in sources.values() if isinstance(source, str))
        # Files are opened only where "auto" has to measure them.
        every = chain(connected.values(), map(open_lora, files))
        numbers, note = resolve_strengths(given["strengths"], given["model"], every)
        seeds = parse_seeds(given.get("seeds") or "", given["seed"])
        cells = build_cells(numbers, seeds, list(sources))
        sampling = choose_sampling(links, given)
        check_outputs(host.find_wired_outputs(dynprompt, node_id), sampling)
        # The nodes that a sweep expands into are behind it in no graph.
        mode = MERGE if host.find_weight_readers(dynprompt) else AUTO
        graph = SweepGraph(links["model"], sources, mode)
        chains = [graph.add_cell(cell, sampling) for cell in cells]
        text = describe(cells, numbers, seeds, list(sources), note)
        collected = graph.collect(cells, chains, text)
        return io.NodeOutput(
            collected.out(0) if chains[0].image else host.block_output(NO_IMAGES),
            collected.out(1) if chains[0].latent else host.block_output(NO_LATENTS),
            [build_label(cell) for cell in cells],
            [cell.strength for cell in cells],
            collected.out(2),
            [cell.seed for cell in cells],
            collected.out(3),
            ui=show_report(text),
            expand=graph.graph.finalize(),
        )


def take_one(name: str, values: Any) -> Any:
    """The only value of an input, which ComfyUI passes as a list; longer lists are refused."""
    if not isinstance(values, list):
        return values
    if len(values) != 1:
        raise ConfigError(
            "{name} got a list of {num_values} values; expected a single one, as the sweep "
            "makes the list itself",
            name=name,
            num_values=len(values),
        )
    return values[0]


def find_sources(
    connected: Mapping[str, Adapter], links: Mapping[str, host.Link], patterns: str
) -> dict[str, host.Link | str]:
    """Name of each adapter -> its link, or the file it is in."""
    files = find_loras(patterns, host.list_loras())
    names = name_adapters([*(adapter.name for adapter in connected.values()), *files])
    if not names:
        raise ConfigError(
            "there is nothing to sweep; connect an adapter, or name files in loras, such as "
            "'my_run/*'"
        )
    return dict(zip(names, [*(links[name] for name in connected), *files], strict=True))


def choose_sampling(links: Mapping[str, host.Link], given: Mapping[str, Any]) -> Sampling | None:
    """Chosen by what is connected; None if nothing is.

    Raises:
        ConfigError: only part of what sampling needs is connected.
    """
    found = {name: links[name] for name in SAMPLING_LINKS if name in links}
    if not found:
        return None
    is_custom = "sampler" in found or "sigmas" in found
    needed = ("positive", "latent_image", *(("sampler", "sigmas") if is_custom else ("negative",)))
    missing = [name for name in needed if name not in found]
    if missing:
        raise ConfigError(
            "to sample, Sweep Qwen Edit LoRA needs {needed}, and {missing} is not connected; "
            "connect it, or disconnect all of them to use the models alone",
            needed=", ".join(needed),
            missing=", ".join(missing),
        )
    return Sampling(found, {name: given[name] for name in SETTINGS})


def check_outputs(wired: set[int], sampling: Sampling | None) -> None:
    if LATENTS in wired and sampling is None:
        raise ConfigError(NO_LATENTS)
    if IMAGES in wired and (sampling is None or "vae" not in sampling.links):
        raise ConfigError(NO_IMAGES)


def describe(
    cells: list[Cell],
    strengths: tuple[float, ...],
    seeds: tuple[int, ...],
    names: list[str],
    note: str,
) -> str:
    images = format_count(len(cells), "image")
    lines = [
        message(
            "{images}: strengths {strengths}",
            images=images,
            strengths=", ".join(f"{strength:g}" for strength in strengths),
        )
    ]
    if len(seeds) > 1:
        lines.append(message("seeds: {seeds}", seeds=", ".join(map(str, seeds))))
    if len(names) > 1:
        lines.append(
            message(
                "adapters: {names}; strength 0 is the same for all", names=shorten_list(names, 8)
            )
        )
    return join_messages("\n", [*lines, *filter(None, [note])])


class QwenEditLoraSweepCollect(io.ComfyNode):
    """The last node of an expanded sweep; ComfyUI can pass lists on only inside one value."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="QwenEditLoraSweepCollect",
            display_name="Collect Sweep (internal)",
            category=CATEGORY,
            description="Part of Sweep Qwen Edit LoRA, which adds it by itself. Not for graphs.",
            is_dev_only=True,
            accept_all_inputs=True,
            has_intermediate_output=True,
            inputs=[io.String.Input("text", default="", tooltip="The first lines of the report.")],
            outputs=[
                io.AnyType.Output("images"),
                io.AnyType.Output("latents"),
                io.AnyType.Output("models"),
                report_output(),
            ],
        )

    @classmethod
    def execute(cls, text: str, **parts: Any) -> io.NodeOutput:
        reports = collect_numbered(parts, "report")
        findings = [
            replace(finding, text=message("{name}: {text}", name=name, text=finding.text))
            for name, load in zip(
                collect_numbered(parts, "name"), collect_numbered(parts, "load"), strict=True
            )
            for finding in get_findings(load)
        ]
        lines = [
            text,
            *reports,
            *(join_messages(": ", [TITLES[one.severity], one.text]) for one in findings),
        ]
        report = Report(join_messages("\n", lines), chain(*map(get_findings, reports), findings))
        lists = [collect_numbered(parts, name) for name in ("image", "latent", "model")]
        return io.NodeOutput(*lists, report, ui=show_report(report))


def collect_numbered(parts: Mapping[str, Any], name: str) -> list[Any]:
    """name_0, name_1, ... in numerical order."""
    numbers = sorted(int(key.split("_")[1]) for key in parts if key.startswith(f"{name}_"))
    return [parts[f"{name}_{number}"] for number in numbers]


NODES = [QwenEditLoraSweep, QwenEditLoraSweepCollect]
