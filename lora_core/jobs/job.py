"""A job: what was asked for, its progress, and what went wrong."""

from __future__ import annotations

import math
import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any

from ..checks import check_number
from ..disk.typed_json import Whole
from ..errors import ConfigError, LoraError
from ..messages import join_messages, message
from ..text import format_duration, shorten
from ..training.config.config import TrainConfig
from .log_pieces import hide_paths
from .transitions import (
    STATUS_WORDS,
    STOPS,
    Event,
    JobStatus,
    Order,
    Request,
    Stage,
    find_offers,
    find_stage,
)

#: Seconds without a heartbeat after which a live worker is reported as not responding.
SILENCE_TIMEOUT = 60.0

MAX_DEVICES = 16
#: Characters of a failure's message and of each advice.
MAX_SENTENCE = 400
#: In place of a failure's message that says nothing: a user never sees a failed job without one.
UNEXPLAINED = message("the training failed without a message; read the end of the log")

_ID = re.compile(r"[0-9]{8}-[0-9]{6}-[0-9a-f]{8}")


class UnknownJobError(LoraError, LookupError):
    """There is no job of this id."""


class UnknownFileError(LoraError, LookupError):
    """The job has no file of this name."""


class UnknownImageError(UnknownFileError):
    """The job has no image of this name."""


class JobStateError(LoraError):
    """A job's state does not allow what was asked."""


class Phase(str, Enum):
    """What a worker is doing."""

    LOADING = "loading"
    TRAINING = "training"
    SAMPLING = "sampling"
    SAVING = "saving"


PHASE_WORDS = {
    Phase.LOADING: message("loading"),
    Phase.TRAINING: message("training"),
    Phase.SAMPLING: message("sampling"),
    Phase.SAVING: message("saving"),
}


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """Samples during training."""

    every: int = 0
    """Steps between samples; 0 makes none."""
    items: tuple[str, ...] = ()
    """Keys of the training set; the first item if empty."""
    steps: int = 20
    guidance: float = 1.0
    seed: int = 0
    vae: str = ""
    """A VAE's file, to keep images next to the latents; only latents are kept without one."""

    def __post_init__(self) -> None:
        check_number(self, "every", 0)
        check_number(self, "steps", 1)
        check_number(self, "guidance", 0)
        check_number(self, "seed", 0)


@dataclass(frozen=True, kw_only=True)
class JobSettings:
    """Everything a worker needs."""

    train: TrainConfig
    """`output` is the job's own folder, whatever was given."""
    loras: str = ""
    """Folder that gets a copy of the finished adapter; "" leaves it in the job's folder."""
    samples: SampleSettings = field(default_factory=SampleSettings)
    niceness: int = 10
    """How much the worker yields the CPU to others: 0 not at all, 19 the most."""
    num_devices: int = 1
    """GPUs that train together, each on its own batch; all of one kind."""
    gpu_memory_bytes: int = 0
    """For which the base's storage was chosen: smaller GPUs are left alone while there are any
    others."""
    max_restarts: int = 3
    """How often a killed job is restarted without a new checkpoint in between."""
    key: str = ""
    """What makes two submissions the same; see `JobStore.submit`."""
    origin: Mapping[str, Any] = field(default_factory=dict)
    """Whatever the submitter wants to find again, such as a training set's id."""

    def __post_init__(self) -> None:
        check_number(self, "niceness", 0, 19)
        check_number(self, "num_devices", 1, MAX_DEVICES)
        check_number(self, "gpu_memory_bytes", 0)
        check_number(self, "max_restarts", 0)


@dataclass(frozen=True, kw_only=True)
class WorkerIdentity:
    """Identifies a process uniquely."""

    host: str
    """Machine, boot and process namespace: where `pid` means something."""
    pid: Whole
    started: float
    """When the process started, as the system counts; pids are reused, this is not."""


def is_said(text: str) -> bool:
    """Whether a text has anything that can be seen: blanks and control characters are nothing."""
    return any(char.isprintable() and not char.isspace() for char in text)


def shorten_safely(text: str) -> str:
    """To MAX_SENTENCE; paths are hidden before the cut leaves a part of one."""
    return shorten(hide_paths(text) if len(text) > MAX_SENTENCE else text, MAX_SENTENCE)


@dataclass(frozen=True, kw_only=True)
class JobFailure:
    """Why a job failed, and what to do."""

    sentence: str
    advice: tuple[str, ...] = ()
    """What to change, the cheapest first."""
    exit_code: Whole | None = None
    """Of the worker, negative for a signal; None where it reported its error itself."""
    log_tail: str = ""

    def __post_init__(self) -> None:
        sentence = self.sentence if is_said(self.sentence) else UNEXPLAINED
        advice = tuple(shorten_safely(one) for one in self.advice if is_said(one))
        object.__setattr__(self, "sentence", shorten_safely(sentence))
        object.__setattr__(self, "advice", advice)


@dataclass(frozen=True, kw_only=True)
class JobState:
    """A job's progress. Times are seconds since 1970."""

    status: JobStatus = JobStatus.PENDING
    created_at: float = 0.0
    queued_at: float = 0.0
    """Place in the queue: the smallest runs first."""
    started_at: float | None = None
    ended_at: float | None = None
    phase: Phase | None = None
    device: str = ""
    """Names as `Device.name`; several are separated by ", "."""
    worker: WorkerIdentity | None = None
    parent: WorkerIdentity | None = None
    """The process that started the worker, and will see its exit status."""
    heartbeat_at: float | None = None
    step: Whole = 0
    num_steps: Whole = 0
    loss: float | None = None
    smoothed_loss: float | None = None
    seconds_per_step: float | None = None
    memory_bytes: Whole | None = None
    restarts: Whole = 0
    """In a row, without a new checkpoint in between."""
    restarted_at_step: Whole = 0
    checkpoint_step: Whole = 0
    adapters: tuple[str, ...] = ()
    """Files of the latest weights, relative to the job's folder."""
    published: tuple[str, ...] = ()
    """Their copies' names in `JobSettings.loras`."""
    failure: JobFailure | None = None
    notes: tuple[str, ...] = ()
    """What happened to it, one sentence each."""
    alarms: tuple[str, ...] = ()
    """What a user should look at before the training is over; see `alarms.Alerts`."""

    def __post_init__(self) -> None:
        for name in ("notes", "alarms"):
            object.__setattr__(self, name, tuple(filter(is_said, getattr(self, name))))
        if self.status is JobStatus.FAILED and self.failure is None:
            object.__setattr__(self, "failure", JobFailure(sentence=UNEXPLAINED))

    @property
    def remaining_s(self) -> float | None:
        if self.status is not JobStatus.IN_PROGRESS or self.seconds_per_step is None:
            return None
        seconds = self.seconds_per_step * (self.num_steps - self.step)
        return seconds if math.isfinite(seconds) else None


@dataclass(frozen=True)
class Job:
    """A job as it was a moment ago."""

    id: str
    settings: JobSettings
    state: JobState
    request: Request | None = None
    """What was requested and is not done yet."""
    orders: tuple[Order, ...] = ()
    """What its worker was told to do after the next step, and has not done yet."""
    is_damaged: bool = False
    """Whether its files cannot be read; see `state.failure`."""

    @property
    def name(self) -> str:
        return self.settings.train.name

    @property
    def status(self) -> JobStatus:
        return self.state.status

    @property
    def is_silent(self) -> bool:
        """Whether its worker is alive but has not responded for long: it hangs, or was stopped."""
        beat = self.state.heartbeat_at
        return (
            self.status is JobStatus.IN_PROGRESS
            and beat is not None
            and time.time() - beat > SILENCE_TIMEOUT
        )

    @property
    def actions(self) -> tuple[str, ...]:
        """What a user may do with it now, by the names of the server's actions."""
        if self.is_damaged:
            return ("delete",)
        stage = find_stage(self.status, self.request)
        actions = [event.value for event in find_offers(stage)]
        if stage is Stage.CANCELLING and self.is_silent:
            actions.append(Event.CANCEL.value)  # the second one ends the process
        if stage is Stage.RUNNING and not self.is_silent:
            actions += [order.value for order in self.possible_orders if order not in self.orders]
        actions.append("clone")
        if self.settings.loras and self.state.adapters:
            actions.append("publish")
        if self.status is not JobStatus.IN_PROGRESS:
            actions.append("delete")
        return tuple(actions)

    @property
    def possible_orders(self) -> tuple[Order, ...]:
        """Those that its settings allow; samples need what their schedule needs."""
        return tuple(Order) if self.settings.samples.every else (Order.SAVE,)

    def describe(self) -> str:
        """State and progress in a line."""
        state = self.state
        parts = [STATUS_WORDS[self.status]]
        if self.status is JobStatus.IN_PROGRESS and state.phase is not None:
            parts = [PHASE_WORDS[state.phase]]
        asked = self.request if self.status is JobStatus.IN_PROGRESS else None
        if asked in STOPS:
            to_pause = asked is Request.PAUSE
            parts.append(message("to be paused") if to_pause else message("to be cancelled"))
        if self.is_silent:
            parts.append(message("but its worker does not answer; cancel it twice to end it"))
        parts.append(
            message("step {step} of {num_steps}", step=state.step, num_steps=state.num_steps)
        )
        if state.remaining_s is not None:
            parts.append(message("{duration} left", duration=format_duration(state.remaining_s)))
        return join_messages(", ", parts)

    def to_dict(self) -> dict[str, Any]:
        """What is safe to show to anyone: no path of this machine."""
        state = {k: v for k, v in asdict(self.state).items() if k not in ("worker", "parent")}
        for name in ("notes", "alarms"):
            state[name] = [hide_paths(text) for text in state[name]]
        if failure := state["failure"]:
            for name in ("sentence", "log_tail"):
                failure[name] = hide_paths(failure[name])
        return {
            "id": self.id,
            "name": self.name,
            **state,
            "remaining_s": self.state.remaining_s,
            "request": self.request,
            "orders": self.orders,
            "is_silent": self.is_silent,
            "actions": self.actions,
        }


def make_id() -> str:
    """Sorts by time, cannot be guessed, and is a valid folder name everywhere."""
    return f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(4)}"


def is_id(text: object) -> bool:
    return isinstance(text, str) and _ID.fullmatch(text) is not None


def check_id(job_id: object) -> str:
    """The id itself.

    Raises:
        ConfigError: it is none, so that no path is ever built from it.
    """
    if not isinstance(job_id, str) or not is_id(job_id):
        raise ConfigError(
            "{job_id!r} is not a job id; expected one such as 20260131-120000-0123abcd",
            job_id=str(job_id)[:40],
        )
    return job_id
