"""A job's files piece by piece, for whoever wants to keep them elsewhere: nothing is held whole."""

from __future__ import annotations

import io
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ..disk.writing import explain
from ..errors import FileError
from ..messages import message
from ..text import shorten
from .folder import open_inside
from .job import UnknownFileError
from .pictures import MAX_BYTES, SIGNATURE, list_images
from .store import LOG_MAX_BYTES, JobStore

CHUNK_BYTES = 1 << 20
#: In the archive, names the images that are not, if there are any.
LEFT_OUT = "left out.txt"


class _Pipe(io.RawIOBase):
    """What `zipfile` writes, to be taken out again: it cannot be read or sought in."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        self.parts.append(bytes(data))  # type: ignore[call-overload]  # any buffer
        return len(self.parts[-1])

    def take(self) -> bytes:
        data = b"".join(self.parts)
        self.parts.clear()
        return data


def iterate_images(store: JobStore, job_id: str) -> Iterator[bytes]:
    """A ZIP of all images of a job, stored as they are: PNGs do not get smaller.

    Raises:
        ConfigError, UnknownJobError: as `JobStore`, before the first piece.
        UnknownFileError: the job has no image yet.
    """
    folder = store.catalog.find(job_id).samples
    names = [image.name for image in list_images(folder)]
    if not names:
        raise UnknownFileError("this training has no sample images yet")
    return pack(folder, names)


def pack(folder: Path, names: list[str]) -> Iterator[bytes]:
    pipe, left_out = _Pipe(), []
    with zipfile.ZipFile(pipe, "w", zipfile.ZIP_STORED) as archive:
        for name in names:
            try:
                with open_image(folder, name) as file:
                    with archive.open(describe_entry(folder / name), "w") as target:
                        while data := read_chunk(file):
                            target.write(data)
                            yield pipe.take()
            except FileError as e:
                left_out.append(message("{name}: {error}", name=name, error=e))
        if left_out:
            archive.writestr(LEFT_OUT, "\n".join(left_out))
    yield pipe.take()


def open_image(folder: Path, name: str) -> BinaryIO:
    """A regular PNG file of a usable size, at its start.

    Raises:
        FileError: it is none.
    """
    file = open_inside(folder / name)
    try:
        size = file.seek(0, 2)
        file.seek(0)
        if read_chunk(file, len(SIGNATURE)) != SIGNATURE or size > MAX_BYTES:
            raise FileError("not a PNG file of a usable size; delete it")
        file.seek(0)
    except BaseException:
        file.close()
        raise
    return file


def describe_entry(path: Path) -> zipfile.ZipInfo:
    try:
        changed = time.localtime(path.stat().st_mtime)[:6]
    except OSError:
        changed = time.localtime()[:6]
    year = min(max(changed[0], 1980), 2107)  # what the format can say
    return zipfile.ZipInfo(path.name, (year, *changed[1:]))


def open_adapter(store: JobStore, job_id: str, name: str) -> tuple[BinaryIO, int]:
    """An adapter file of a job opened for reading, and its size in bytes.

    Args:
        name: one of those that `JobStore.list_adapters` gives.

    Raises:
        UnknownFileError: it is none of them.
        ConfigError, UnknownJobError, FileError: as `JobStore`.
    """
    paths = {path.name: path for path in store.list_adapters(job_id)}
    if name not in paths:
        raise UnknownFileError(
            "job {job_id} has no LoRA file {name!r}; reload the page",
            job_id=job_id,
            name=shorten(name),
        )
    with store.catalog.using(store.catalog.find(job_id)):
        file = open_inside(paths[name])
        try:
            return file, file.seek(0, 2)
        finally:
            file.seek(0)


def iterate_file(file: BinaryIO, size: int) -> Iterator[bytes]:
    """The first `size` bytes; the file is closed at the end.

    Raises:
        FileError: it has fewer, or cannot be read.
    """
    with file:
        while size:
            data = read_chunk(file, size)
            if not data:
                raise FileError("the file became shorter while it was read")
            size -= len(data)
            yield data


def read_chunk(file: BinaryIO, size: int = CHUNK_BYTES) -> bytes:
    """Raises FileError: it cannot be read, such as on a drive that is gone."""
    try:
        return file.read(min(size, CHUNK_BYTES))
    except OSError as e:
        raise FileError("the file cannot be read: {reason}", reason=explain(e)) from None


def iterate_log(store: JobStore, job_id: str) -> Iterator[bytes]:
    """The worker's log up to its present end, as `JobStore.read_log` shows it, in UTF-8."""
    piece = store.read_log(job_id, 0, LOG_MAX_BYTES)
    return follow_log(store, job_id, piece)


def follow_log(store: JobStore, job_id: str, piece: dict[str, Any]) -> Iterator[bytes]:
    size = piece["size"]
    while piece["text"] or piece["next_offset"] > piece["offset"]:
        yield piece["text"].encode("utf-8", "replace")
        if piece["next_offset"] >= size:
            return
        piece = store.read_log(job_id, piece["next_offset"], LOG_MAX_BYTES)
