"""Which trainings were made on this machine: a job in the list, or one that was deleted since.

A LoRA names the training that made it, and goes from machine to machine with that name.
"""

from __future__ import annotations

from pathlib import Path

from ..disk.writing import explain
from ..errors import FileError
from .folder import open_inside, open_to_append
from .job import is_id

DELETED_FILE = "deleted_jobs.txt"
MAX_BYTES = 4 << 20  # of 100,000 deleted jobs


def record_deleted(root: Path, job_id: str) -> None:
    """Before a job is deleted: its LoRA may stay.

    Args:
        root: of a `JobStore`.

    Raises:
        FileError: the disk does not take it.
    """
    if job_id in read_deleted(root):
        return
    try:
        with open_to_append(root / DELETED_FILE) as file:
            file.write(f"{job_id}\n".encode())
    except OSError as e:
        raise FileError(
            "{deleted_file} cannot be written: {reason}",
            deleted_file=DELETED_FILE,
            reason=explain(e),
        ) from None


def read_deleted(root: Path) -> set[str]:
    """Ids of deleted jobs; none where the file cannot be read."""
    try:
        with open_inside(root / DELETED_FILE) as file:
            text = file.read(MAX_BYTES).decode("ascii", "replace")
    except (OSError, FileError):
        return set()
    return set(filter(is_id, text.split("\n")))
