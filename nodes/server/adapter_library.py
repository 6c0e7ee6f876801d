"""The adapters in ComfyUI's loras folders: what they are, their health, and their files.

Nothing is read before the first request. Results are kept in ComfyUI's system user folder.
"""

from __future__ import annotations

import atexit
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...lora_core.library.library import AdapterLibrary
from .. import host

CACHE_FILE = "adapters.json"

_lock = threading.Lock()
_library: AdapterLibrary | None = None
_connection: dict[str, Callable] = {}


def connect(send: Callable[[dict[str, Any]], None], is_busy: Callable[[], bool]) -> None:
    """Must be called before the first request.

    Args:
        send: sends new results to every open page; see `AdapterLibrary`.
        is_busy: whether a prompt is running; health checks wait until it ends.
    """
    _connection.update(notify=send, is_busy=is_busy)


def get_library() -> AdapterLibrary:
    global _library
    with _lock:
        if _library is None:
            cache = host.get_cache_folder() / CACHE_FILE
            _library = AdapterLibrary(host.find_lora_files, cache, **_connection)
            atexit.register(_library.stop)  # no thread may compute while Python shuts down
        return _library


def list_adapters() -> dict[str, Any]:
    """{"adapters": [...], "pending": number without a verdict}; later verdicts come as events."""
    return get_library().list()


def show_adapter(adapter_id: str) -> dict[str, Any]:
    """One adapter with its metadata, modules and verdict.

    Raises:
        ConfigError: not a valid id.
        UnknownAdapterError: no file in the loras folders has this id.
        FileError: the file disappeared meanwhile.
    """
    return get_library().show(adapter_id)


def find_adapter(adapter_id: str) -> Path:
    """The file with this id.

    Raises:
        ConfigError, UnknownAdapterError: as `show_adapter`.
    """
    return get_library().find(adapter_id)
