"""Pieces of a job's log as others may see them: whole lines and characters, no paths.

Offsets are those of the file's bytes: a page asks on from `next_offset` while the log grows.
"""

from __future__ import annotations

import codecs
import os
import re
from typing import Any, BinaryIO

from ..messages import Message, change_values

#: Bytes of a line beyond which it may be cut between two pieces.
LINE_BYTES = 4096
#: Bytes of such a line that are read on both sides of a piece, so that every path is hidden as a
#: whole: longer than any path.
CONTEXT_BYTES = 32768
#: Folders of which a path is shown from the last one on: what follows is the same on all machines.
KNOWN_FOLDERS = re.compile(r"(?:site-packages|dist-packages|lora_core|python3\.[0-9]+)")
_ROOT = r"(?:file:/+(?:[A-Za-z]:/+)?|[A-Za-z]:[\\/]+|\\\\|/)"
_PATHS = (
    re.compile(rf"(?<=\")({_ROOT}[^\"\n]+)(?=\")"),  # with blanks, as in a traceback
    re.compile(rf"(?<=')({_ROOT}[^'\n]+)(?=')"),
    # Of at least two parts: "tokens/s" and "step 1/6" are no paths, nor is what follows "https:/".
    re.compile(rf"(?<![\w./\\~…-])({_ROOT}[^\s\\/:\"'<>|]+(?:[\\/]+[^\s\\/:\"'<>|]+)+)"),
)


def hide_paths(text: str) -> str:
    """A text in which absolute paths are shortened to what does not tell where they are.

    A message remains one, unless a path is only recognised in the text as a whole.
    """
    hidden = str(text)
    for pattern in _PATHS:
        hidden = pattern.sub(lambda match: shorten_path(match[1]), hidden)
    if hidden == text:
        return text
    changed = change_values(text, hide_paths) if isinstance(text, Message) else hidden
    return changed if changed == hidden else hidden


def shorten_path(path: str) -> str:
    """ "/houses/me/x/site-packages/torch/nn.py" -> "…/site-packages/torch/nn.py"; else the name."""
    parts = [part for part in re.split(r"[\\/]+", path) if part]
    known = [i for i, part in enumerate(parts) if KNOWN_FOLDERS.fullmatch(part)]
    return "/".join(("…", *parts[known[-1] if known else -1 :]))


def read_piece(file: BinaryIO, offset: int | None, limit: int) -> dict[str, Any]:
    """A piece of the log, to the end of its last line where that is near.

    Args:
        offset: first byte; None for the last `limit` bytes, from the start of a line.

    Returns:
        As `JobStore.read_log`.

    Raises:
        OSError: it cannot be read.
    """
    size = file.seek(0, os.SEEK_END)
    wanted = max(0, size - limit) if offset is None else min(max(0, offset), size)
    begin = max(0, wanted - CONTEXT_BYTES)
    file.seek(begin)
    data = file.read(wanted - begin + limit + LINE_BYTES + CONTEXT_BYTES)
    start = wanted - begin
    if offset is None:
        start = find_start(data, start)
    end = find_end(data, start, limit)
    line_start = data.rfind(b"\n", 0, start) + 1 or min(skip_rest(data, 0), start)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    text = decoder.decode(data[line_start:end])
    end -= len(decoder.getstate()[0])  # of a character that is still being written
    around = hide_paths(text + read_rest(data, end))
    before = hide_paths(data[line_start:start].decode("utf-8", "ignore"))
    num_seen = count_common(around, before)
    text = around[num_seen : max(num_seen, count_common(around, hide_paths(text)))]
    return {"text": text, "offset": begin + start, "next_offset": begin + end, "size": size}


def read_rest(data: bytes, end: int) -> str:
    """What follows of a line that is cut at `end`."""
    if data[:end].endswith(b"\n"):
        return ""
    line_end = data.find(b"\n", end)
    return data[end : len(data) if line_end < 0 else line_end].decode("utf-8", "ignore")


def find_start(data: bytes, start: int) -> int:
    """The first line's start from `start` on, or else the first character's."""
    newline = data.find(b"\n", start - 1) if start else -1
    if 0 <= newline < len(data) - 1:
        return newline + 1
    return skip_rest(data, start)


def find_end(data: bytes, start: int, limit: int) -> int:
    """Where a piece of about `limit` bytes ends: after a line, or else after a character."""
    end = min(start + limit, len(data))
    line_end = data.find(b"\n", max(end - 1, start), end + LINE_BYTES) + 1
    if line_end:
        return line_end
    is_last = len(data) < start + limit + LINE_BYTES
    return len(data) if is_last else skip_rest(data, end)


def skip_rest(data: bytes, place: int) -> int:
    """Behind the character of which the byte at `place` may be a later one."""
    for _ in range(3):
        if place < len(data) and data[place] & 0xC0 == 0x80:
            place += 1
    return place


def count_common(text: str, other: str) -> int:
    """Length of their longest common start."""
    pairs = zip(text, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(text), len(other)))
