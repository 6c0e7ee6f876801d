"""Opening untrusted files: regular files only, of a sane size.

A pipe or device under a file's name would hang or never end. It is recognised by its descriptor, so
nothing can be swapped between the check and the read.
"""

from __future__ import annotations

import codecs
import os
import stat
from pathlib import Path
from typing import BinaryIO

from ..errors import DeniedFileError, FileError, MissingFileError, get_reason
from ..text import format_bytes, name_path, shorten
from .literal_paths import open_literally

#: No file that is read whole as text comes near it.
MAX_TEXT_BYTES = 64 << 20
_BOMS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),  # before UTF-16, with whose mark it begins
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)


def open_regular(
    path: str | os.PathLike[str], shown: str = "", follow_links: bool = True
) -> BinaryIO:
    """The file opened for reading.

    Args:
        shown: what messages call the file, where its name alone is not enough.
        follow_links: False for an absolute path that was resolved before: no part of it may be a
            link by now.

    Raises:
        MissingFileError: there is no such path.
        FileError: it cannot be opened, or is a folder, pipe, socket or device.
    """
    name = shorten(shown) or name_path(path)
    # Without O_NONBLOCK, opening a pipe blocks until someone writes. Windows has no such files.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    open_it = os.open if follow_links else open_literally
    try:
        descriptor = open_it(path, flags | getattr(os, "O_CLOEXEC", 0))
    except (FileNotFoundError, NotADirectoryError):
        raise MissingFileError("{name} does not exist; expected a file.", name=name) from None
    except OSError as e:
        if os.path.isdir(path):  # noqa: PTH112 - Windows opens none; Path.is_dir may raise
            raise FileError("{name} is a folder; expected a file.", name=name) from None
        kind = DeniedFileError if isinstance(e, PermissionError) else FileError
        raise kind("{name} cannot be opened: {reason}.", name=name, reason=get_reason(e)) from None
    except ValueError:  # a null character or half a surrogate pair
        raise FileError("{name!r} is not a file name; expected one.", name=name) from None
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise FileError("{name} is a folder; expected a file.", name=name)
        if not stat.S_ISREG(mode):
            raise FileError(
                "{name} is a pipe, socket or device; expected a regular file.", name=name
            )
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_bytes(
    path: str | os.PathLike[str],
    max_bytes: int = MAX_TEXT_BYTES,
    shown: str = "",
    follow_links: bool = True,
) -> bytes:
    """The whole file.

    Args:
        shown, follow_links: as `open_regular`.

    Raises:
        MissingFileError, FileError: as `open_regular`, or it holds more than `max_bytes`.
    """
    name = shorten(shown) or name_path(path)
    with open_regular(path, shown, follow_links) as file:
        try:
            data = file.read(max_bytes + 1)
        except OSError as e:
            kind = DeniedFileError if isinstance(e, PermissionError) else FileError
            raise kind(
                "{name} cannot be read: {reason}.", name=name, reason=get_reason(e)
            ) from None
    if len(data) > max_bytes:
        raise FileError(
            "{name} is larger than {max_bytes}; expected a file of text. Remove or replace it.",
            name=name,
            max_bytes=format_bytes(max_bytes),
        )
    return data


def read_text(path: str | os.PathLike[str], max_bytes: int = MAX_TEXT_BYTES) -> str:
    """The whole file as text; a byte order mark in front is left out.

    Raises:
        MissingFileError, FileError: as `read_bytes` and `decode_text`.
    """
    return decode_text(read_bytes(path, max_bytes), Path(path).name)


def decode_text(data: bytes, name: str) -> str:
    """
    Raises:
        FileError: `data`, which the message calls `name`, is not UTF-8.
    """
    for mark, encoding in _BOMS:
        if data.startswith(mark):
            raise FileError(
                "{name} is {encoding} text; save it again as UTF-8.",
                name=shorten(name),
                encoding=encoding,
            )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise FileError(
            "{name} is not UTF-8 text (byte {start}); save it again as UTF-8.",
            name=shorten(name),
            start=e.start,
        ) from None
