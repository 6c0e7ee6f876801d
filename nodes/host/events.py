"""Events that ComfyUI's server sends to every open page."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_send: Callable[[str, dict[str, Any]], None] | None = None


def connect_events(send: Callable[[str, dict[str, Any]], None]) -> None:
    """Called once with what sends an event's name and its JSON."""
    global _send
    _send = send


def send_event(name: str, data: dict[str, Any]) -> None:
    """Nothing is sent where there is no server, as in tests and scripts."""
    if _send is not None:
        _send(name, data)
