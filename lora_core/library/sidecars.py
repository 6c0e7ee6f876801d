"""What other programs noted about an adapter in a file beside it.

Three formats, all of them untrusted text: `name.metadata.json` of ComfyUI-Lora-Manager,
`name.civitai.info` of the Civitai helpers (the site's description of a model's version), and
`name.json` of AUTOMATIC1111's web UI ("activation text", "preferred weight").
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from html import unescape
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..disk.json_reader import parse_object
from ..disk.regular_files import read_bytes
from ..errors import FileError
from ..formats.peft_config import read_number
from ..messages import change_values, get_message
from .metadata import clean, read_dict

#: Lora-Manager keeps the site's descriptions of all example images: up to some 100 kB.
MAX_SIDECAR_BYTES = 4 << 20
MAX_NOTE = 2000
#: Characters of a description that are searched for text; the rest is left out.
MAX_MARKUP = 20_000
MAX_WORDS = 20
MAX_LINK = 300
SITE = "https://civitai.com/models"
TAG = re.compile(r"</?[A-Za-z][^<>]{0,500}>")
#: Of a character; the largest there is has seven digits.
LONG_NUMBER = re.compile(r"&#[0-9]{20,};?")


@dataclass(frozen=True)
class SidecarFacts:
    """What the sidecars of one adapter say; the first that says something counts."""

    title: str = ""
    trigger_words: tuple[str, ...] = ()
    base_model: str = ""
    strength: str = ""
    """What the author recommends."""
    notes: str = ""
    """The user's own."""
    description: str = ""
    source: str = ""
    """Where it came from: an https link, or whatever text is in its place."""
    files: tuple[str, ...] = ()
    """Names of the sidecars that say something."""
    problems: tuple[str, ...] = ()
    """Why one cannot be read, in one sentence each."""


def read_sidecars(folder: Path, names: Sequence[str]) -> SidecarFacts:
    """Never raises: a sidecar that cannot be read is one of the problems.

    Args:
        names: of `companions.Companions`.
    """
    texts: dict[str, str] = {}
    words: dict[str, None] = {}
    files, problems = [], []
    for name in names:
        try:  # no link may have taken the name since the folder was listed
            data = read_bytes(folder.resolve() / name, MAX_SIDECAR_BYTES, name, follow_links=False)
            found, own_words = describe(parse_object(data, name))
        except (FileError, OSError) as e:
            problems.append(change_values(get_message(e), partial(clean, limit=300)))
            continue
        if found or own_words:
            files.append(clean(name, 200))
        texts = {**found, **texts}
        words |= dict.fromkeys(own_words)
    return SidecarFacts(
        **texts,
        trigger_words=tuple(words)[:MAX_WORDS],
        files=tuple(files),
        problems=tuple(problems),
    )


def describe(values: Mapping[str, Any]) -> tuple[dict[str, str], list[str]]:
    """Texts by the names of `SidecarFacts`, without the empty ones, and the trigger words."""
    version = get_object(values, "civitai") or values
    model = get_object(version, "model")
    tips = read_dict(get_text(values, "usage_tips", MAX_NOTE))
    weights = [values.get("preferred weight"), tips.get("strength")]
    texts = {
        "title": get_text(values, "model_name") or get_text(model, "name"),
        "base_model": first(
            get_text(values, "base_model"),
            get_text(version, "baseModel"),
            get_text(values, "sd version"),
        ),
        "strength": next((f"{n:g}" for w in weights if (n := read_number(w))), ""),
        "notes": get_text(values, "notes", MAX_NOTE),
        "description": first(
            *(
                strip_markup(get_markup(one, key))
                for one, key in (
                    (values, "modelDescription"),
                    (version, "description"),
                    (model, "description"),
                )
            )
        ),
        "source": find_source(values, version),
    }
    return {name: text for name, text in texts.items() if text}, list_words(values, version)


def list_words(values: Mapping[str, Any], version: Mapping[str, Any]) -> list[str]:
    given = version.get("trainedWords")
    words = [one for one in given if isinstance(one, str)] if isinstance(given, list) else []
    words.append(get_text(values, "activation text"))
    return [word for text in words[:100] if (word := clean(text[:1000], 200))]


def find_source(values: Mapping[str, Any], version: Mapping[str, Any]) -> str:
    numbers = [version.get("modelId"), version.get("id")]
    model_id, version_id = (n if type(n) is int and 0 < n < 10**12 else 0 for n in numbers)
    if model_id:
        return f"{SITE}/{model_id}" + (f"?modelVersionId={version_id}" if version_id else "")
    return first(*(get_text(values, key, MAX_LINK) for key in ("source", "url", "homepage")))


def is_link(text: str) -> bool:
    """Whether a text is an https address that may be shown as a link."""
    if not (text.isascii() and text.isprintable() and " " not in text and len(text) <= MAX_LINK):
        return False
    try:
        parts = urlsplit(text)
    except ValueError:
        return False
    return parts.scheme == "https" and bool(parts.hostname) and "@" not in parts.netloc


def get_object(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = values.get(key)
    return value if isinstance(value, dict) else {}


def get_text(values: Mapping[str, Any], key: str, limit: int = 400) -> str:
    value = values.get(key)
    text = clean(value[: 4 * limit], limit) if isinstance(value, str) else ""
    return "" if text in ("None", "Unknown", "null") else text


def get_markup(values: Mapping[str, Any], key: str) -> str:
    value = values.get(key)
    return value[:MAX_MARKUP] if isinstance(value, str) else ""


def first(*texts: str) -> str:
    return next(filter(None, texts), "")


def strip_markup(text: str) -> str:
    """The words of a description, which the site writes as HTML; the page shows it as text."""
    if "<" not in text:
        return clean(text, MAX_NOTE)
    # `unescape` reads a number of any length; Python refuses one of thousands of digits.
    return clean(unescape(LONG_NUMBER.sub(" ", TAG.sub(" ", text))), MAX_NOTE)
