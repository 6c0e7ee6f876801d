"""Folder of pairs, or images from the graph -> a training set on disk, checked and encoded once."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from comfy_api.latest import io, ui

from ..lora_core import ConfigError, LoraError
from ..lora_core.findings import NOTE, Finding
from ..lora_core.messages import join_messages, message
from ..lora_core.pairs.cache import (
    EditDataset,
    cache_pairs,
    check_disk,
    find_items,
    measure_store,
    show_store,
)
from ..lora_core.pairs.graph_pairs import build_graph_pairs
from ..lora_core.pairs.layouts import find_pairs
from ..lora_core.pairs.listing import list_files
from ..lora_core.pairs.pair import MAX_REFERENCES, FoundPairs
from ..lora_core.pairs.preflight import ON_PROBLEM, STOP, Preflight, check_pairs
from ..lora_core.pairs.preview import build_table, describe_preflight, draw_pairs
from ..lora_core.text import format_bytes, format_count, shorten
from . import host
from .datasets.encoding import STOCK_REFERENCE_MEGAPIXELS, VARIANTS, PairEncoder
from .datasets.folders import find_dataset_folder, is_dataset_path
from .sockets import (
    CATEGORY,
    DatasetSocket,
    Report,
    build_image,
    report_output,
    show_report,
)

GRAPH_NAME = "graph"

#: Training sets made since ComfyUI started; a node whose set was deleted has to run again.
_made: set[Path] = set()


class QwenEditDataset(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="QwenEditDataset",
            display_name="Image Pairs (Training Set)",
            category=CATEGORY,
            description=(
                "Makes a training set of pairs: a target, one to three references and an "
                "instruction. Checks every pair first, then encodes each once and keeps it."
            ),
            search_aliases=[
                "qwen edit lora dataset",
                "training data",
                "pairs",
                "captions",
                "dataset folder",
                "cache latents",
            ],
            is_input_list=True,  # accepts batches as well as the lists of ComfyUI's dataset nodes
            is_output_node=True,
            inputs=[
                io.Clip.Input("clip", tooltip="qwen_2.5_vl_7b, from CLIPLoader, type qwen_image."),
                io.Vae.Input("vae", tooltip="qwen_image_vae."),
                io.String.Input(
                    "folder",
                    default="",
                    placeholder="datasets/my_pairs",
                    tooltip=(
                        "A folder inside ComfyUI's datasets, input or output folder. Read as it "
                        "is: target/ and control/ folders, a_start.png and a_end.png, a "
                        "metadata.jsonl, ... Leave it empty if targets are connected."
                    ),
                ),
                io.Combo.Input(
                    "variant",
                    options=list(VARIANTS),
                    default="2509 / 2511",
                    tooltip=(
                        "The model to train: decides how prompt and references are encoded. The "
                        "original takes one reference."
                    ),
                ),
                io.Float.Input(
                    "megapixels",
                    default=1.0,
                    min=0.01,
                    max=4.0,
                    step=0.05,
                    round=0.0001,
                    tooltip=(
                        "Area of the targets, in units of 1024 x 1024; each keeps its proportions "
                        "and is never cropped. Less is faster and takes less memory."
                    ),
                ),
                io.String.Input(
                    "captions",
                    default="",
                    multiline=True,
                    optional=True,
                    placeholder="the instruction, if no .txt file has one",
                    tooltip=(
                        "For pairs without a caption file. With connected targets: one line per "
                        "target, or one for all."
                    ),
                ),
                io.Boolean.Input(
                    "check_only",
                    default=False,
                    optional=True,
                    tooltip="Only check: report, table and contact sheet, nothing is encoded.",
                ),
                io.Image.Input(
                    "targets",
                    optional=True,
                    tooltip="Instead of a folder: the edited images, as a batch or a list.",
                ),
                *(reference_input(slot) for slot in range(1, MAX_REFERENCES + 1)),
                io.Combo.Input(
                    "on_problem",
                    options=list(ON_PROBLEM),
                    default=STOP,
                    optional=True,
                    advanced=True,
                    tooltip="What to do about a pair that cannot be used.",
                ),
                io.String.Input(
                    "reference_folders",
                    default="",
                    multiline=True,
                    optional=True,
                    advanced=True,
                    placeholder="datasets/my_controls",
                    tooltip=(
                        "If references are in folders of their own, with the targets' names: one "
                        "folder per line, for reference 1, 2 and 3."
                    ),
                ),
                io.Float.Input(
                    "reference_megapixels",
                    default=STOCK_REFERENCE_MEGAPIXELS,
                    min=0.01,
                    max=4.0,
                    step=0.05,
                    round=0.0001,
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "Area of the references' latents. 1 is what ComfyUI's own nodes give the "
                        "model at inference; less saves memory and differs from that."
                    ),
                ),
            ],
            outputs=[
                DatasetSocket.Output(
                    "dataset", tooltip="The encoded training set, for Train Qwen Edit LoRA."
                ),
                report_output(),
                io.String.Output("table", tooltip="A line per pair: sizes, caption, problems."),
                io.Image.Output(
                    "contact_sheet", tooltip="Pairs as they will be trained, doubtful ones first."
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(
        cls, folder: Any = "", reference_folders: Any = "", **_: Any
    ) -> str | None:
        names = [take_one(folder), *take_one(reference_folders).split("\n")]
        try:
            folders = [find_dataset_folder(name) for name in names if name.strip()]
            num_gone = sum(not folder.exists() for folder in _made)
            return f"{compute_fingerprint(folders)} {num_gone}"
        except (LoraError, OSError):
            return None  # execute raises the error

    @classmethod
    def execute(
        cls,
        clip: Sequence[Any],
        vae: Sequence[Any],
        folder: Sequence[Any],
        variant: Sequence[Any],
        megapixels: Sequence[Any],
        captions: Sequence[Any] = ("",),
        check_only: Sequence[Any] = (False,),
        targets: Sequence[Any] = (),
        reference_1: Sequence[Any] = (),
        reference_2: Sequence[Any] = (),
        reference_3: Sequence[Any] = (),
        on_problem: Sequence[Any] = (STOP,),
        reference_folders: Sequence[Any] = ("",),
        reference_megapixels: Sequence[Any] = (STOCK_REFERENCE_MEGAPIXELS,),
    ) -> io.NodeOutput:
        chosen = VARIANTS[take_one(variant)]
        encoder = PairEncoder(
            take_one(clip), take_one(vae), take_one(variant), take_one(reference_megapixels)
        )
        name, found = collect_pairs(
            take_one(folder),
            take_one(reference_folders),
            list(targets or ()),
            [list(slot or ()) for slot in (reference_1, reference_2, reference_3)],
            [str(caption) for caption in captions],
        )
        preflight = host.run_with_progress(
            check_pairs,
            found,
            name=name,
            megapixels=take_one(megapixels),
            max_references=len(chosen.image_inputs),
            default_caption=take_one(captions),
            on_problem=take_one(on_problem),
        )
        is_check = take_one(check_only)
        if not is_check:
            preflight.raise_stops()
        report, table = describe_preflight(preflight), build_table(preflight, host.translate)
        sheet = build_image(draw_pairs(preflight))
        findings = list(preflight.findings)
        if is_check:
            report += "\n" + message("checked only: nothing was encoded")
            dataset = host.block_output(
                message("check_only is on: turn it off to make the training set")
            )
        else:
            dataset, done, notes = encode(preflight, encoder, take_one(variant))
            report += "\n" + done
            findings += notes
        report = Report(report, findings)
        shown = {
            "qwen_edit_lora_pairs": [preflight.to_dict()],
            **show_report(report),
            "images": ui.PreviewImage(sheet, cls=cls).values,
        }
        return io.NodeOutput(dataset, report, table, sheet, ui=shown)


def reference_input(slot: int) -> io.Image.Input:
    return io.Image.Input(
        f"reference_{slot}",
        optional=True,
        tooltip=f"With targets: the images before the edit, image{slot} of the prompt node.",
    )


def take_one(value: Any) -> Any:
    """The single value of an input; the first if it is a list."""
    return value[0] if isinstance(value, (list, tuple)) and value else value


def compute_fingerprint(folders: list[Path]) -> str:
    """Changes when a file is added, removed or written."""
    digest = hashlib.blake2b(digest_size=16)
    for folder in folders:
        for path in list_files(folder, is_dataset_path).files:
            status = path.lstat() if path.is_dir() else path.stat()
            digest.update(
                f"{path} {status.st_size} {status.st_mtime_ns}\n".encode("utf-8", "replace")
            )
    return digest.hexdigest()


def collect_pairs(
    folder: str,
    reference_folders: str,
    targets: list[torch.Tensor],
    references: list[list[torch.Tensor]],
    captions: list[str],
) -> tuple[str, FoundPairs]:
    """(name of the set, its pairs) from the folder or from the connected images."""
    if targets and folder.strip():
        raise ConfigError(
            "both a folder ({folder}) and targets are given; empty the folder, or disconnect the "
            "targets",
            folder=shorten(folder.strip()),
        )
    if targets:
        connected = [split_batches(slot) for slot in references if slot]
        return GRAPH_NAME, build_graph_pairs(split_batches(targets), connected, captions)
    if any(references):
        raise ConfigError(
            "references are connected but no targets; connect the edited images to targets"
        )
    if not folder.strip():
        raise ConfigError(
            "neither a folder nor targets are given; name a folder such as 'datasets/my_pairs', or "
            "connect targets and reference_1"
        )
    found = find_dataset_folder(folder)
    lines = [line for line in reference_folders.split("\n") if line.strip()]
    others = [find_dataset_folder(line) for line in lines]
    return found.name, find_pairs(found, is_dataset_path, others)


def split_batches(batches: list[torch.Tensor]) -> list[np.ndarray]:
    """IMAGEs (n, height, width, channels) -> images (height, width, 3)."""
    return [
        image[..., :3].detach().float().cpu().clamp(0, 1).numpy()
        for batch in batches
        for image in batch
    ]


def encode(
    preflight: Preflight, encoder: PairEncoder, variant: str
) -> tuple[EditDataset, str, list[Finding]]:
    """The training set, what was done to build it, and findings for the user."""
    store, settings = host.get_cache_folder() / "datasets", encoder.settings
    keyed = find_items(store, preflight.pairs, settings)
    missing = [one.checked for one in keyed if one.tensors is None]
    check_disk(store, missing, encoder.text_width, encoder.reference_megapixels)
    cached = host.run_with_progress(
        cache_pairs, store, preflight.name, keyed, encoder.encode, settings
    )
    _made.add(cached.folder)
    done = message(
        "pairs encoded: {num_encoded}, already cached: {num_reused}",
        num_encoded=cached.num_encoded,
        num_reused=cached.num_reused,
    )
    num_items, size_bytes = measure_store(store)
    lines = [
        join_messages(": ", [done, cached.folder.name]),
        message(
            "the cache holds {num_pairs} of all sets, {size_bytes}, in {store} of the user "
            "folder; nothing is deleted automatically: Clean in LoRA training > Image pairs "
            "removes what no training uses",
            num_pairs=format_count(num_items, "pair"),
            size_bytes=format_bytes(size_bytes),
            store=show_store(store),
        ),
    ]
    findings = []
    if problem := encoder.keep_vae(store, str(settings["vae"])):
        lines.append(problem)
        findings.append(Finding("vae_not_kept", NOTE, problem))
    summary = message(
        "{preflight}: {num_pairs} for {variant}",
        preflight=preflight.name,
        num_pairs=format_count(len(cached.keys), "pair"),
        variant=variant,
    )
    dataset = EditDataset(cached.folder, preflight.name, cached.keys, variant, summary)
    return dataset, join_messages("\n", lines), findings


NODES = [QwenEditDataset]
