"""Locks between processes that the system releases when their holder dies, however it dies.

Not the filelock package: with its versions before 4 (measured with 3.16), which ComfyUI allows, a
child that the holder forked keeps the lock after the holder's death, and a link in the lock's place
makes a file elsewhere. Version 4.3 does neither, but takes and releases a lock in 1.6 ms instead of
0.07 ms, and a list of jobs does so for every running one.
"""

from __future__ import annotations

import errno
import os
import sys
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..disk.writing import explain
from ..errors import FileError, get_reason

POLL_INTERVAL = 0.02  # seconds
#: A link would make a file elsewhere.
FLAGS = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)

#: Errors that mean "already locked".
_TAKEN = {errno.EACCES, errno.EAGAIN, errno.EDEADLK}


class FileLock:
    """A lock on a file, between processes and between threads."""

    def __init__(self, path: Path):
        self.path = path
        self._handle: int | None = None

    def try_acquire(self) -> bool:
        """Takes the lock unless it is held.

        Raises:
            FileError: the file cannot be made, or its file system has no locks.
        """
        try:
            handle = os.open(self.path, FLAGS, 0o644)
        except OSError as e:
            raise FileError(
                "{path_parent} cannot be locked: {reason}.",
                path_parent=self.path.parent.name,
                reason=explain(e),
            ) from None
        try:
            lock(handle)
        except OSError as e:
            os.close(handle)
            if e.errno in _TAKEN:
                return False
            raise FileError(
                "the file system of {path_parent} has no file locks ({reason}); choose a folder "
                "on a local disk",
                path_parent=self.path.parent.name,
                reason=get_reason(e),
            ) from None
        self._handle = handle
        _held.add(self)
        return True

    def acquire(self, timeout_s: float) -> bool:
        """Takes the lock, waiting for it if necessary; False if not acquired."""
        deadline = time.monotonic() + timeout_s
        while not self.try_acquire():
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_INTERVAL)
        return True

    def release(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
        _held.discard(self)

    def is_held(self) -> bool:
        """Whether it is held by any process."""
        if not self.path.exists():
            return False
        probe = FileLock(self.path)
        if probe.try_acquire():
            probe.release()
            return False
        return True

    @contextmanager
    def held(self, timeout_s: float) -> Iterator[None]:
        """Holds the lock inside the block.

        Raises:
            FileError: another process held it all the time.
        """
        if not self.acquire(timeout_s):
            raise FileError(
                "{path_parent} is in use by another process; try again",
                path_parent=self.path.parent.name,
            )
        try:
            yield
        finally:
            self.release()


_held: weakref.WeakSet[FileLock] = weakref.WeakSet()


def _close_in_child() -> None:
    """A forked child shares its parent's locks, and would hold them after the parent's death."""
    for held in list(_held):
        if held._handle is not None:
            os.close(held._handle)
            held._handle = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)

if sys.platform == "win32":
    import msvcrt

    def lock(handle: int) -> None:
        """OSError where the lock is held; closing the handle releases it."""
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
else:
    import fcntl

    def lock(handle: int) -> None:
        """OSError where the lock is held; closing the handle releases it."""
        # flock and not lockf: it also holds between two handles of one process
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
