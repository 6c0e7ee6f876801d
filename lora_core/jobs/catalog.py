"""Which jobs there are: read from memory, the index or the folders, whichever is current."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..disk.writing import explain
from ..errors import ConfigError, FileError
from ..messages import add_messages, message
from ..training.config.config_files import build, config_from_dict, config_to_dict
from .folder import CONFIG_FILE, STATE_FILE, BusyFileError, JobFolder, restore
from .index import JobIndex
from .job import (
    Job,
    JobFailure,
    JobSettings,
    JobState,
    JobStatus,
    Order,
    UnknownJobError,
    check_id,
)
from .outcomes import advance
from .publication import add_published, count_published_bytes
from .transitions import Event

logger = logging.getLogger(__name__)


class Catalog:
    """The jobs in a folder; nothing here changes one."""

    def __init__(self, folder: Path, index: JobIndex):
        self.folder = folder
        self.index = index
        self._settings: dict[str, JobSettings] = {}
        self._read_jobs: dict[str, tuple[str, Job]] = {}
        self._logged_ids: set[str] = set()

    def list(self) -> list[Job]:
        """All jobs, the oldest first.

        Every folder is one job: a failed one where its files are damaged.

        Raises:
            FileError: the folder of all jobs cannot be read.
        """
        folders = self._list_folders()
        stamps = {folder.id: read_stamp(folder) for folder in folders}
        known: dict[str, tuple[str, dict[str, Any]]] | None = None
        is_stale = any(stamps[id_] != self._read_jobs.get(id_, ("",))[0] for id_ in stamps)
        if is_stale or not self.index.is_open():
            known = self.index.read()
        jobs, changed = [], []
        for folder in folders:
            try:
                job, stamp = self._show(folder, stamps[folder.id], (known or {}).get(folder.id))
            except UnknownJobError:
                continue  # deleted meanwhile
            if stamp and known is not None and known.get(folder.id, ("",))[0] != stamp:
                changed.append((folder.id, stamp, to_row(job)))
            jobs.append(job)
        gone = (self._read_jobs.keys() | (known or {}).keys()) - stamps.keys()
        for job_id in gone:
            self._read_jobs.pop(job_id, None)
        self.index.update(changed, gone)
        return sorted(jobs, key=lambda job: (job.state.created_at, job.id))

    def show(self, folder: JobFolder) -> Job:
        """One job as `list` has it: a failed one where its files are damaged."""
        return self._show(folder, read_stamp(folder), None)[0]

    def _show(
        self, folder: JobFolder, stamp: str, row: tuple[str, dict[str, Any]] | None
    ) -> tuple[Job, str]:
        """A job with the stamp of what it was read from; "" where that is damaged or unreadable.

        Raises:
            UnknownJobError: it was deleted meanwhile.
        """
        try:
            folder.check_lock()
            job = self._recall(folder, stamp, row)
        except UnknownJobError:
            raise
        except BusyFileError as e:  # as it was when it could be read
            return self._remember(folder, row) or build_broken(folder, e.message), ""
        except FileError as e:
            return build_broken(folder, e.message), ""
        except Exception as e:
            # A fault in one folder must not hide all the others.
            sentence = message(
                "job {job_id} is damaged ({name}); delete the job",
                job_id=folder.id,
                name=type(e).__name__,
            )
            if folder.id not in self._logged_ids:
                self._logged_ids.add(folder.id)
                logger.exception("Qwen Edit LoRA: %s", sentence)
            return build_broken(folder, sentence), ""
        self._read_jobs[folder.id] = (stamp, job)
        return job, stamp

    def find(self, job_id: str) -> JobFolder:
        """Raises ConfigError for what is no id, and UnknownJobError where there is no such job."""
        path = self.folder / check_id(job_id)
        if not path.is_dir() or path.is_symlink():
            raise explain_absence(job_id)
        return JobFolder(path)

    @contextmanager
    def using(self, folder: JobFolder) -> Iterator[None]:
        """Inside the block, errors caused by the job being deleted meanwhile say so.

        Raises:
            UnknownJobError: the folder is not there any more.
            FileError: instead of any OSError, where it is.
        """
        try:
            yield
        except (FileError, OSError) as e:
            if not folder.path.is_dir():
                raise explain_absence(folder.id) from None
            if isinstance(e, FileError):
                raise
            raise FileError(
                "job {job_id} cannot be used: {reason}", job_id=folder.id, reason=explain(e)
            ) from None

    def _list_folders(self) -> Sequence[JobFolder]:
        folders = []
        try:
            names = [path.name for path in self.folder.iterdir()]
        except OSError as e:
            raise FileError(
                "the jobs' folder cannot be read: {reason}", reason=explain(e)
            ) from None
        for name in names:
            try:
                folders.append(self.find(name))
            except (ConfigError, UnknownJobError):
                continue
        return folders

    def _recall(self, folder: JobFolder, stamp: str, row: tuple[str, dict[str, Any]] | None) -> Job:
        """A job from memory, the index or its folder: whatever is as new as its state.json."""
        read_at, job = self._read_jobs.get(folder.id, ("", None))
        if stamp and read_at == stamp and job is not None:
            asked = folder.read_request(), read_orders(folder, job.state)
            return dataclasses.replace(job, request=asked[0], orders=asked[1])
        if stamp and row is not None and row[0] == stamp:
            try:
                return from_row(folder, row[1])
            except (LookupError, TypeError, ValueError):
                pass  # of another version
        return self.read(folder)

    def _remember(self, folder: JobFolder, row: tuple[str, dict[str, Any]] | None) -> Job | None:
        """A job from memory or the index, however old."""
        if folder.id in self._read_jobs:
            return self._read_jobs[folder.id][1]
        try:
            return None if row is None else from_row(folder, row[1])
        except (LookupError, TypeError, ValueError):
            return None

    def read(self, folder: JobFolder) -> Job:
        """The job as it is now."""
        settings = self._settings.get(folder.id)
        with self.using(folder):
            folder.check_lock()
            if settings is None:
                settings = self._settings[folder.id] = folder.read_settings()
            state = add_published(folder.read_state(), folder)
            orders = read_orders(folder, state)
            return Job(folder.id, settings, state, folder.read_request(), orders)


def read_orders(folder: JobFolder, state: JobState) -> tuple[Order, ...]:
    """Only a running job has any; for the others, which may be hundreds, no file is looked for."""
    return folder.read_orders() if state.status is JobStatus.IN_PROGRESS else ()


def explain_absence(job_id: str) -> UnknownJobError:
    return UnknownJobError("there is no job {job_id}; it may have been deleted", job_id=job_id)


def read_stamp(folder: JobFolder) -> str:
    """Changes with state.json, config.json and what was published; "" if a file is missing."""
    try:
        found = [os.stat(folder.path / name) for name in (STATE_FILE, CONFIG_FILE)]  # noqa: PTH116
    except OSError:
        return ""
    found_texts = [f"{one.st_mtime_ns} {one.st_ino} {one.st_size}" for one in found]
    return " ".join([*found_texts, str(count_published_bytes(folder))])


def to_row(job: Job) -> dict[str, Any]:
    settings = config_to_dict(job.settings)
    return {"settings": settings, "state": add_messages(dataclasses.asdict(job.state))}


def from_row(folder: JobFolder, row: Mapping[str, Any]) -> Job:
    state = restore(JobState, row["state"])
    settings = build(JobSettings, row["settings"], "")
    return Job(folder.id, settings, state, folder.read_request(), read_orders(folder, state))


def build_broken(folder: JobFolder, sentence: str) -> Job:
    """In the place of a job whose files cannot be read."""
    try:
        created = folder.path.stat().st_mtime
    except OSError:  # deleted meanwhile
        created = 0.0
    train = config_from_dict(
        {
            "name": folder.id,
            "output": str(folder.path),
            "model": {"source": "unknown"},
            "data": {"folder": "unknown"},
        }
    )
    failure = JobFailure(sentence=sentence, advice=(message("delete the job"),))
    state = advance(JobState(created_at=created), Event.FAIL, failure=failure, at=created)
    return Job(folder.id, JobSettings(train=train), state, is_damaged=True)
