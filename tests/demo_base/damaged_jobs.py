"""What can happen to the files of a job's folder, for tests of its list, page and routes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

#: Everything in a job's folder that is read by name.
FILES = (
    *("state.json", "config.json", "request.json", "metrics.jsonl", "log.txt", "lock"),
    *("samples", "adapters", "checkpoints"),
)
#: Kinds that depend on nothing else.
REPLACED_BY = ("pipe", "folder", "link", "dangling link", "loop", "nothing")


def damage(path: Path, kind: str, at: int = 0, piece: bytes = b"") -> None:
    """Changes or replaces one file or folder.

    Args:
        kind: "cut", "flip", "put in" (at byte `at`), "instead" (of all bytes), or one of
            REPLACED_BY.
    """
    data = path.read_bytes() if path.is_file() else b""
    at = at % (len(data) + 1)
    changed = {
        "cut": data[:at],
        "flip": data[:at] + piece + data[at + 1 :],
        "put in": data[:at] + piece + data[at:],
        "instead": piece,
    }
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    if kind in changed:
        path.write_bytes(changed[kind])
    elif kind == "pipe" and hasattr(os, "mkfifo"):
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to("/etc/passwd" if path.suffix or path.name == "lock" else "/etc")
    elif kind == "dangling link":
        path.symlink_to(path.with_name("nothing"))
    elif kind == "loop":
        path.symlink_to(path)
