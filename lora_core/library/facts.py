"""What an adapter file is, from its header and its scalar alphas alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..adapter.adapter import Adapter
from ..adapter.load_report import describe_family
from ..base_model.families import detect_by_names
from ..disk.safetensors_file import AnyTensor, SafetensorsFile, is_safetensors
from ..disk.typed_json import Whole
from ..errors import FileError, KeyFormatError, LoraError
from ..formats.architectures import detect_architecture
from ..formats.files import read_adapter
from ..formats.reading import parse_keys
from ..formats.schemes import CONFIG_KEY
from ..messages import get_message, message
from .metadata import HISTORY_FIELD, JOB_FIELD, clean, find_title, find_trigger_words

NOT_OPENED = message(
    "not opened: only .safetensors and .sft files are, since a pickle can run code when it "
    "is read; if you trust it, convert it"
)


#: State of a file. Damaged is also an adapter for Qwen-Image whose tensors contradict.
STATES = ("ok", "damaged", "other model", "unknown model", "not opened")
OK, DAMAGED, OTHER, UNKNOWN, PICKLE = STATES


@dataclass(frozen=True)
class AdapterFacts:
    """One file. Values that differ between modules are sorted, the most frequent first."""

    state: str = OK
    model: str = ""
    """Title of the family, of all that fit, or of another model; "" where none is known."""
    error: str = ""
    """Why the file cannot be used, in one sentence."""
    key_format: str = ""
    kinds: tuple[str, ...] = ()
    num_modules: Whole = 0
    num_parameters: Whole = 0
    ranks: tuple[Whole, ...] = ()
    alphas: tuple[float, ...] = ()
    dtypes: tuple[str, ...] = ()
    variants: tuple[str, ...] = ()
    """Out of "original", "2509", "2511", "text-to-image"; empty where the file names none."""
    targets: str = ""
    """The preset of target modules, or "custom"."""
    blocks: str = ""
    title: str = ""
    trigger_words: tuple[str, ...] = ()
    is_ours: bool = False
    """Trained by this extension, on whatever machine, or derived from such a file."""
    job_id: str = ""
    """The training that the file names as its own, on whatever machine; "" for a file that was
    derived from a trained one."""
    warnings: tuple[str, ...] = ()
    findings: tuple[dict[str, str | Whole | None], ...] = ()
    """Those and the notes, as `Finding`s for programs."""


def read_facts(path: Path) -> AdapterFacts:
    """Never raises a LoraError: what is wrong with a file is one of its facts."""
    if not is_safetensors(path.name):
        return AdapterFacts(PICKLE, error=NOT_OPENED)
    try:
        return describe(read_adapter(path))
    except FileError as e:
        return AdapterFacts(DAMAGED, error=shorten_message(e))
    except LoraError as e:
        return describe_refused(path, e)


def describe(adapter: Adapter) -> AdapterFacts:
    report = adapter.report
    adapter.release()
    return AdapterFacts(
        OK,
        describe_family(report.family),
        key_format=report.key_format,
        kinds=sort_by_count(report.kinds),
        num_modules=report.num_modules,
        num_parameters=count_parameters(adapter),
        ranks=sort_by_count(report.ranks),
        alphas=tuple(alpha for alpha in sort_by_count(report.alphas) if math.isfinite(alpha)),
        dtypes=sort_by_count(report.dtypes),
        variants=report.variants,
        targets=report.preset or "custom",
        blocks=report.blocks,
        warnings=report.warnings,
        findings=tuple(asdict(finding) for finding in report.findings),
        **describe_metadata(adapter.metadata),
    )


def count_parameters(adapter: Adapter) -> int:
    """Those of the file: halves of a fused module share their lora_A, which is there once."""
    tensors = (tensor for weights in adapter.modules.values() for tensor in weights.parts.values())
    return sum(tensor.numel() for tensor in {id(tensor): tensor for tensor in tensors}.values())


def describe_refused(path: Path, error: LoraError) -> AdapterFacts:
    """A whole file that is no adapter for Qwen-Image, or one whose keys or shapes contradict."""
    try:
        file = SafetensorsFile(path)
    except FileError as e:
        return AdapterFacts(DAMAGED, error=shorten_message(e))
    file.release()
    state, model = DAMAGED, find_family_title(file.tensors)
    if isinstance(error, KeyFormatError):
        foreign = detect_architecture(file.tensors)
        if foreign:
            state, model = OTHER, foreign
        elif not parse_keys(file.tensors)[0]:
            state, model = UNKNOWN, ""
    return AdapterFacts(state, model, shorten_message(error), **describe_metadata(file.metadata))


def find_family_title(tensors: Mapping[str, AnyTensor]) -> str:
    """Of a file that is damaged: by the names of its modules alone."""
    family = detect_by_names(key.module_path for key in parse_keys(tensors)[0])
    return describe_family(None if family is None else family.name)


def describe_metadata(metadata: Mapping[str, str]) -> dict[str, Any]:
    return {
        "title": find_title(metadata),
        "trigger_words": find_trigger_words(metadata),
        "is_ours": CONFIG_KEY in metadata,
        "job_id": "" if HISTORY_FIELD in metadata else clean(metadata.get(JOB_FIELD, ""), 40),
    }


def sort_by_count(counts: Mapping[Any, int]) -> tuple[Any, ...]:
    """Value -> number of modules; at most 16 of the values, since a file may hold any number."""
    return tuple(sorted(counts, key=lambda value: -counts[value]))[:16]


def shorten_message(error: Exception) -> str:
    text, cleaned = get_message(error), clean(error, 600)
    return text if text == cleaned else cleaned
