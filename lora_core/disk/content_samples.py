"""A digest of some of a file's bytes: tells large files apart without reading all of them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from .regular_files import open_regular

NUM_SAMPLES, SAMPLE_BYTES = 64, 4096
HEADER_BYTES = 1 << 20


def sample_contents(files: Path | Sequence[Path], num_samples: int = NUM_SAMPLES) -> str | None:
    """A digest of a file, whatever its name, or of several with their names.

    Of each: its size, up to 1 MiB from its start, and 4 KiB at each of `num_samples` places spread
    over it. A file that was moved, copied or touched keeps its digest; one whose tensors were
    computed anew gets another.

    Returns:
        None where one of them is missing or cannot be read.
    """
    digest = hashlib.blake2b(digest_size=12)
    named = [(files, "")] if isinstance(files, Path) else [(file, file.name) for file in files]
    try:
        for file, name in named:
            with open_regular(file) as opened:
                size = os.fstat(opened.fileno()).st_size
                digest.update(f"{name} {size}\n".encode(errors="surrogateescape"))
                digest.update(opened.read(HEADER_BYTES))
                for sample in read_samples(opened, size, num_samples):
                    digest.update(sample)
    except (OSError, ValueError):  # a FileError is one
        return None
    return digest.hexdigest()


def read_samples(file: BinaryIO, size: int, num_samples: int = NUM_SAMPLES) -> Iterator[bytes]:
    """4 KiB at each of `num_samples` places spread over a file of `size` bytes."""
    for place in range(num_samples):
        file.seek(size * place // num_samples)
        yield file.read(SAMPLE_BYTES)
