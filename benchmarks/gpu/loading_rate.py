"""How fast a file is loaded to the GPU compared with the disk's own rate; a process of part F."""

from __future__ import annotations

import os
import time
from pathlib import Path

from .devices import read_host_memory, reset_host_peak, take_time
from .extension import import_extension
from .settings import Context

#: Bytes per read, and in total, to measure the disk's rate.
CHUNK, MOST_READ = 2**24, 2**30


def run(context: Context) -> None:
    """Writes a file while the GPU is in use, and loads it once the GPU is free."""
    import_extension()
    from qwen_edit_lora.lora_core.training.model.loading import load_transformer

    from .bases import write_large_base
    from .devices import free

    record, sizes, device = context.record, context.sizes, context.device
    with record.item("loading"):
        path = context.folder / "large.safetensors"
        write_large_base(path, sizes, sizes.loaded_blocks)
        drop_from_page_cache(path)
        while not (context.folder / "card is free").exists():
            time.sleep(0.1)
        if device == "cuda":
            take_time(lambda: None, device)  # creates the CUDA context
        record.figure("disk, reading", measure_disk(path) / 1e9, "GB/s")
        for name in ("from the disk", "from the page cache"):
            if name == "from the disk":
                drop_from_page_cache(path)
            free(device)
            reset_host_peak()
            before = read_host_memory("VmRSS")
            anonymous = read_host_memory("RssAnon")
            seconds = take_time(lambda: load_transformer(path, "bf16", device), device)
            rate = path.stat().st_size / seconds / 1e9
            record.figure(f"loading {name}", rate, "GB/s", f"{seconds:.2f} s")
            grown = read_host_memory("VmHWM") - before
            record.figure(f"loading {name}, host memory at most", grown / 1e9, "GB")
            kept = read_host_memory("RssAnon") - anonymous
            record.figure(f"loading {name}, host memory kept", kept / 1e9, "GB")
        path.unlink()


def drop_from_page_cache(path: Path) -> None:
    """Makes the system drop the file from its page cache, if it has a call for that."""
    if not hasattr(os, "posix_fadvise"):
        return
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure_disk(path: Path) -> float:
    """Bytes per second of plain reading."""
    buffer, num_read = bytearray(CHUNK), 0
    started = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while num_read < MOST_READ and (found := file.readinto(buffer)):
            num_read += found
    return num_read / (time.perf_counter() - started)
