"""What is being measured before a training starts: shown on every page, without a job as yet."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ...lora_core.text import shorten

_lock = threading.Lock()
_running: dict[str, dict[str, Any]] = {}
_connection: dict[str, Callable[[dict[str, Any]], None]] = {}


def connect(send: Callable[[dict[str, Any]], None]) -> None:
    """
    Args:
        send: sends an event to every open page.
    """
    _connection["send"] = send


def list_measurements() -> list[dict[str, Any]]:
    """{"id", "name", "started_at"} of each, the oldest first."""
    with _lock:
        return list(_running.values())


@contextmanager
def measuring(name: str) -> Iterator[None]:
    """Inside the block every page shows that a training of this name is being measured."""
    key = secrets.token_hex(8)
    with _lock:
        _running[key] = {"id": key, "name": shorten(name), "started_at": time.time()}
    notify()
    try:
        yield
    finally:
        with _lock:
            del _running[key]
        notify()


def notify() -> None:
    if send := _connection.get("send"):
        send({"measuring": list_measurements()})
