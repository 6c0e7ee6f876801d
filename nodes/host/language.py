"""The language of the reader: ComfyUI's setting Comfy.Locale, or the page's own."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import folder_paths
from comfy.cli_args import args

from ...lora_core.translation import ENGLISH, choose_language, translate_all

SETTING, SETTINGS_FILE = "Comfy.Locale", "comfy.settings.json"
DEFAULT_USER = "default"
#: As ComfyUI makes them; none can leave the folder of users.
_USER = re.compile(r"[\w -][\w .-]*")

_settings: dict[Path, tuple[int, str]] = {}
_last_page = ENGLISH
_request: ContextVar[str] = ContextVar("language of the request being answered")


def get_language() -> str:
    """Of the page being answered; outside of a request of the user, who is not known by name.

    A user who never chose a language sees the browser's, which the page last heard of tells.
    """
    found = _request.get("")
    return found or read_setting(DEFAULT_USER) or _last_page


def use_page_language(headers: Mapping[str, str]) -> None:
    """For the rest of the request with these headers: the user's setting, or the browser's."""
    global _last_page
    browser = choose_language(headers.get("Accept-Language", "").split(",")[0].split(";")[0])
    user = headers.get("Comfy-User", DEFAULT_USER) if args.multi_user else DEFAULT_USER
    language = read_setting(user) or browser
    _request.set(language)
    _last_page = language


def read_setting(user: str) -> str:
    """A user's language; "" if none was chosen, or there is no such user."""
    folder = folder_paths.get_public_user_directory(user) if _USER.fullmatch(user) else None
    if folder is None:
        return ""
    path = Path(folder) / SETTINGS_FILE
    try:
        changed = os.stat(path).st_mtime_ns  # noqa: PTH116 - at every report
        if _settings.get(path, (0, ""))[0] != changed:
            values = json.loads(path.read_text(encoding="utf-8"))
            chosen = values.get(SETTING) if isinstance(values, dict) else None
            _settings[path] = changed, choose_language(chosen) if chosen else ""
    except (OSError, ValueError):
        return ""
    return _settings[path][1]


def translate(data: Any) -> Any:
    """A message, or data with messages, in the reader's language."""
    return translate_all(data, get_language())
