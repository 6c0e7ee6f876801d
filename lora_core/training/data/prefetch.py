"""The next batch, prepared while the device works on this one."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """Calls `load` for the next number in a thread, while the caller uses the previous result.

    No thread is started before there is a next number.

    Args:
        load: a function of the number alone, which may run in two threads at once.
        end: the first number that will not be requested.
    """

    def __init__(self, load: Callable[[int], T], end: int):
        self._load = load
        self._end = end
        self._executor: ThreadPoolExecutor | None = None
        self._next: tuple[int, Future[T]] | None = None

    def take(self, number: int) -> T:
        """What `load(number)` gives or raises; numbers out of turn are only slower."""
        ready, self._next = self._next, None
        if ready is not None and ready[0] == number:
            result = ready[1].result()
        else:
            result = self._load(number)
        if number + 1 < self._end:
            if self._executor is None:
                self._executor = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
            self._next = (number + 1, self._executor.submit(self._load, number + 1))
        return result

    def close(self) -> None:
        """Ends the thread, with what it was about to give."""
        self._next = None
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)
            self._executor = None
