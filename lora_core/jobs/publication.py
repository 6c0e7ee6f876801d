"""The finished adapter's way into a loras folder: whole, under a free name, and only once."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import struct
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path

from ..errors import FileError
from ..files import explain, rename

#: In an adapter's metadata: the job that made it.
JOB_KEY = "qwen_edit_lora.job"
MAX_HEADER_BYTES = 100_000_000  # as safetensors allows
SUFFIX = ".safetensors"


def publish(adapters: Sequence[Path], loras: Path, job_id: str) -> tuple[str, ...]:
    """Copies a job's adapters, with the job's id in their metadata.

    All of them get the same number behind their names where one of the names is taken. A copy that
    this call made before it was killed is found again, so nothing comes twice.

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
        raise FileError(f"the adapter cannot be put into {loras.name}: {explain(e)}") from None
    finally:
        for path in temporary:
            path.unlink(missing_ok=True)
    raise AssertionError("unreachable: names never end")


def remove_unfinished(loras: Path, job_id: str) -> None:
    """Deletes copies that a worker of this job was killed over; nothing that has a name."""
    for path in loras.glob(f".{job_id}.*.tmp"):
        with suppress(OSError):  # a folder that takes no more says so when it is to
            path.unlink(missing_ok=True)


def propose_names(adapters: Sequence[Path]) -> Iterator[list[str]]:
    stems = [path.name.removesuffix(SUFFIX) for path in adapters]
    shortest = min(stems, key=len)
    for number in count(1):
        if number == 1:
            yield [f"{stem}{SUFFIX}" for stem in stems]
        else:  # name_2, name_2_ema
            yield [f"{shortest}_{number}{stem.removeprefix(shortest)}{SUFFIX}" for stem in stems]


def copy_with_id(adapter: Path, loras: Path, job_id: str) -> Path:
    """A temporary copy whose header names the job; the tensors' bytes as they are."""
    temporary = loras / f".{job_id}.{secrets.token_hex(8)}.tmp"
    try:
        with adapter.open("rb") as source, temporary.open("xb") as target:
            header = read_header(source)
            header.setdefault("__metadata__", {})[JOB_KEY] = job_id
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


def read_header(file) -> dict:
    (size,) = struct.unpack("<Q", file.read(8))
    if size > MAX_HEADER_BYTES:
        raise FileError(f"{Path(file.name).name} is no safetensors file")
    return json.loads(file.read(size))


def read_job_id(path: Path) -> str | None:
    """The job that an adapter file says it is of."""
    try:
        with path.open("rb") as file:
            return read_header(file).get("__metadata__", {}).get(JOB_KEY)
    except (OSError, ValueError, struct.error, AttributeError):
        return None


def is_same(path: Path, other: Path) -> bool:
    """Whether both are copies of the same weights by the same job."""
    try:
        with path.open("rb") as a, other.open("rb") as b:
            headers = []
            for file in (a, b):
                header = read_header(file)
                metadata = header.get("__metadata__", {})
                metadata.pop("modelspec.date", None)
                headers.append(header)
            if headers[0] != headers[1]:
                return False
            while piece := a.read(1 << 20):
                if piece != b.read(len(piece)):
                    return False
            return not b.read(1)
    except (OSError, ValueError, struct.error, AttributeError):
        return False


def take_name(temporary: Path, path: Path) -> bool:
    """Gives the file its name unless another one has it by now."""
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
    """Deletes a job's copies; a file that is another's by now stays."""
    for name in names:
        path = loras / Path(name).name
        if read_job_id(path) == job_id:
            path.unlink(missing_ok=True)
