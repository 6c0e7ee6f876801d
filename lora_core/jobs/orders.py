"""Giving a running job an order: a sample or a saved adapter of its next step."""

from __future__ import annotations

import dataclasses

from ..messages import message
from .job import Job, JobStateError
from .store import JobStore
from .transitions import STATUS_WORDS, Order

WORDS = {Order.SAMPLE: message("make a sample"), Order.SAVE: message("save an adapter")}


def give_order(store: JobStore, job_id: str, order: Order) -> Job:
    """The job, whose worker does it after its next step; given twice it is done once.

    Raises:
        JobStateError: the job does not run, is about to stop, or makes no samples.
        ConfigError, UnknownJobError, FileError: as `JobStore`.
    """
    folder = store.catalog.find(job_id)
    with store.catalog.using(folder):
        job = store.catalog.read(folder)
        if order in job.orders:
            return job
        if order.value not in job.actions:
            raise JobStateError(explain(job, order))
        folder.write_order(order)
    return dataclasses.replace(job, orders=(*job.orders, order))


def explain(job: Job, order: Order) -> str:
    """Why the job cannot do it now."""
    if order not in job.possible_orders:
        return message(
            "job {job_id} makes no samples; clone it with samples.every above 0", job_id=job.id
        )
    status = STATUS_WORDS.get(job.status, job.status.value)
    stops = message(", and was asked to stop") if job.request is not None else ""
    silent = message(", but does not answer") if job.is_silent else ""
    return message(
        "job {job_id} is {status}{stops}{silent}; only one that trains can {words} after "
        "its next step",
        job_id=job.id,
        status=status,
        stops=stops,
        silent=silent,
        words=WORDS[order],
    )
