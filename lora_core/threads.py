"""One module a thread: faster than several threads on one module, whose steps are too short.

An operation on a matrix of a few megabytes that stays in one core's cache needs no barrier, and
counting, which torch does on one core, then runs on all of them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from .messages import message
from .progress import Progress, ShouldStop, track

T = TypeVar("T")
R = TypeVar("R")


def map_in_threads(
    function: Callable[[T, ShouldStop], R],
    items: Iterable[T],
    progress: Progress | None,
    should_stop: ShouldStop | None,
    what: str,
) -> list[R]:
    """`function(item, should_stop)` of every item, in order; as many at once as torch has threads.

    Torch uses one thread for each meanwhile, and as many as before afterwards. The first exception
    stops the others and is raised.

    Raises:
        InterruptedError: `should_stop` returned True.
    """
    items = list(items)
    num_threads, is_inference = torch.get_num_threads(), torch.is_inference_mode_enabled()
    if num_threads == 1 or len(items) == 1:
        ask_caller = should_stop or (lambda: False)
        tracked = track(items, progress, should_stop, what)
        return [function(item, ask_caller) for item in tracked]
    stopped = threading.Event()

    def ask() -> bool:
        return stopped.is_set() or (should_stop is not None and should_stop())

    def call(item: T) -> R:
        if stopped.is_set():  # nobody takes the result
            raise InterruptedError(message("the {what} was stopped", what=what))
        # these modes belong to a thread, so the caller's are set here again
        with torch.inference_mode(is_inference), torch.no_grad():
            return function(item, ask)

    pool = ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        results = pool.map(call, items)
        return [next(results) for _ in track(items, progress, should_stop, what)]
    finally:
        stopped.set()
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(num_threads)
