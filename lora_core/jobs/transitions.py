"""What becomes of a job: one table of its stages and of what can happen to it.

Everything that changes a job's status asks `find_next`, and everything that offers or refuses an
action asks `find_offers` or `find_next`. Pure: no files, no times; `outcomes` writes the rest of a
state.
"""

from __future__ import annotations

from enum import Enum

from ..messages import message


class JobStatus(str, Enum):  # StrEnum needs Python 3.11
    PENDING = "pending"  #: queued
    IN_PROGRESS = "in_progress"  #: a worker runs it
    PAUSED = "paused"  #: has a checkpoint and no process
    COMPLETED = "completed"  #: the adapter is written
    FAILED = "failed"  #: see `JobState.failure`
    CANCELLED = "cancelled"  #: stopped on request; checkpoint and adapter are kept

    @property
    def is_finished(self) -> bool:
        return self in (JobStatus.COMPLETED, JobStatus.FAILED, JobStatus.CANCELLED)

    @property
    def is_settled(self) -> bool:
        """Whether nothing happens to the job until a user does something."""
        return self.is_finished or self is JobStatus.PAUSED


#: As the panel names them.
STATUS_WORDS = {
    JobStatus.PENDING: message("waiting"),
    JobStatus.IN_PROGRESS: message("running"),
    JobStatus.PAUSED: message("paused"),
    JobStatus.COMPLETED: message("completed"),
    JobStatus.FAILED: message("failed"),
    JobStatus.CANCELLED: message("cancelled"),
}


class Request(str, Enum):
    """A user's request to a running job."""

    RUN = "run"
    PAUSE = "pause"
    CANCEL = "cancel"


#: Those for which a worker stops.
STOPS = (Request.PAUSE, Request.CANCEL)


class Order(str, Enum):
    """What a user wants of a running job once, beside its schedule; it changes no status."""

    SAMPLE = "sample"  #: images after the next step
    SAVE = "save"  #: an adapter file of the next step


class Stage(str, Enum):
    """A status; of a job in progress also what its worker was asked to do."""

    PENDING = "pending"
    RUNNING = "running"
    PAUSING = "pausing"
    CANCELLING = "cancelling"
    PAUSED = "paused"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def status(self) -> JobStatus:
        has_worker = self in (Stage.RUNNING, Stage.PAUSING, Stage.CANCELLING)
        return JobStatus.IN_PROGRESS if has_worker else JobStatus(self.value)


class Event(str, Enum):
    """What can happen to a job: the first three by a user, the others to its worker."""

    PAUSE = "pause"
    RESUME = "resume"
    CANCEL = "cancel"
    START = "start"  #: a worker takes it
    STOP = "stop"  #: the worker stopped because it was asked to, and everything is saved
    COMPLETE = "complete"  #: the worker reached the end, and the adapter is in its place
    RESTART = "restart"  #: the worker was ended from outside; another one goes on
    FAIL = "fail"  #: an error, a crash, or ended from outside too often


USER_EVENTS = (Event.PAUSE, Event.RESUME, Event.CANCEL)
#: A request -> what it asks to happen.
EVENTS = {
    Request.PAUSE: Event.PAUSE,
    Request.RUN: Event.RESUME,
    Request.CANCEL: Event.CANCEL,
}
REQUESTS = {event: request for request, event in EVENTS.items()}

#: Stage -> event -> the next stage; what is not here cannot happen.
NEXT: dict[Stage, dict[Event, Stage]] = {
    Stage.PENDING: {
        Event.PAUSE: Stage.PAUSED,
        Event.CANCEL: Stage.CANCELLED,
        Event.START: Stage.RUNNING,
        Event.RESTART: Stage.PENDING,
        Event.FAIL: Stage.FAILED,
    },
    Stage.RUNNING: {
        Event.PAUSE: Stage.PAUSING,
        Event.CANCEL: Stage.CANCELLING,
        Event.STOP: Stage.PENDING,  # what it stopped for was withdrawn after its last check
        Event.COMPLETE: Stage.COMPLETED,
        Event.RESTART: Stage.PENDING,
        Event.FAIL: Stage.FAILED,
    },
    Stage.PAUSING: {
        Event.PAUSE: Stage.PAUSING,
        Event.RESUME: Stage.RUNNING,
        Event.CANCEL: Stage.CANCELLING,
        Event.STOP: Stage.PAUSED,
        Event.COMPLETE: Stage.COMPLETED,
        Event.RESTART: Stage.PENDING,  # the request is still there, and is applied next
        Event.FAIL: Stage.FAILED,
    },
    Stage.CANCELLING: {
        Event.PAUSE: Stage.PAUSING,
        Event.RESUME: Stage.RUNNING,
        Event.CANCEL: Stage.CANCELLING,
        Event.STOP: Stage.CANCELLED,
        Event.COMPLETE: Stage.COMPLETED,
        Event.RESTART: Stage.PENDING,  # as for a pause
        Event.FAIL: Stage.FAILED,
    },
    Stage.PAUSED: {
        Event.PAUSE: Stage.PAUSED,
        Event.RESUME: Stage.PENDING,
        Event.CANCEL: Stage.CANCELLED,
    },
    Stage.COMPLETED: {},
    Stage.FAILED: {Event.RESUME: Stage.PENDING},
    Stage.CANCELLED: {Event.RESUME: Stage.PENDING, Event.CANCEL: Stage.CANCELLED},
}


def find_stage(status: JobStatus, request: Request | None = None) -> Stage:
    """The stage of a job with this status and a request that is not done yet."""
    if status is not JobStatus.IN_PROGRESS:
        return Stage(status.value)
    stages = {Request.PAUSE: Stage.PAUSING, Request.CANCEL: Stage.CANCELLING}
    return Stage.RUNNING if request is None else stages.get(request, Stage.RUNNING)


def find_next(stage: Stage, event: Event) -> Stage | None:
    """The stage after an event; None if it cannot happen in this one."""
    return NEXT[stage].get(event)


def find_offers(stage: Stage) -> tuple[Event, ...]:
    """What a user may do with the job, without what would change nothing."""
    return tuple(event for event in USER_EVENTS if find_next(stage, event) not in (None, stage))
