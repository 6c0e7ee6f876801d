"""Ctrl-C and SIGTERM as a polite request: the current step is finished and saved."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from ...progress import ShouldStop


@contextmanager
def stop_on_signals() -> Iterator[ShouldStop]:
    """Inside the block the first signal makes the yielded function return True.

    The second one has its usual effect.
    """
    asked = False
    usual = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, frame: object) -> None:
        nonlocal asked
        asked = True
        signal.signal(number, usual[signal.Signals(number)])

    for number in usual:
        signal.signal(number, ask)
    try:
        yield lambda: asked
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
