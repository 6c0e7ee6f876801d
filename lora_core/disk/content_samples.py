"""A digest of some of a file's bytes: tells large files apart without reading all of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ..errors import FileError
from .regular_files import open_regular

NUM_SAMPLES, SAMPLE_BYTES = 64, 4096
HEADER_BYTES = 1 << 20
SUFFIXES = (".safetensors", ".sft", ".gguf")


def sample_contents(path: Path, num_samples: int = NUM_SAMPLES) -> str | None:
    """A digest of a file, or of the tensor files of a folder with their names.

    Of each: its size, up to 1 MiB from its start, and 4 KiB at each of `num_samples` places spread
    over it. A file that was moved, copied or touched keeps its digest; one whose tensors were
    computed anew gets another.

    Returns:
        None where there is no such file or it cannot be read.
    """
    digest = hashlib.blake2b(digest_size=12)
    try:
        files = [path]
        if path.is_dir():
            files = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
        for file in files:
            size = file.stat().st_size
            name = file.name if file is not path else ""
            digest.update(f"{name} {size}\n".encode(errors="surrogateescape"))
            with open_regular(file) as opened:
                digest.update(opened.read(HEADER_BYTES))
                for sample in read_samples(opened, size, num_samples):
                    digest.update(sample)
    except (OSError, ValueError, FileError):
        return None
    return digest.hexdigest()


def read_samples(file: BinaryIO, size: int, num_samples: int = NUM_SAMPLES) -> Iterator[bytes]:
    """4 KiB at each of `num_samples` places spread over a file of `size` bytes."""
    for place in range(num_samples):
        file.seek(size * place // num_samples)
        yield file.read(SAMPLE_BYTES)
