"""Files written whole or not at all, and why one cannot be written."""

from __future__ import annotations

import errno
import os
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch

from ..errors import FileError, get_reason
from ..messages import message
from ..text import shorten

#: For what must not fail; a virus scanner may take seconds over a checkpoint of gigabytes.
PATIENCE_S = 10.0
#: For what is soon retried, or is waited for.
BRIEF_PATIENCE_S = 1.0
RETRY_INTERVAL_S = 0.02
#: Of Windows, for a file or a part of it.
SHARING_VIOLATIONS = (32, 33)
T = TypeVar("T")


def separate(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous tensors, none of which shares its memory: safetensors refuses the others."""
    separated, seen = {}, set()
    for key, tensor in state_dict.items():
        tensor = tensor.contiguous()
        separated[key] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    return separated


def write_then_rename(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write(temporary_path)`, then moves the result into place; a failure leaves nothing.

    Raises:
        FileError: a device, pipe or folder has the name; it would be replaced by a file.
        OSError: as `write` and `replace`.
    """
    if path.exists() and not path.is_file():
        raise FileError(
            "{path} is a folder, pipe or device; expected the name of a file.",
            path=shorten(path.name or str(path)),
        )
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(mode)  # safetensors makes files owner-only
        replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def replace(source: Path, target: Path, patience_s: float = PATIENCE_S) -> None:
    """Renames a file over what has the name; see `retry_while_denied`. OSError as `os.replace`."""
    retry_while_denied(lambda: os.replace(source, target), patience_s)  # noqa: PTH105 - named alike


def rename(source: Path, target: Path) -> None:
    """Renames a folder, or a file to a free name; see `retry_while_denied`. May raise OSError."""
    retry_while_denied(lambda: os.rename(source, target))  # noqa: PTH104 - named alike


def retry_while_denied(action: Callable[[], T], patience_s: float = PATIENCE_S) -> T:
    """The result of `action`, retried as long as the system denies permission.

    Windows does so for a file that another process has open at the moment, be it this package in
    another process or a virus scanner in a folder of new files; a network drive may, too.

    Raises:
        PermissionError: still after `patience_s` seconds.
    """
    deadline = time.monotonic() + patience_s
    while True:
        try:
            return action()
        except PermissionError:
            if time.monotonic() > deadline:
                raise
            time.sleep(RETRY_INTERVAL_S)


def explain(error: Exception) -> str:
    number = getattr(error, "errno", None)
    text = str(error)
    if number == errno.ENOSPC or "No space left" in text:
        return message("the disk is full; free some space and save again")
    if getattr(error, "winerror", None) in SHARING_VIOLATIONS:
        return message("another program has it open; close that one and save again")
    if number in (errno.EACCES, errno.EROFS, errno.EPERM) or "Permission denied" in text:
        return message("the folder is read-only; choose another one or change its permissions")
    if number == errno.ENAMETOOLONG or "File name too long" in text:
        return message("the name is too long; choose a shorter one")
    return get_reason(error) if isinstance(error, OSError) and error.strerror else text
