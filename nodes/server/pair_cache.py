"""The cache of encoded pairs, for the page: its size, and cleaning it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...lora_core.pairs.cache_cleaning import CachePlan, clean, plan_cleaning
from ...lora_core.pairs.pair_set import PairConflictError
from ...lora_core.text import shorten
from .. import host
from . import job_host

#: In place of the training set of a job whose files are damaged; see `jobs.catalog`.
UNKNOWN_FOLDER = "unknown"


def measure_cache() -> dict[str, Any]:
    """{"size_bytes", "freed_bytes", "num_sets"}: all of it, and what cleaning would remove."""
    plan = plan_for_jobs()
    return {
        "size_bytes": plan.size_bytes,
        "freed_bytes": plan.freed_bytes,
        "num_sets": len(plan.sets),
    }


def clean_cache(is_busy: bool) -> dict[str, Any]:
    """Removes the encoded pairs that no training in the list uses; {"freed_bytes"}.

    Raises:
        PairConflictError: a prompt is running, which may be encoding pairs just now.
        FileError: the cache cannot be read or written.
    """
    if is_busy:
        raise PairConflictError(
            "a prompt is running and may use the encoded pairs; clean the cache when it has ended"
        )
    plan = plan_for_jobs()
    clean(plan)
    return {"freed_bytes": plan.freed_bytes}


def plan_for_jobs() -> CachePlan:
    needed = set()
    for job in job_host.get_jobs().store.list():
        folder = job.settings.train.data.folder
        if str(folder) == UNKNOWN_FOLDER:
            raise PairConflictError(
                "training {job} is damaged, so that nothing tells which pairs it needs; delete "
                "it first",
                job=shorten(job.name),
            )
        needed.add(Path(folder).name)
    return plan_cleaning(host.get_cache_folder() / "datasets", needed)
