"""Opening exactly what a path says: a path that was resolved and judged is opened without links.

Between the judgement and the opening anyone who may write there can put a link in the place of the
file, or of a folder above it. Such a link is not followed here.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from ..messages import message

#: For folders on the way. O_PATH (Linux) needs no right to list them.
_FOLDER_FLAGS = (
    getattr(os, "O_PATH", os.O_RDONLY)
    | getattr(os, "O_DIRECTORY", 0)
    | getattr(os, "O_NOFOLLOW", 0)
    | getattr(os, "O_CLOEXEC", 0)
)
CAN_WALK = os.open in os.supports_dir_fd and hasattr(os, "O_NOFOLLOW")
BECAME_LINK = message(
    "it became a link after it was checked; put the file itself there, then run it again"
)


def open_literally(path: str | os.PathLike[str], flags: int) -> int:
    """As `os.open`, for an absolute path of which no part may be a link.

    Raises:
        OSError: as `os.open`; ELOOP if a part is a link.
    """
    return _walk(Path(path), flags) if CAN_WALK else _compare(Path(path), flags)


def _walk(path: Path, flags: int) -> int:
    """One folder after the other, each by the handle of the one before."""
    *folders, name = path.parts
    at = None
    try:
        for folder in folders:
            below = _open_part(folder, _FOLDER_FLAGS, at)
            if at is not None:
                os.close(at)
            at = below
        return _open_part(name, flags | os.O_NOFOLLOW, at)
    finally:
        if at is not None:
            os.close(at)


def _open_part(name: str, flags: int, at: int | None) -> int:
    try:
        return os.open(name, flags, dir_fd=at)
    except OSError:
        is_link = False
        try:
            is_link = stat.S_ISLNK(os.stat(name, dir_fd=at, follow_symlinks=False).st_mode)
        except OSError:
            pass
        if is_link:
            raise OSError(errno.ELOOP, BECAME_LINK) from None
        raise


def _compare(path: Path, flags: int) -> int:
    """Where a system cannot walk (Windows): opened, then compared with what the path names."""
    descriptor = os.open(path, flags)
    try:
        real = os.path.realpath(path)
        is_same = os.path.samestat(os.fstat(descriptor), os.lstat(real))
        if not is_same or os.path.normcase(real) != os.path.normcase(path):
            raise OSError(errno.ELOOP, BECAME_LINK)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
