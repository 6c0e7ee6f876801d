"""What ComfyUI's prompts do while a training job uses the same device, and who owns its memory."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from ...lora_core.jobs.devices import Device
from ...lora_core.jobs.job import Job, JobStatus
from ...lora_core.messages import message
from .. import host

HOLD_ID = "QwenEditLoraHold"

#: What ComfyUI's prompts do while a job uses the same device; the first is the default.
POLICIES = ("warn", "pause prompts", "share")
WARN, PAUSE, _ = POLICIES
POLICY_TOOLTIP = (
    "What prompts do while the training has ComfyUI's device. warn: they run alongside it, the "
    "first that has a MODEL with a warning. pause prompts: they wait until it is over or paused, "
    "or until you interrupt the waiting. share: they run alongside it without one. ComfyUI's "
    "models are released before it starts."
)
#: Key in `JobSettings.origin`.
POLICY_KEY = "prompts"
POLL_INTERVAL = 0.1  # seconds
#: Seconds after which a job that was about to start, but sent no news, is dropped.
START_TIMEOUT = 60.0


class Prompts(Protocol):
    """Interface of the server's prompt queue."""

    def request_release(self) -> None:
        """Requests that the models are unloaded as soon as no prompt runs."""

    def is_release_pending(self) -> bool: ...

    def put_hold(self, prompt_id: str) -> None:
        """Queues a prompt of the node QwenEditLoraHold ahead of all others."""

    def has(self, prompt_id: str) -> bool:
        """Whether the prompt is queued or running."""


class PromptPolicy:
    """Decides for every job whether prompts run alongside it, and when it may start."""

    def __init__(self, prompts: Prompts):
        self.prompts = prompts
        self._lock = threading.RLock()
        self._jobs: dict[str, Job] = {}
        self._starting: dict[str, float] = {}
        self._release_requested: set[str] = set()
        self._dismissed: set[str] = set()
        self._warned: set[str] = set()
        self._hold_id: str | None = None
        self._num_holding = 0

    @contextmanager
    def holding(self) -> Iterator[None]:
        """ComfyUI's device is free inside this block, which only a running node may enter."""
        host.release_models()
        with self._lock:
            self._num_holding += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_holding -= 1

    def hold_prompts(self) -> None:
        """Runs inside the node QwenEditLoraHold: waits while a job wants prompts to pause."""
        try:
            with self.holding():
                while self.find_holders():
                    host.raise_if_interrupted()
                    time.sleep(POLL_INTERVAL)
        except BaseException:
            with self._lock:
                self._dismissed.update(self.find_holders())
            raise

    def find_holders(self) -> set[str]:
        """Ids of jobs on ComfyUI's device that want prompts to pause."""
        with self._lock:
            now = time.monotonic()
            starting = {id_ for id_, at in self._starting.items() if now - at < START_TIMEOUT}
            return {
                job.id
                for job in self._jobs.values()
                if get_policy(job) == PAUSE
                and job.id not in self._dismissed
                and (job.id in starting or is_on(job, host.get_device_name()))
            }

    def take_warning(self) -> str | None:
        """The warning for a prompt queued while a job with the policy "warn" runs; once per job."""
        with self._lock:
            for job in self._jobs.values():
                if (
                    job.id not in self._warned
                    and get_policy(job) == WARN
                    and is_on(job, host.get_device_name())
                ):
                    self._warned.add(job.id)
                    return message(
                        "the training {job} uses {device} too: prompts and the training slow each "
                        "other down and may run out of memory; pause the training if they do",
                        job=job.name,
                        device=job.state.device,
                    )
        return None

    def prepare(self, job: Job, device: Device) -> bool:
        """Whether ComfyUI's models are off the device; polled until they are."""
        if device.name != host.get_device_name():
            return True
        with self._lock:
            if self._num_holding:
                return True
            if get_policy(job) == PAUSE and job.id not in self._dismissed:
                self._jobs[job.id] = job
                was_requested = job.id in self._starting
                self._starting[job.id] = time.monotonic()
                if not was_requested:
                    self._queue_hold()
                elif not self._is_hold_queued():
                    self._dismissed.add(job.id)  # the user removed it from the queue
                return False
            # At every poll: ComfyUI misses a request that comes just before it starts to wait.
            if job.id not in self._release_requested or self.prompts.is_release_pending():
                self._release_requested.add(job.id)
                self.prompts.request_release()
                return False
            return True

    def _queue_hold(self) -> None:
        if not self._is_hold_queued():
            self._hold_id = secrets.token_hex(16)
            self.prompts.put_hold(self._hold_id)

    def _is_hold_queued(self) -> bool:
        return self._hold_id is not None and self.prompts.has(self._hold_id)

    def follow(self, job_id: str, job: Job | None) -> None:
        """Takes a job's news from the supervisor; None: it was deleted."""
        with self._lock:
            if job is None:
                self._jobs.pop(job_id, None)
            else:
                self._jobs[job_id] = job
            if job is None or job.status is not JobStatus.PENDING:
                self._starting.pop(job_id, None)
                self._release_requested.discard(job_id)
            if job is None or job.status.is_settled:
                self._dismissed.discard(job_id)
                self._warned.discard(job_id)
            elif not self._num_holding and job_id in self.find_holders():
                self._queue_hold()  # of an earlier session


def get_policy(job: Job) -> str:
    policy = job.settings.origin.get(POLICY_KEY)
    return policy if policy in POLICIES else WARN


def is_on(job: Job, device_name: str) -> bool:
    return job.status is JobStatus.IN_PROGRESS and device_name in job.state.device.split(", ")
