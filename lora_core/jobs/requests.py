"""Users' requests to jobs: when they are valid, and their effect without a worker."""

from __future__ import annotations

import dataclasses
import time

from .job import STATUS_WORDS, Job, JobState, JobStateError, JobStatus, Request


def check_allowed(job: Job, request: Request) -> None:
    """Raises JobStateError where the request is invalid."""
    status = job.status
    what = {Request.RUN: "resumed", Request.PAUSE: "paused", Request.CANCEL: "cancelled"}[request]
    if request is Request.RUN:
        runs = status is JobStatus.IN_PROGRESS and job.request in (None, Request.RUN)
        refused = status in (JobStatus.COMPLETED, JobStatus.PENDING) or runs
    elif request is Request.PAUSE:
        refused = status.is_finished
    else:
        refused = status in (JobStatus.COMPLETED, JobStatus.FAILED)
    if refused:
        raise JobStateError(
            f"job {job.id} is {STATUS_WORDS.get(status, status.value)} and cannot be {what}"
        )


def apply(state: JobState, request: Request | None) -> JobState:
    """The state of a job without a worker after a request."""
    now = time.time()
    status = state.status
    if request is Request.RUN and (status.is_finished or status is JobStatus.PAUSED):
        if status is not JobStatus.COMPLETED:
            return dataclasses.replace(
                state,
                status=JobStatus.PENDING,
                queued_at=now,
                ended_at=None,
                failure=None,
                restarts=0,
            )
    if request is Request.PAUSE and status is JobStatus.PENDING:
        return dataclasses.replace(state, status=JobStatus.PAUSED, failure=None)
    if request is Request.CANCEL and status in (JobStatus.PENDING, JobStatus.PAUSED):
        return dataclasses.replace(state, status=JobStatus.CANCELLED, ended_at=now, failure=None)
    return state
