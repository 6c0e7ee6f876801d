"""Reporting the progress of a long computation, and stopping it between two modules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from .messages import message

Progress = Callable[[int, int], None]
"""Called with (modules done, modules in all)."""
ShouldStop = Callable[[], bool]

T = TypeVar("T")


def track(
    items: Iterable[T], progress: Progress | None, should_stop: ShouldStop | None, what: str
) -> Iterator[T]:
    """The items, with `progress` called before each and at the end.

    Raises:
        InterruptedError: `should_stop` returned True.
    """
    items = list(items)
    for done, item in enumerate(items):
        if should_stop is not None and should_stop():
            raise InterruptedError(
                message(
                    "the {what} was stopped after {done} of {num_items} modules",
                    what=what,
                    done=done,
                    num_items=len(items),
                )
            )
        if progress is not None:
            progress(done, len(items))
        yield item
    if progress is not None:
        progress(len(items), len(items))
