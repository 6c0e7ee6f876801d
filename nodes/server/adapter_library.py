"""The adapters in ComfyUI's loras folders: what they are, their health, and their files.

Nothing is read before the first request. Results are kept in ComfyUI's system user folder.
"""

from __future__ import annotations

import atexit
import hashlib
import threading
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ...lora_core.errors import ConfigError, FileError, LoraError
from ...lora_core.jobs.job import is_id
from ...lora_core.jobs.made_here import read_deleted
from ...lora_core.jobs.pictures import JobImage, list_images
from ...lora_core.library.library import AdapterLibrary, UnknownAdapterError
from ...lora_core.pairs.set_images import encode_thumbnail
from ...lora_core.text import shorten
from .. import host
from ..datasets.pair_views import decoding
from . import job_host

CACHE_FILE = "adapters.json"
#: Of a preview's longer side: a card on a screen of two pixels per CSS pixel.
PREVIEW_SIDE = 320

_lock = threading.Lock()
_library: AdapterLibrary | None = None
_connection: dict[str, Callable] = {}


class NoPreviewError(UnknownAdapterError):
    """The adapter has no preview, or its file is no image."""


def connect(send: Callable[[dict[str, Any]], None], is_busy: Callable[[], bool]) -> None:
    """Must be called before the first request.

    Args:
        send: sends new results to every open page; see `AdapterLibrary`.
        is_busy: whether a prompt is running; health checks wait until it ends.
    """
    _connection.update(notify=partial(send_with_jobs, send), is_busy=is_busy)


def send_with_jobs(send: Callable[[dict[str, Any]], None], event: dict[str, Any]) -> None:
    send({**event, "adapters": add_jobs(event["adapters"])})


def get_library() -> AdapterLibrary:
    global _library
    with _lock:
        if _library is None:
            cache = host.get_cache_folder() / CACHE_FILE
            _library = AdapterLibrary(host.find_lora_files, cache, **_connection)
            atexit.register(_library.stop)  # no thread may compute while Python shuts down
        return _library


def list_adapters() -> dict[str, Any]:
    """{"adapters": [...], "pending": number without a verdict}; later verdicts come as events."""
    answer = get_library().list()
    return {**answer, "adapters": add_jobs(answer["adapters"])}


def show_adapter(adapter_id: str) -> dict[str, Any]:
    """One adapter with its metadata, modules, verdict and what is noted beside it.

    Raises:
        ConfigError: not a valid id.
        UnknownAdapterError: no file in the loras folders has this id.
        FileError: the file disappeared meanwhile.
    """
    return add_jobs([get_library().show(adapter_id)])[0]


def find_adapter(adapter_id: str) -> Path:
    """The file with this id.

    Raises:
        ConfigError, UnknownAdapterError: as `show_adapter`.
    """
    return get_library().find(adapter_id)


def set_favourite(adapter_id: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Stars an adapter or takes its star; its entry.

    Raises:
        ConfigError, UnknownAdapterError: as `show_adapter`.
        FileError: the record of favourites is damaged, or the disk does not take it.
    """
    favourite = options.get("favourite")
    if not isinstance(favourite, bool):
        raise ConfigError(
            "favourite is {favourite}; expected true or false", favourite=shorten(repr(favourite))
        )
    return add_jobs([get_library().mark(adapter_id, favourite)])[0]


# --- the trainings that made them -----------------------------------------------------------------


def add_jobs(entries: Collection[dict[str, Any]]) -> list[dict[str, Any]]:
    """The entries with `is_trained_here`, `has_job` (whether the training is still in the list) and
    the newest sample as the preview of those that have no file beside them.
    """
    named = {entry["job_id"] for entry in entries if is_id(entry["job_id"])}
    root = find_jobs() if named else None
    kept = {job_id for job_id in named if root and (root / "jobs" / job_id).is_dir()}
    gone = read_deleted(root) if root and named - kept else set()
    samples = {job_id: find_sample(job_id) for job_id in kept}
    return [
        {
            **entry,
            "is_trained_here": entry["job_id"] in kept or entry["job_id"] in gone,
            "has_job": entry["job_id"] in kept,
            "preview": entry["preview"] or name_version(samples.get(entry["job_id"])),
        }
        for entry in entries
    ]


def find_jobs() -> Path | None:
    """The root of this ComfyUI's trainings, if it has any."""
    try:
        return job_host.get_jobs().store.root
    except FileError:
        return None


def find_sample(job_id: str) -> Path | None:
    """The newest sample of a training; of several items the first."""
    try:
        folder = job_host.get_jobs().store.catalog.find(job_id).samples
    except LoraError:  # deleted just now
        return None
    samples = [image for image in list_images(folder) if image.kind == "sample"]
    newest = max(samples, key=get_step, default=None)
    return None if newest is None else folder / newest.name


def get_step(image: JobImage) -> int:
    return image.step or 0


def name_version(sample: Path | None) -> str:
    """Changes with the sample; "" for none."""
    if sample is None:
        return ""
    text = f"{sample.parent.parent.name}/{sample.name}"
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


# --- previews -------------------------------------------------------------------------------------


def read_preview(adapter_id: str) -> bytes:
    """A JPEG of at most PREVIEW_SIDE: of the file beside the adapter, or of its newest sample.

    Raises:
        ConfigError, UnknownAdapterError: as `show_adapter`.
        NoPreviewError: there is none, or it is no image of a usable size.
    """
    path = get_library().find_preview(adapter_id)
    if path is None:
        job_id = get_library().show_facts(adapter_id).job_id
        path = find_sample(job_id) if is_id(job_id) else None
    if path is None:
        raise NoPreviewError("this LoRA has no preview (any more); reload the list")
    try:  # no link may have taken the name since the folder was listed
        real = path.parent.resolve() / path.name
        with decoding:
            return encode_thumbnail(path, path.name, PREVIEW_SIDE, real)
    except (FileError, OSError) as e:
        raise NoPreviewError("this LoRA's preview cannot be shown: {error}", error=e) from None
