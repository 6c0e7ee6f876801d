"""Messages in the reader's language. English is in the source, Chinese in locales/zh.

`locales/zh/messages.json` maps each template to its translation, with the same placeholders.
What has no entry stays English.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .messages import Message, MessageList, map_texts

ENGLISH = "en"
LOCALES = Path(__file__).resolve().parent.parent / "locales"
LANGUAGES = (ENGLISH, "zh")
#: Between parts of a list: as English has it -> as Chinese has it.
SEPARATORS = {", ": "、", "; ": "；", " ": "", ": ": "：", " and ": "和", " or ": "或"}


def choose_language(locale: object) -> str:
    """ "zh-CN", "zh_CN.UTF-8" or "zh" -> "zh"; English for what is not translated."""
    code = str(locale or "").replace("_", "-").split("-")[0].lower()
    return code if code in LANGUAGES else ENGLISH


@functools.cache
def read_table(language: str) -> Mapping[str, str]:
    """Template -> translation; {} where this package is used without its locales."""
    try:
        text = (LOCALES / language / "messages.json").read_text(encoding="utf-8")
    except OSError:
        return {}
    table: Mapping[str, str] = json.loads(text)
    return table


def find_template(template: str, table: Mapping[str, str]) -> str:
    """The translated template; of a clause, that of its sentence without the full stop."""
    found = table.get(template)
    if found is None:
        found = table.get(f"{template}.", template).rstrip("。")
    return found


def translate(text: object, language: str) -> str:
    """A message in that language, and any other text as it is."""
    if language == ENGLISH or not isinstance(text, Message):
        return str(text)
    if isinstance(text, MessageList):
        separator = SEPARATORS.get(text.separator, text.separator)
        return separator.join(translate(part, language) for part in text.parts)
    template = find_template(text.template, read_table(language))
    if not text.values:
        return template
    values = {
        name: translate(value, language) if isinstance(value, str) else value
        for name, value in text.values.items()
    }
    return template.format(**values)


def translate_all(data: Any, language: str) -> Any:
    """Data with every message in it translated; see `messages.map_texts`."""
    if language == ENGLISH:
        return data
    return map_texts(data, lambda text: translate(text, language))
