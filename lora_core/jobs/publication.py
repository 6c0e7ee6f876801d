"""Publishing a finished adapter in a loras folder: complete, under a free name, and only once."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import secrets
import shutil
import struct
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

from ..disk.json_reader import parse_object
from ..disk.regular_files import open_regular
from ..disk.writing import explain, rename
from ..errors import FileError
from ..messages import message
from ..text import shorten
from .folder import JobFolder, open_inside, open_to_append
from .identity import identify
from .job import JobState, WorkerIdentity

#: In an adapter's metadata: the job that made it.
JOB_KEY = "qwen_edit_lora.job"
MAX_HEADER_BYTES = 100_000_000  # as safetensors allows
SUFFIX = ".safetensors"
#: In a job's folder: names of copies that were made on request, one a line. The state's belong to
#: the worker, which may be running.
PUBLISHED_FILE = "published.txt"
MAX_PUBLISHED_BYTES = 1 << 20


def publish(adapters: Sequence[Path], loras: Path, job_id: str) -> tuple[str, ...]:
    """Copies a job's adapters, with the job's id in their metadata.

    All of them get the same number appended where one of the names is taken. A copy that an
    earlier, killed call made is found again, so nothing is published twice.

    Returns:
        Names in `loras`.

    Raises:
        FileError: the folder is missing, read-only or full; nothing half-written is left.
    """
    temporary: list[Path] = []
    try:
        loras.mkdir(parents=True, exist_ok=True)
        for adapter in adapters:
            temporary.append(copy_with_id(adapter, loras, job_id))
        for names in propose_names(adapters):
            if any(
                (loras / name).exists() and not is_same(loras / name, file)
                for name, file in zip(names, temporary, strict=True)
            ):
                continue
            if all(
                take_name(file, loras / name) for file, name in zip(temporary, names, strict=True)
            ):
                return tuple(names)
    except OSError as e:
        raise FileError(
            "the adapter cannot be put into {loras}: {reason}",
            loras=shorten(loras.name),
            reason=explain(e),
        ) from None
    finally:
        for path in temporary:
            path.unlink(missing_ok=True)
    raise AssertionError("unreachable: names never end")


def record_published(folder: JobFolder, names: Sequence[str]) -> None:
    """Adds to the copies that were made on request.

    Raises:
        OSError: it cannot be written.
    """
    known = read_published(folder)
    if lines := "".join(f"{name}\n" for name in names if name not in known):
        with open_to_append(folder.path / PUBLISHED_FILE) as file:
            file.write(lines.encode("utf-8", "surrogateescape"))


def read_published(folder: JobFolder) -> tuple[str, ...]:
    """Names of the copies that were made on request; none where the file cannot be read."""
    try:
        with open_inside(folder.path / PUBLISHED_FILE) as file:
            text = file.read(MAX_PUBLISHED_BYTES).decode("utf-8", "surrogateescape")
    except (OSError, FileError):
        return ()
    return tuple(dict.fromkeys(line for line in text.split("\n") if line))


def count_published_bytes(folder: JobFolder) -> int:
    """Size of their record, which only grows."""
    try:
        return os.stat(folder.path / PUBLISHED_FILE).st_size  # noqa: PTH116 - called all the time
    except OSError:
        return 0


def add_published(state: JobState, folder: JobFolder) -> JobState:
    """The state with the copies that were made on request."""
    names = dict.fromkeys((*state.published, *read_published(folder)))
    return dataclasses.replace(state, published=tuple(names))


def name_temporary(loras: Path, job_id: str) -> Path:
    """A name for an unfinished file: from its job and the process that writes it."""
    return loras / f".{job_id}.{name_owner(identify())}.{secrets.token_hex(8)}.tmp"


def name_owner(identity: WorkerIdentity | None) -> str:
    """A process in a file name: its pid, and a digest of what else identifies it."""
    if identity is None:
        return "0"
    told = repr((identity.host, identity.pid, identity.started))
    return f"{identity.pid}-{hashlib.blake2b(told.encode(), digest_size=8).hexdigest()}"


def is_under_way(temporary: Path) -> bool:
    """Whether the process that began it still lives, which will delete it itself."""
    owner = temporary.name.split(".")[2]
    pid = owner.partition("-")[0]
    is_pid = pid.isascii() and pid.isdigit() and len(pid) < 12
    identity = identify(int(pid)) if is_pid else None
    return identity is not None and name_owner(identity) == owner


def remove_unfinished(loras: Path, job_id: str) -> None:
    """Deletes what killed processes of this job left; nothing that has its final name, and nothing
    that is still being written.
    """
    with suppress(OSError):  # a read-only folder raises when it is written to
        for path in list(loras.glob(f".{job_id}.*.tmp")):
            if not is_under_way(path):
                path.unlink(missing_ok=True)


def try_folder(loras: Path, job_id: str) -> None:
    """Raises FileError where a finished adapter could not be written."""
    try:
        trial = name_temporary(loras, job_id)
        trial.touch()
        trial.unlink()
    except (OSError, ValueError) as e:  # ValueError: no name of any folder
        reason = message("it does not exist") if isinstance(e, FileNotFoundError) else explain(e)
        raise FileError(
            "the adapter cannot be written to the loras folder: {reason}",
            reason=shorten(reason, 200),
        ) from None


def propose_names(adapters: Sequence[Path]) -> Iterator[list[str]]:
    stems = [path.name.removesuffix(SUFFIX) for path in adapters]
    shortest = min(stems, key=len)
    for number in count(1):
        if number == 1:
            yield [f"{stem}{SUFFIX}" for stem in stems]
        else:  # name_2, name_2_ema
            yield [f"{shortest}_{number}{stem.removeprefix(shortest)}{SUFFIX}" for stem in stems]


def copy_with_id(adapter: Path, loras: Path, job_id: str) -> Path:
    """A temporary copy whose header names the job; the tensors' bytes unchanged."""
    temporary = name_temporary(loras, job_id)
    try:
        with open_inside(adapter) as source, temporary.open("xb") as target:
            header = read_header(source)
            metadata = header.setdefault("__metadata__", {})
            if not isinstance(metadata, dict):
                raise FileError(
                    "{adapter} has a damaged header; use another file",
                    adapter=shorten(adapter.name),
                )
            metadata[JOB_KEY] = job_id
            text = json.dumps(header, separators=(",", ":")).encode()
            text += b" " * (-len(text) % 8)
            target.write(struct.pack("<Q", len(text)) + text)
            shutil.copyfileobj(source, target, 1 << 20)
            target.flush()
            os.fsync(target.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def read_header(file: BinaryIO) -> dict[str, Any]:
    """Raises FileError where the file does not begin with a header."""
    start = file.read(8)
    (size,) = struct.unpack("<Q", start) if len(start) == 8 else (MAX_HEADER_BYTES + 1,)
    if size > MAX_HEADER_BYTES:
        raise FileError("the adapter is not a safetensors file")
    return parse_object(file.read(size), "the adapter's header")


def read_job_id(path: Path) -> str | None:
    """The job that an adapter file names as its own."""
    try:
        with open_regular(path) as file:
            metadata = read_header(file).get("__metadata__")
    except (OSError, FileError):
        return None
    return metadata.get(JOB_KEY) if isinstance(metadata, dict) else None


def is_same(path: Path, other: Path) -> bool:
    """Whether both are copies of the same weights by the same job."""
    try:
        with open_regular(path) as a, open_regular(other) as b:
            headers = []
            for file in (a, b):
                header = read_header(file)
                metadata = header.get("__metadata__")
                if isinstance(metadata, dict):
                    metadata.pop("modelspec.date", None)
                headers.append(header)
            if headers[0] != headers[1]:
                return False
            while piece := a.read(1 << 20):
                if piece != b.read(len(piece)):
                    return False
            return not b.read(1)
    except (OSError, FileError):
        return False


def take_name(temporary: Path, path: Path) -> bool:
    """Gives the file its name unless that has been taken by now."""
    if path.exists():
        return is_same(path, temporary)
    try:
        os.link(temporary, path)  # fails where the name is taken, unlike a rename
        return True
    except FileExistsError:
        return is_same(path, temporary)
    except OSError:  # a file system without hard links
        if path.exists():
            return is_same(path, temporary)
        rename(temporary, path)
        return True


def remove_published(names: Sequence[str], loras: Path, job_id: str) -> None:
    """Deletes a job's copies; a file that another program has replaced stays.

    Raises:
        FileError: one cannot be deleted; the others are.
    """
    kept = []
    for name in names:
        path = loras / Path(name).name
        if read_job_id(path) == job_id:
            try:
                path.unlink(missing_ok=True)
            except OSError as e:
                kept.append((path.name, e))
    if kept:
        name, error = kept[0]
        raise FileError(
            "the job is deleted, but {name} stays in {loras}: {reason}",
            name=shorten(name),
            loras=shorten(loras.name),
            reason=explain(error),
        )
