"""What a page sees of training jobs, and what it may do with them: plain data, no HTTP."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ...lora_core.errors import ConfigError, FileError
from ...lora_core.jobs.captions import read_captions
from ...lora_core.jobs.curves import MetricsReader, build_curves, build_health
from ...lora_core.jobs.job import Job
from ...lora_core.jobs.made_here import record_deleted
from ...lora_core.jobs.orders import give_order
from ...lora_core.jobs.transitions import USER_EVENTS, Event, Order
from ...lora_core.messages import message
from ...lora_core.text import shorten
from ...lora_core.training.config.config_files import PATHS, config_to_dict, flatten
from ...lora_core.training.run.adapter_files import strip_paths
from . import job_host, measurements
from .prompt_policy import get_policy

#: Maximum number of points per curve of a job.
MAX_POINTS = 1000
#: Settings a page must not change: where files are read and written.
PATH_SETTINGS = frozenset(
    (*(".".join(path) for path in PATHS), "loras", "origin", "key", "train", "samples.vae")
)

Options = Mapping[str, Any]

_metrics = MetricsReader()


# --- what is shown ---


def list_jobs() -> dict[str, Any]:
    """The trainings, and what is being measured for one that does not exist yet."""
    jobs = [job.to_dict() for job in job_host.get_jobs().store.list()]
    return {"jobs": jobs, "measuring": measurements.list_measurements()}


def show_job(job_id: str, query: Mapping[str, str]) -> dict[str, Any]:
    """The job with its curves, settings, images and their captions, adapter names."""
    store = job_host.get_jobs().store
    folder = store.catalog.find(job_id)
    with store.catalog.using(folder):
        job = store.show(job_id)
        shown = job.to_dict()
        try:
            rows = _metrics.read(folder.metrics)
        except FileError as e:  # the rest of the page is as good without curves
            rows = []
            shown["notes"] = [*shown["notes"], message("no curves: {error}", error=e)]
        images = store.list_images(job_id)
        items = {image.item for image in images}
        return {
            **shown,
            "metrics": build_curves(rows, MAX_POINTS),
            "health": build_health(rows, MAX_POINTS),
            "settings": flatten(describe_settings(job)),
            "samples": [path.name for path in store.list_samples(job_id)],
            "pictures": [dataclasses.asdict(image) for image in images],
            "captions": read_captions(Path(job.settings.train.data.folder), items),
            "files": [path.name for path in store.list_adapters(job_id)],
        }


def show_log(job_id: str, query: Mapping[str, str]) -> dict[str, Any]:
    numbers = {name: parse_number(query, name) for name in ("offset", "limit") if name in query}
    return job_host.get_jobs().store.read_log(job_id, **numbers)


def describe_settings(job: Job) -> dict[str, Any]:
    """All settings by table; of paths only the last component."""
    settings = config_to_dict(job.settings)
    train = strip_paths(settings["train"])
    del train["output"]
    return {
        **train,
        "samples": {**settings["samples"], "vae": Path(settings["samples"]["vae"]).name},
        "niceness": settings["niceness"],
        "prompts": get_policy(job),
    }


def parse_number(query: Mapping[str, str], name: str) -> int:
    text = query[name]
    if not (text.isascii() and text.isdigit() and len(text) < 16):
        raise ConfigError(
            "{name} is {text!r}; expected a whole number from 0", name=name, text=shorten(text)
        )
    return int(text)


# --- what is done ---


def ask(event: Event, job_id: str, options: Options) -> dict[str, Any]:
    return job_host.get_jobs().store.ask(job_id, event).to_dict()


def order(wanted: Order, job_id: str, options: Options) -> dict[str, Any]:
    return give_order(job_host.get_jobs().store, job_id, wanted).to_dict()


def delete(job_id: str, options: Options) -> dict[str, Any]:
    with_adapter = options.get("with_adapter", False)
    if not isinstance(with_adapter, bool):
        raise ConfigError(
            "with_adapter is {with_adapter}; expected true or false",
            with_adapter=shorten(repr(with_adapter)),
        )
    store = job_host.get_jobs().store
    record_deleted(store.root, store.catalog.find(job_id).id)
    store.delete(job_id, with_adapter)
    return {"id": job_id, "deleted": True}


def clone(job_id: str, options: Options) -> dict[str, Any]:
    """A new job with changed settings; the files it reads and writes stay the same."""
    changes = options.get("changes", {})
    if not isinstance(changes, dict):
        raise ConfigError('changes is not a JSON object; expected e.g. {"steps": 500}')
    for name in changes:
        # A whole table ("model") could contain a path too, and of "origin" every part is kept.
        if any(is_within(name, place) or is_within(place, name) for place in PATH_SETTINGS):
            raise ConfigError(
                "{name} cannot be changed here; queue a Train Qwen Edit LoRA", name=shorten(name)
            )
    store = job_host.get_jobs().store
    return store.get(store.clone(job_id, changes)).to_dict()


def is_within(name: str, table: str) -> bool:
    """Whether a dotted name is that of a table or of something in it."""
    return f"{name}.".startswith(f"{table}.")


def publish(job_id: str, options: Options) -> dict[str, Any]:
    """Copies an adapter of the job into the loras folder; returns its names there."""
    adapter = options.get("adapter")
    if adapter is not None and not isinstance(adapter, str):
        raise ConfigError(
            "adapter is {adapter}; expected a file of the job", adapter=shorten(repr(adapter))
        )
    return {"id": job_id, "published": list(job_host.get_jobs().store.publish(job_id, adapter))}


ACTIONS: Mapping[str, Callable[[str, Options], dict[str, Any]]] = {
    **{event.value: partial(ask, event) for event in USER_EVENTS},
    **{wanted.value: partial(order, wanted) for wanted in Order},
    "delete": delete,
    "clone": clone,
    "publish": publish,
}
