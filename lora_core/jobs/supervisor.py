"""Starts workers, and notices when one dies: a thread in ComfyUI, or a separate program.

Any number of supervisors may serve one store. No state is kept only here, so one that is killed is
replaced by the next, which finds running workers by the locks they hold.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..disk.json_reader import parse_json
from ..errors import FileError, LoraError
from ..training.run.checkpoint import CheckpointFolder
from ..training.run.run import CHECKPOINTS
from .devices import Device, choose_devices, list_devices
from .failure import explain_death, is_from_outside
from .folder import JobFolder, restore
from .identity import describe_host, identify, is_running
from .job import Job, JobState, JobStatus, UnknownJobError, WorkerIdentity
from .launch import EXIT_NOTHING_TO_DO, EXIT_TAKEN, start_worker
from .outcomes import advance, count_restarts, restart_or_fail
from .store import JobStore, get_device_lock
from .transitions import Event, Request

TICK_INTERVAL = 0.5  # seconds
CLAIM_TIMEOUT = 60.0  # seconds from the claim to the worker's first sign of life
#: Seconds that a worker's parent has to record its exit status before others settle the job.
PARENT_TIMEOUT = 3.0
EXIT_FAILED = 1
#: Replace a launcher's exit status, or 0 where the worker did nothing; no process has them.
LAUNCHER_FAILED = 1 << 16
DID_NOTHING = 1 << 17

Listener = Callable[[str, Job | None], None]
Launch = Callable[[Path, JobFolder, Sequence[Device]], Any]
Prepare = Callable[[Job, Device], bool]

logger = logging.getLogger(__name__)


@dataclass
class Child:
    """A worker that this supervisor started."""

    process: Any
    job_id: str
    devices: tuple[Device, ...]
    before: JobState
    """The job's when the worker was started."""


class Supervisor:
    """Supervises a store: `start` a thread, or call `tick` directly.

    Args:
        devices: those this supervisor uses; all of the machine if None.
        prepare: called before a worker is started on a device until it returns True; frees memory.
        listener: called with (id, job) for each job that changed and (id, None) for one that
            was deleted, in the supervisor's thread.
        launch: starts a worker on devices and returns an object with `poll`, as
            `launch.start_worker` does.
    """

    def __init__(
        self,
        store: JobStore,
        devices: Sequence[Device] | None = None,
        prepare: Prepare | None = None,
        listener: Listener | None = None,
        launch: Launch = start_worker,
    ):
        self.store = store
        self.devices = list(list_devices() if devices is None else devices)
        self.prepare = prepare
        self.listener = listener
        self.launch = launch
        self.identity = identify()
        self.owner = to_owner(self.identity)
        self._children: dict[str, Child] = {}
        self._exit_codes: dict[str, int] = {}
        self._first_seen_dead: dict[str, float] = {}
        self._reported: dict[str, Job] = {}
        self._problem = ""
        self._warned: set[str] = set()
        self._warned_before: set[str] = set()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Ticks in a thread that ends with the process; running workers do not."""
        if self._thread is None:
            self._stop.clear()
            self._thread = threading.Thread(
                target=self.run, name="qwen_edit_lora_jobs", daemon=True
            )
            self._thread.start()

    def stop(self) -> None:
        """Ends the thread; workers keep running."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def run(self) -> None:
        """Ticks until `stop`."""
        is_first = True
        while not self._stop.is_set():
            try:
                if is_first:
                    is_first = False
                    self.store.remove_leftovers()
                self.tick()
                self._problem = ""
            except Exception as e:
                # Whatever it is, running jobs must stay supervised for the rest of the session.
                if repr(e) != self._problem:
                    self._problem = repr(e)
                    logger.exception("Qwen Edit LoRA: the training jobs could not be managed")
            self._stop.wait(TICK_INTERVAL)

    def tick(self) -> None:
        """One pass over everything: ended workers, requests, free devices, changes."""
        self._warned_before, self._warned = self._warned, set()
        self._collect()
        jobs = [self._update_safely(job) for job in self.store.list()]
        self._start_next(jobs)
        self._notify_listener(jobs)

    # --- ended workers ---

    def _collect(self) -> None:
        """Collects exit statuses of workers started here, which also reaps them."""
        for job_id, child in list(self._children.items()):
            code = child.process.poll()
            if code is not None:
                del self._children[job_id]
                self._release(job_id, len(child.devices))
                if len(child.devices) == 1:
                    self._exit_codes[job_id] = code
                elif code and not self._has_reported(child):
                    # A launcher's own status hides how the process under it ended.
                    self._exit_codes[job_id] = LAUNCHER_FAILED
                if code == 0 and self._did_nothing(child):
                    self._exit_codes[job_id] = DID_NOTHING

    def _has_reported(self, child: Child) -> bool:
        """Whether the worker under a launcher recorded the job's outcome itself."""
        try:
            state = self.store.get(child.job_id).state
        except LoraError:
            return True  # deleted or damaged: nothing left to report
        began = state.parent is not None and state.parent.pid == child.process.pid
        return began and state.status is not JobStatus.IN_PROGRESS

    def _did_nothing(self, child: Child) -> bool:
        """Whether a worker that exited with 0 never touched its pending job."""
        try:
            job = self.store.get(child.job_id)
        except LoraError:
            return False
        return job.request is None and job.state == child.before

    def _update_safely(self, job: Job) -> Job:
        """The job after any action it needed; an error in one job does not affect the others."""
        try:
            return self._update_job(job)
        except Exception as e:  # noqa: BLE001 - whatever it is, it is logged
            self._log_failure(job, e)
            return job

    def _update_job(self, job: Job) -> Job:
        started_badly = (
            job.status is JobStatus.PENDING
            and job.id not in self._children
            and self._exit_codes.get(job.id, EXIT_NOTHING_TO_DO)
            not in (0, EXIT_NOTHING_TO_DO, EXIT_TAKEN)
        )
        if not (job.status is JobStatus.IN_PROGRESS or job.request or started_badly):
            self._exit_codes.pop(job.id, None)
            return job
        try:
            folder = self.store.catalog.find(job.id)
            if job.status is JobStatus.IN_PROGRESS and folder.lock.is_held():
                self._first_seen_dead.pop(job.id, None)
                return job
            if not self._may_settle(job) or not folder.lock.try_acquire():
                return job
        except FileError as e:
            self._warn_once(str(e))
            return job
        except UnknownJobError:
            return job
        try:
            return self._settle(self.store.get(job.id), folder)
        except UnknownJobError:
            return job
        except FileError as e:
            self._warn_once(str(e))  # a full disk: again at the next tick
            return job
        finally:
            folder.lock.release()

    def _may_settle(self, job: Job) -> bool:
        """Leaves a dead worker to its parent for a while: only the parent knows its exit status."""
        seen = self._first_seen_dead.setdefault(job.id, time.monotonic())
        if job.id in self._children and job.status is not JobStatus.IN_PROGRESS:
            return True
        if job.id in self._children:
            return time.monotonic() - seen > PARENT_TIMEOUT
        is_other = job.state.parent != self.identity and is_running(job.state.parent)
        return not is_other or time.monotonic() - seen > PARENT_TIMEOUT

    def _settle(self, job: Job, folder: JobFolder) -> Job:
        """Records the outcome of a job without a worker; its lock is held."""
        self._first_seen_dead.pop(job.id, None)
        code = self._exit_codes.get(job.id)
        state = job.state
        if code == LAUNCHER_FAILED:
            code = None if state.status is JobStatus.IN_PROGRESS else EXIT_FAILED
        has_failed = code not in (None, 0, EXIT_TAKEN, EXIT_NOTHING_TO_DO)
        code = 0 if code == DID_NOTHING else code
        if state.status is JobStatus.IN_PROGRESS:
            steps = CheckpointFolder(folder.path / CHECKPOINTS).list_steps()
            state = self._record_death(job, folder, code, steps[-1] if steps else 0)
        elif state.status is JobStatus.PENDING and has_failed:
            state = self._record_death(job, folder, code, state.checkpoint_step)
        if state != job.state:
            folder.write_state(state)
            job = dataclasses.replace(job, state=state)
            if state.status is JobStatus.FAILED and job.request is Request.RUN:
                folder.clear_request()  # withdrew a pause of the worker that died
                job = dataclasses.replace(job, request=None)
        self._exit_codes.pop(job.id, None)  # not before it is recorded
        return self.store.apply_request(job, folder) if job.request else job

    def _record_death(
        self, job: Job, folder: JobFolder, code: int | None, reached: int
    ) -> JobState:
        """The state of a job whose worker died: queued again, or failed.

        Args:
            reached: step of the last checkpoint.
        """
        failure = explain_death(code, folder, count_restarts(job.state, reached))
        logger.warning("Qwen Edit LoRA: job %s: %s.", job.id, failure.sentence)
        if is_from_outside(code):
            return restart_or_fail(job.state, reached, failure, job.settings.max_restarts)
        return advance(job.state, Event.FAIL, failure=failure, checkpoint_step=reached)

    # --- starting workers ---

    def _start_next(self, jobs: Sequence[Job]) -> None:
        waiting = sorted(
            (job for job in jobs if job.status is JobStatus.PENDING and job.request is None),
            key=lambda job: (job.state.queued_at, job.id),
        )
        self._renew_claims()
        if not waiting:
            return
        taken = {device for child in self._children.values() for device in child.devices}
        taken |= {d for d in self.devices if get_device_lock(self.store.root, d.key).is_held()}
        for job in waiting:
            # a failed one waits until that is recorded
            if job.id in self._children or job.id in self._exit_codes:
                continue
            settings = job.settings
            chosen = choose_devices(
                self.devices,
                settings.train.model.device,
                settings.num_devices,
                settings.gpu_memory_bytes,
                taken,
            )
            is_free = bool(chosen) and taken.isdisjoint(chosen)
            taken.update(chosen)  # reserved for it, also while it waits for others
            try:
                if is_free and self._is_prepared(job, chosen):
                    self._start(job, chosen)
            except Exception as e:  # noqa: BLE001 - whatever it is, it is logged
                self._log_failure(job, e)

    def _is_prepared(self, job: Job, devices: Sequence[Device]) -> bool:
        """Checked again at each tick until it is."""
        return self.prepare is None or all(self.prepare(job, device) for device in devices)

    def _renew_claims(self) -> None:
        for job_id, child in self._children.items():
            self._claim(job_id, child.devices)

    def _claim(self, job_id: str, devices: Sequence[Device]) -> bool:
        now = time.time()
        until = now + CLAIM_TIMEOUT
        for index, device in enumerate(devices):
            name = name_claim(job_id, index)
            if not self.store.index.claim(name, device.key, self.owner, now, until, has_ended):
                self._release(job_id, index)
                return False
        return True

    def _release(self, job_id: str, count: int) -> None:
        for index in range(count):
            self.store.index.release(name_claim(job_id, index), self.owner)

    def _start(self, job: Job, devices: Sequence[Device]) -> None:
        if not self._claim(job.id, devices):
            return
        try:
            folder = self.store.catalog.find(job.id)
            process = self.launch(self.store.root, folder, devices)
        except LoraError as e:
            self._release(job.id, len(devices))
            self._warn_once(str(e))
            return
        self._children[job.id] = Child(process, job.id, tuple(devices), job.state)

    # --- reporting ---

    def _notify_listener(self, jobs: Sequence[Job]) -> None:
        reported = {}
        for job in jobs:
            if self.listener is not None and self._reported.get(job.id) != job:
                self.listener(job.id, job)
            reported[job.id] = job
        if self.listener is not None:
            for job_id in self._reported.keys() - reported.keys():
                self.listener(job_id, None)
        self._reported = reported

    def _warn_once(self, sentence: str) -> None:
        """Does not repeat it at each tick while it persists."""
        if sentence not in self._warned | self._warned_before:
            logger.warning("Qwen Edit LoRA: %s", sentence)
        self._warned.add(sentence)

    def _log_failure(self, job: Job, error: Exception) -> None:
        """As `_warn_once`, with the traceback."""
        sentence = f"job {job.id} could not be managed ({type(error).__name__})"
        if sentence not in self._warned | self._warned_before:
            logger.error("Qwen Edit LoRA: %s.", sentence, exc_info=error)
        self._warned.add(sentence)


def name_claim(job_id: str, index: int) -> str:
    """A claim for each device of a job; the first has the job's own name."""
    return f"{job_id}/{index}" if index else job_id


def to_owner(identity: WorkerIdentity | None) -> str:
    """A supervisor's name in the index, by which others can tell whether it is alive."""
    return json.dumps(dataclasses.asdict(identity)) if identity else secrets.token_hex(8)


def has_ended(owner: str) -> bool:
    """Whether a supervisor of this machine has ended; False where that cannot be known."""
    try:
        identity = restore(WorkerIdentity, parse_json(owner, "a claim's owner"))
    except ValueError:  # a FileError is one
        return False
    return identity.host == describe_host() and not is_running(identity)
