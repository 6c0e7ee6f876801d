"""What trainers write into an adapter's header, under the names they use for it.

Sources: kohya-ss sd-scripts (`ss_*`), the modelspec 1.0.1 standard (`modelspec.*`), ai-toolkit,
and this package's own fields. All of it is untrusted text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from ..disk.json_reader import parse_json
from ..errors import FileError
from ..formats.peft_config import read_number

TITLE_FIELDS = ("modelspec.title", "ss_output_name", "name")
TRIGGER_FIELDS = (
    "modelspec.trigger_phrase",
    "trigger_phrase",
    "trigger_words",
    "trigger_word",
    "trained_words",
)
#: Of the training whose finished adapter this is; see `jobs.publication`.
JOB_FIELD = "qwen_edit_lora.job"
#: Of what was resized, merged or extracted; see `toolbox.composition`.
HISTORY_FIELD = "qwen_edit_lora.history"
#: What is shown first, in this order: name -> the fields that may hold it.
KNOWN_FIELDS: Mapping[str, tuple[str, ...]] = {
    "author": ("modelspec.author", "author"),
    "description": ("modelspec.description", "description", "ss_training_comment"),
    "usage": ("modelspec.usage_hint",),
    "license": ("modelspec.license", "license"),
    "date": ("modelspec.date",),
    "base_model": ("ss_sd_model_name", "base_model", "ss_base_model_version"),
    "steps": ("ss_steps",),
    "epochs": ("ss_epoch",),
    "images": ("ss_num_train_images",),
    "learning_rate": ("ss_learning_rate", "ss_unet_lr"),
    "optimizer": ("ss_optimizer",),
    "resolution": ("modelspec.resolution", "ss_resolution"),
}
MAX_TEXT = 400
MAX_WORDS = 8
MAX_TAGS = 12


def clean(text: Any, limit: int = MAX_TEXT) -> str:
    """One line without control characters, truncated at `limit`."""
    text = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def find_field(metadata: Mapping[str, str], fields: tuple[str, ...]) -> str:
    """The first non-empty one of the fields, or ""."""
    found = (clean(metadata.get(field) or "") for field in fields)
    return next((text for text in found if text and text != "None"), "")


def find_title(metadata: Mapping[str, str]) -> str:
    return find_field(metadata, TITLE_FIELDS)


def find_trigger_words(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """What the prompt has to contain, according to the file."""
    for field in TRIGGER_FIELDS:
        text = metadata.get(field)
        if text and clean(text) not in ("", "None"):
            words = read_list(text) or text.split(",")
            return tuple(dict.fromkeys(filter(None, (clean(w, 120) for w in words))))[:MAX_WORDS]
    # ai-toolkit has no field for it: it names a folder "1_word" that holds the one tag "word".
    frequency = read_dict(metadata.get("ss_tag_frequency"))
    return tuple(
        clean(tag, 120)
        for folder, tags in frequency.items()
        if isinstance(tags, dict) and len(tags) == 1
        for tag in tags
        if folder == f"1_{tag}"
    )[:MAX_WORDS]


def read_list(text: str) -> list[str]:
    value = read_value(text)
    return [str(item) for item in value] if isinstance(value, list) else []


def read_dict(text: str | None) -> dict[str, Any]:
    value = read_value(text or "{}")
    return value if isinstance(value, dict) else {}


def read_value(text: str) -> Any:
    """A JSON value; None where there is none, since other trainers may write plain text there."""
    try:
        return parse_json(text, "metadata")
    except FileError:
        return None


def count_tags(metadata: Mapping[str, str]) -> tuple[tuple[str, int], ...]:
    """The most frequent comma-separated parts of the captions, from `ss_tag_frequency`."""
    counts: Counter[str] = Counter()
    for tags in read_dict(metadata.get("ss_tag_frequency")).values():
        for tag, number in tags.items() if isinstance(tags, dict) else ():
            count = read_number(number)
            if count is not None and 0 < count < 1e9 and (text := clean(tag, 120)):
                counts[text] += int(count)
    return tuple(counts.most_common(MAX_TAGS))


def list_known_fields(metadata: Mapping[str, str]) -> dict[str, str]:
    """Names of KNOWN_FIELDS -> their values in the file."""
    found = {name: find_field(metadata, fields) for name, fields in KNOWN_FIELDS.items()}
    return {name: text for name, text in found.items() if text}
