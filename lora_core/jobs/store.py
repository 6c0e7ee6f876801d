"""`JobStore`: the interface to training jobs. Several processes may use one folder."""

from __future__ import annotations

import dataclasses
import os
import secrets
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from ..checks import show
from ..disk.writing import explain, rename
from ..errors import ConfigError, FileError, MissingFileError
from ..messages import message
from ..text import shorten, shorten_list
from ..training.config.config import TrainConfig
from ..training.config.config_files import config_from_dict
from ..training.run.adapter_files import ADAPTERS
from ..training.run.metrics import read_metrics
from .catalog import Catalog
from .folder import BusyFileError, JobFolder, list_inside, open_inside
from .identity import kill
from .index import JobIndex
from .job import (
    Job,
    JobSettings,
    JobState,
    JobStateError,
    JobStatus,
    make_id,
)
from .locks import POLL_INTERVAL, FileLock
from .log_pieces import read_piece
from .outcomes import advance
from .pictures import JobImage, list_images, read_image
from .publication import (
    publish,
    read_published,
    record_published,
    remove_published,
    remove_unfinished,
)
from .request_checks import check_allowed, check_files
from .submission import (
    build_settings,
    change_settings,
    remove_traces,
    write_job,
)
from .transitions import EVENTS, REQUESTS, Event, Request, find_next, find_stage

JOBS = "jobs"
DEVICES = "devices"
INDEX_FILE = "jobs.sqlite"
LOCK_TIMEOUT = 5.0  # seconds; all but workers hold a job's lock for milliseconds
KEY_TIMEOUT = 30.0  # seconds
LEFTOVER_AGE = 600.0  # seconds after which a submission is considered abandoned
LOG_TAIL_BYTES = 65536
LOG_MAX_BYTES = 1 << 20
WAIT_INTERVAL = 0.2  # seconds


class JobStore:
    """The jobs below one folder, for any number of threads and processes at once.

    Every method that takes a job id raises ConfigError for an invalid id and UnknownJobError where
    there is no such job; those that change something raise JobStateError where its state forbids
    it, and FileError where the disk is full or read-only.
    """

    def __init__(self, root: str | os.PathLike[str]):
        """Creates the folder where it is missing.

        Raises:
            FileError: it cannot be made or written, or its file system has no locks.
        """
        self.root = Path(root).absolute()
        try:
            (self.root / JOBS).mkdir(parents=True, exist_ok=True)
            (self.root / DEVICES).mkdir(exist_ok=True)
        except OSError as e:
            raise FileError(
                "the jobs' folder cannot be made: {reason}", reason=explain(e)
            ) from None
        self._submissions = FileLock(self.root / "submissions.lock")
        self._submissions.is_held()  # raises where there are no locks
        self.index = JobIndex(self.root / INDEX_FILE)
        self.catalog = Catalog(self.root / JOBS, self.index)

    # --- queries ---

    def get(self, job_id: str) -> Job:
        """The job as it is now."""
        return self.catalog.read(self.catalog.find(job_id))

    def show(self, job_id: str) -> Job:
        """The job as `list` has it: a failed one where its files are damaged."""
        return self.catalog.show(self.catalog.find(job_id))

    def list(self) -> list[Job]:
        """All jobs, the oldest first; those whose files are damaged are failed ones.

        Raises:
            FileError: the folder of all jobs cannot be read.
        """
        return self.catalog.list()

    def find_same(self, key: str) -> Job | None:
        """The newest job of this key that did not fail and was not cancelled."""
        for job in reversed(self.list()):
            if job.settings.key == key and job.status not in (
                JobStatus.FAILED,
                JobStatus.CANCELLED,
            ):
                return job
        return None

    def wait(
        self,
        job_id: str,
        should_stop: Callable[[], bool] | None = None,
        notify: Callable[[Job], None] | None = None,
        timeout_s: float | None = None,
    ) -> Job:
        """Waits until the job is finished or paused.

        Args:
            should_stop: asked a few times a second; True ends the waiting, not the job.
            notify: called with the job whenever it changed.

        Returns:
            The job's last state: finished, paused, or whatever it was at the timeout.

        Raises:
            InterruptedError: `should_stop` returned True.
        """
        folder = self.catalog.find(job_id)
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        last = None
        while True:
            if should_stop is not None and should_stop():
                raise InterruptedError(
                    message(
                        "waiting for job {job_id} was stopped; the job continues", job_id=job_id
                    )
                )
            try:
                job = self.catalog.read(folder)
            except BusyFileError:
                if last is None:
                    raise
                job = last
            if job != last and notify is not None:
                notify(job)
            last = job
            if job.status.is_settled or (deadline is not None and time.monotonic() > deadline):
                return job
            time.sleep(WAIT_INTERVAL)

    def read_log(
        self, job_id: str, offset: int | None = None, limit: int = LOG_TAIL_BYTES
    ) -> dict[str, Any]:
        """A piece of the worker's log: whole lines if they are short, without absolute paths.

        Args:
            offset: first byte; None gives the last `limit` bytes.

        Returns:
            `text`, `offset` (of its first byte), `next_offset` (to ask on from), `size`.
        """
        folder = self.catalog.find(job_id)
        limit = max(1, min(limit, LOG_MAX_BYTES))
        with self.catalog.using(folder):
            try:
                with open_inside(folder.log) as file:
                    return read_piece(file, offset, limit)
            except MissingFileError:
                if not folder.path.is_dir():
                    raise
                return {"text": "", "offset": 0, "next_offset": 0, "size": 0}

    def read_metrics(self, job_id: str) -> Sequence[dict[str, Any]]:
        """One dictionary per step; see `lora_core.training.run.metrics.StepReport`."""
        folder = self.catalog.find(job_id)
        with self.catalog.using(folder):
            try:
                return list(read_metrics(folder.metrics))
            except MissingFileError:
                if not folder.path.is_dir():
                    raise
                return []

    def list_samples(self, job_id: str) -> Sequence[Path]:
        """Images and latents made during training, in the order of their steps."""
        folder = self.catalog.find(job_id)
        return [path for path in list_inside(folder.samples) if not path.name.startswith(".")]

    def list_images(self, job_id: str) -> Sequence[JobImage]:
        """Samples, and sources and targets to compare them with; empty until there are some.

        By item, then sources, target and samples, by step.
        """
        return list_images(self.catalog.find(job_id).samples)

    def read_image(self, job_id: str, name: str) -> bytes:
        """A PNG file.

        Args:
            name: one of those that `list_images` gives.

        Raises:
            UnknownImageError: it is none of them.
        """
        folder = self.catalog.find(job_id)
        with self.catalog.using(folder):
            return read_image(folder.samples, name)

    def list_adapters(self, job_id: str) -> Sequence[Path]:
        """Every adapter file of the job that is there, the finished ones last."""
        folder = self.catalog.find(job_id)
        found = [*list_inside(folder.path / ADAPTERS), *list_inside(folder.path)]
        return [path for path in found if path.suffix == ".safetensors"]

    # --- changing ---

    def submit(
        self,
        train: TrainConfig,
        *,
        key: str = "",
        **settings: Any,
    ) -> str:
        """Puts a job at the end of the queue; takes milliseconds.

        Args:
            train: `output` is replaced by the job's own folder.
            key: where there is a job of the same key that did not fail and was not cancelled, its
                id is returned and nothing is submitted.
            settings: further fields of `JobSettings`: loras, samples, niceness, max_restarts,
                origin.

        Returns:
            The job's id.

        Raises:
            ConfigError: the settings are invalid.
            FileError: the model, the training set or the loras folder is missing, or the disk does
                not take the job.
        """
        job_id = make_id()
        path = self.root / JOBS / job_id
        train = dataclasses.replace(train, output=str(path))
        wanted = build_settings(train, key=key, **settings)
        check_files(wanted)
        # Only those with a key exclude each other.
        with self._submissions.held(KEY_TIMEOUT) if key else nullcontext():
            if key and (same := self.find_same(key)) is not None:
                return same.id
            now = time.time()
            state = JobState(created_at=now, queued_at=now, num_steps=train.steps)
            write_job(path, wanted, state)
        return job_id

    def ask(self, job_id: str, event: Event) -> Job:
        """`pause`, `cancel` or `resume`: done here, or requested of the job's worker.

        Raises:
            JobStateError: it cannot be done in the job's state.
        """
        folder = self.catalog.find(job_id)
        with self.catalog.using(folder):
            has_lock = self._acquire(folder)
            try:
                before = check_allowed(self.catalog.read(folder), event)
                job = dataclasses.replace(before, request=REQUESTS[event])
                # In progress and not locked: its worker has died, and a supervisor settles that
                # before it applies the request.
                if has_lock and job.status is not JobStatus.IN_PROGRESS:
                    return self.apply_request(job, folder)
                folder.write_request(REQUESTS[event])
            finally:
                folder.lock.release()
        if before.request is job.request is Request.CANCEL and job.is_silent:
            kill(job.state.worker)
        return job

    def pause(self, job_id: str) -> Job:
        """Saves a checkpoint after the current step, then the process ends; at once if queued.

        Raises:
            JobStateError: the job is finished.
        """
        return self.ask(job_id, Event.PAUSE)

    def cancel(self, job_id: str) -> Job:
        """Saves a checkpoint and an adapter after the current step, then the process ends.

        A second request to an unresponsive worker ends its process at once; what was saved before
        is kept.

        Raises:
            JobStateError: the job is completed or failed.
        """
        return self.ask(job_id, Event.CANCEL)

    def resume(self, job_id: str) -> Job:
        """Requeues paused, failed and cancelled jobs at the end; they resume where they stopped.

        A pause or cancellation that the worker has not handled yet is withdrawn.

        Raises:
            JobStateError: the job is completed, or runs or waits anyway.
        """
        return self.ask(job_id, Event.RESUME)

    def clone(self, job_id: str, changes: Mapping[str, Any] | None = None) -> str:
        """A new job with the settings of this one but for `changes`, from the start.

        Args:
            changes: by dotted name, `{"steps": 500, "lora.rank": 8, "samples.every": 100}`: those
                of `TrainConfig`, and of `JobSettings` besides `train`.

        Returns:
            The new job's id.

        Raises:
            ConfigError: an unknown setting or a value outside its range.
        """
        settings = self.get(job_id).settings
        origin = {**settings.origin, "clone_of": job_id}
        values = change_settings(
            dataclasses.replace(settings, key="", origin=origin), changes or {}
        )
        return self.submit(config_from_dict(values.pop("train")), **values)

    def publish(self, job_id: str, adapter: str | None = None) -> tuple[str, ...]:
        """Copies an adapter of the job into its loras folder, under a name that is free there.

        Args:
            adapter: a file of `list_adapters`, by name; the latest weights if None.

        Returns:
            Names in the loras folder.

        Raises:
            ConfigError: there is no such adapter, or the job has no loras folder.
        """
        folder = self.catalog.find(job_id)
        job = self.catalog.read(folder)
        files = {path.name: path for path in self.list_adapters(job_id)}
        names = [Path(name).name for name in job.state.adapters] if adapter is None else [adapter]
        if not job.settings.loras:
            raise ConfigError("job {job_id} has no loras folder; submit it with one", job_id=job_id)
        if not names or any(name not in files for name in names):
            shown = shorten_list([shorten(name) for name in files], 2)
            raise ConfigError(
                "job {job_id} has no adapter {adapter}; it has {shown}",
                job_id=job_id,
                adapter=show(adapter or ""),
                shown=shown or "none yet",
            )
        with self.catalog.using(folder):
            published = publish([files[name] for name in names], Path(job.settings.loras), job_id)
            record_published(folder, published)
            return published

    def delete(self, job_id: str, with_adapter: bool = False) -> None:
        """Deletes the job's folder; a running job has to be paused or cancelled before.

        Args:
            with_adapter: also its copies in the loras folder, if they still are this job's.

        Raises:
            JobStateError: a worker has it.
            FileError: it cannot be deleted; or it is, and a copy in the loras folder stays.
        """
        folder = self.catalog.find(job_id)
        condemned = folder.path.with_name(f".{job_id}.{secrets.token_hex(4)}.deleted")
        settings: JobSettings | None = None
        state: JobState | None = None
        published: tuple[str, ...] = ()
        with self.catalog.using(folder):
            if not self._acquire(folder):
                raise JobStateError(
                    "job {job_id} is running; pause or cancel it first", job_id=job_id
                )
            try:
                with suppress(FileError):  # damaged: all the more reason to delete it
                    settings, state = folder.read_settings(), folder.read_state()
                    published = (*state.published, *read_published(folder))
                try:
                    rename(folder.path, condemned)
                except OSError as e:
                    raise FileError(
                        "job {job_id} cannot be deleted: {reason}", job_id=job_id, reason=explain(e)
                    ) from None
            finally:
                folder.lock.release()
        try:
            if settings is not None and state is not None and settings.loras:
                remove_unfinished(Path(settings.loras), job_id)
                if with_adapter:
                    remove_published(published, Path(settings.loras), job_id)
        finally:
            shutil.rmtree(condemned, ignore_errors=True)
            self.index.update([], [job_id])

    # --- for the supervisor ---

    def remove_leftovers(self) -> None:
        """Deletes half-submitted and half-deleted jobs of processes that were killed."""
        for path in (self.root / JOBS).glob(".*"):
            try:
                age_s = time.time() - path.stat().st_mtime
            except OSError:
                continue  # another process is deleting it
            if path.suffix == ".deleted" or (path.suffix == ".new" and age_s > LEFTOVER_AGE):
                remove_traces(path)
                shutil.rmtree(path, ignore_errors=True)

    def apply_request(self, job: Job, folder: JobFolder) -> Job:
        """Applies a request where there is no worker, unless too late; the lock is held."""
        assert job.request is not None  # callers look
        event, state = EVENTS[job.request], job.state
        if find_next(find_stage(job.status), event) is not None:
            state = advance(state, event)
        with self.catalog.using(folder):
            if state != job.state:
                folder.write_state(state)
            folder.clear_request()
        return dataclasses.replace(job, state=state, request=None)

    # --- inside ---

    def _acquire(self, folder: JobFolder) -> bool:
        """False where a worker has the job."""
        folder.check_lock()
        deadline = time.monotonic() + LOCK_TIMEOUT
        while not folder.lock.try_acquire():
            in_progress = folder.read_state().status is JobStatus.IN_PROGRESS
            if in_progress or time.monotonic() > deadline:
                return False
            time.sleep(POLL_INTERVAL)
        return True


def get_device_lock(root: Path, device_key: str) -> FileLock:
    """Held by the worker that uses the device."""
    name = "".join(c if c.isalnum() or c in "-_." else "_" for c in device_key)
    return FileLock(root / DEVICES / f"{name}.lock")
