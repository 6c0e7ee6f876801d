"""A job's state after an event: the status by `transitions`, and the fields that go with it."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from ..messages import message
from .job import JobFailure, JobState, JobStateError
from .transitions import USER_EVENTS, Event, JobStatus, Request, find_next, find_stage

#: Notes that a state keeps.
MAX_NOTES = 20


def advance(
    state: JobState,
    event: Event,
    request: Request | None = None,
    *,
    failure: JobFailure | None = None,
    at: float | None = None,
    **changes: Any,
) -> JobState:
    """The state after an event.

    Args:
        request: what a job in progress was asked for; it decides what stopping means.
        failure: for `Event.FAIL`.
        at: when it happened, in seconds since 1970; now if None.
        changes: further fields, which go before those that follow from the event.

    Raises:
        JobStateError: it cannot happen in this state.
    """
    stage = find_stage(state.status, request)
    reached = find_next(stage, event)
    if reached is None:
        raise JobStateError(
            "a job that is {stage} cannot {event}", stage=stage.value, event=event.value
        )
    if event in USER_EVENTS and (reached is stage or reached.status is JobStatus.IN_PROGRESS):
        return state  # nothing new, or for its worker to do
    at = time.time() if at is None else at
    values: dict[str, Any] = {
        "ended_at": at if reached.status.is_finished else None,
        "failure": failure if reached.status is JobStatus.FAILED else None,
    }
    if reached.status is not JobStatus.IN_PROGRESS:
        values |= {"phase": None, "worker": None}
    if event is Event.RESUME:
        values["queued_at"] = at
    if event in (Event.RESUME, Event.COMPLETE):
        values["restarts"] = 0
    return dataclasses.replace(state, status=reached.status, **values | changes)


def count_restarts(state: JobState, reached: int) -> int:
    """How many times in a row its workers were ended from outside, without a new checkpoint."""
    return 0 if reached > state.restarted_at_step else state.restarts


def restart_or_fail(
    state: JobState, reached: int, failure: JobFailure, max_restarts: int
) -> JobState:
    """The state of a job whose worker was ended from outside: queued again, or failed.

    Args:
        reached: step of the last checkpoint.
    """
    restarts = count_restarts(state, reached)
    if restarts >= max_restarts:
        return advance(state, Event.FAIL, failure=failure, checkpoint_step=reached)
    notes = (
        *state.notes,
        message(
            "{sentence}; it continues after step {reached}",
            sentence=failure.sentence,
            reached=reached,
        ),
    )
    return advance(
        state,
        Event.RESTART,  # keeps its place in the queue
        checkpoint_step=reached,
        restarts=restarts + 1,
        restarted_at_step=reached,
        notes=notes[-MAX_NOTES:],
    )
