"""Training jobs inside ComfyUI: who owns the device's memory, and what prompts do meanwhile.

For nodes: `submit`, `get`, `find`, `find_same`, `wait`, and `get_store()` for everything else.
"""

from __future__ import annotations

import dataclasses
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from ...lora_core.disk.safetensors_file import SafetensorsFile
from ...lora_core.errors import ConfigError, FileError
from ...lora_core.jobs.devices import Device
from ...lora_core.jobs.job import Job, JobStatus, SampleSettings, UnknownJobError
from ...lora_core.jobs.publication import JOB_KEY
from ...lora_core.jobs.retraining import build_again
from ...lora_core.jobs.store import JobStore
from ...lora_core.jobs.supervisor import Supervisor
from ...lora_core.pairs.cache import SETS_FOLDER
from ...lora_core.pairs.vae_copy import find_vae
from ...lora_core.training.config.config import TrainConfig
from ...lora_core.training.data.dataset import read_dataset
from .. import host
from .job_devices import order_devices

HOLD_ID = "QwenEditLoraHold"

#: What ComfyUI's prompts do while a job uses the same device; the first is the default.
POLICIES = ("warn", "pause prompts", "share")
WARN, PAUSE, _ = POLICIES
POLICY_TOOLTIP = (
    "What prompts do while the training has ComfyUI's device. warn: they run alongside it, each "
    "with a warning. pause prompts: they wait until it is over or paused, or until you interrupt "
    "the waiting. share: they run alongside it without one. ComfyUI's models are released before "
    "it starts."
)
#: Key in `JobSettings.origin`.
POLICY_KEY = "prompts"
POLL_INTERVAL = 0.1  # seconds
#: Seconds after which a job that was about to start, but sent no news, is dropped.
START_TIMEOUT = 60.0

logger = logging.getLogger(__name__)


class Prompts(Protocol):
    """Interface of the server's prompt queue."""

    def request_release(self) -> None:
        """Requests that the models are unloaded as soon as no prompt runs."""

    def is_release_pending(self) -> bool: ...

    def put_hold(self, prompt_id: str) -> None:
        """Queues a prompt of the node QwenEditLoraHold ahead of all others."""

    def has(self, prompt_id: str) -> bool:
        """Whether the prompt is queued or running."""


class JobHost:
    """The store of this ComfyUI's jobs and its supervisor.

    Args:
        send: sends an event to every open page.
    """

    def __init__(self, root: Path, prompts: Prompts, send: Callable[[dict[str, Any]], None]):
        """Raises FileError if the jobs folder cannot be used."""
        self.store = JobStore(root)
        self.prompts = prompts
        self.send = send
        self.supervisor = Supervisor(self.store, order_devices(), self._prepare, self._handle_news)
        self._lock = threading.RLock()
        self._jobs: dict[str, Job] = {}
        self._starting: dict[str, float] = {}
        self._release_requested: set[str] = set()
        self._dismissed: set[str] = set()
        self._hold_id: str | None = None
        self._num_holding = 0
        self._shown: dict[str, dict[str, Any]] = {}

    def start(self) -> None:
        """Finds the jobs of earlier sessions and supervises them from now on."""
        self.supervisor.start()

    # --- for nodes ---

    def submit(
        self, train: TrainConfig, *, policy: str = WARN, key: str = "", **settings: Any
    ) -> str:
        """Like `JobStore.submit`; the finished adapter goes into ComfyUI's loras folder.

        Args:
            policy: one of POLICIES.
            key: equal for equal submissions, e.g. a hash over a node's inputs.

        Raises:
            ConfigError, FileError: as `JobStore.submit`, before anything is queued.
        """
        if policy not in POLICIES:
            raise ConfigError(f"policy is {policy!r}; expected one of {', '.join(POLICIES)}")
        settings.setdefault("loras", str(host.get_loras_folder()))
        origin = {**settings.pop("origin", {}), POLICY_KEY: policy}
        return self.store.submit(train, key=key, origin=origin, **settings)

    def wait(self, job_id: str, notify: Callable[[Job], None] | None = None) -> Job:
        """Waits inside a running node; an interrupt ends the wait, not the job.

        No other prompt runs meanwhile, so ComfyUI's models are released at once.
        """
        with self.holding():
            try:
                return self.store.wait(job_id, host.is_interrupted, notify)
            except InterruptedError:
                host.raise_if_interrupted()
                raise

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

    # --- policies ---

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

    def describe_conflict(self) -> str | None:
        """The warning for a prompt queued while a job with the policy "warn" runs, if any."""
        with self._lock:
            for job in self._jobs.values():
                if get_policy(job) == WARN and is_on(job, host.get_device_name()):
                    return (
                        f"training job {job.id} ({job.name}) uses {job.state.device} too: this "
                        "prompt and the training slow each other down and may run out of memory; "
                        "pause the job if they do"
                    )
        return None

    def _prepare(self, job: Job, device: Device) -> bool:
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

    def _handle_news(self, job_id: str, job: Job | None) -> None:
        """Handles news from the supervisor: updates what prompts do, and informs the pages."""
        with self._lock:
            if job is None:
                self._jobs.pop(job_id, None)
                self._shown.pop(job_id, None)
            else:
                self._jobs[job_id] = job
            if job is None or job.status is not JobStatus.PENDING:
                self._starting.pop(job_id, None)
                self._release_requested.discard(job_id)
            if job is None or job.status.is_finished or job.status is JobStatus.PAUSED:
                self._dismissed.discard(job_id)
            elif not self._num_holding and job_id in self.find_holders():
                self._queue_hold()  # of an earlier session
        if job is None:
            self.send({"id": job_id, "deleted": True})
            return
        shown = {k: v for k, v in job.to_dict().items() if k != "heartbeat_at"}
        if self._shown.get(job_id) != shown:
            self._shown[job_id] = shown
            self.send(shown)


def get_policy(job: Job) -> str:
    policy = job.settings.origin.get(POLICY_KEY)
    return policy if policy in POLICIES else WARN


def is_on(job: Job, device_name: str) -> bool:
    return job.status is JobStatus.IN_PROGRESS and device_name in job.state.device.split(", ")


_jobs: JobHost | None = None
_problem = "the training jobs have not been started; restart ComfyUI"


def start_jobs(prompts: Prompts, send: Callable[[dict[str, Any]], None]) -> None:
    """Creates this ComfyUI's only JobHost; if that fails, `get_jobs` raises the reason."""
    global _jobs, _problem
    try:
        _jobs = JobHost(host.get_jobs_folder(), prompts, send)
        _jobs.start()
    except FileError as e:
        _problem = str(e)
        logger.warning("Qwen Edit LoRA: no training: %s", e)


def get_jobs() -> JobHost:
    """Raises FileError with the reason if jobs cannot be stored."""
    if _jobs is None:
        raise FileError(_problem)
    return _jobs


# --- for nodes ----------------------------------------------------------------------------------


def get_store() -> JobStore:
    return get_jobs().store


def submit(
    train: TrainConfig,
    *,
    key: str = "",
    policy: str = WARN,
    sample_every: int = 0,
    sample_items: Sequence[str] = (),
    sample_vae: Path | None = None,
    **settings: Any,
) -> str:
    """Like `JobHost.submit`, with the sample settings as keyword arguments."""
    samples = {
        "every": sample_every,
        "items": list(sample_items),
        "vae": "" if sample_vae is None else str(sample_vae),
    }
    settings.setdefault("samples", samples)
    return get_jobs().submit(train, policy=policy, key=key, **settings)


def train_again(adapter_path: Path) -> str:
    """Submits the training that made a LoRA again, from the file's own metadata.

    Uses its job's other settings (samples, policy) if that job still exists, otherwise the
    defaults. The new LoRA gets an unused name.

    Args:
        adapter_path: a file in a loras folder; see `host.find_lora`.

    Returns:
        The new job's id.

    Raises:
        ConfigError: says what is missing: the settings, the base model or the training set.
        FileError: the LoRA or the training set cannot be read, or the job cannot be written.
    """
    file = SafetensorsFile(adapter_path)
    train = build_again(file.metadata, find_models, find_datasets, host.find_vaes)
    dataset = read_dataset(train.data.folder)
    try:
        old = get(file.metadata.get(JOB_KEY, ""))
    except (ConfigError, UnknownJobError, FileError):
        old = None
    if old is None:
        keys = tuple(info.key for info in dataset.items)
        samples, policy, more = SampleSettings(every=250, items=keys[:2]), WARN, {}
    else:
        settings, policy = old.settings, get_policy(old)
        samples = settings.samples
        names = ("niceness", "max_restarts", "num_devices")
        more = {name: getattr(settings, name) for name in names}
    vae = find_vae(Path(train.data.folder))
    samples = dataclasses.replace(samples, vae="" if vae is None else str(vae))
    origin = {"again": adapter_path.name}
    return get_jobs().submit(train, policy=policy, samples=samples, origin=origin, **more)


def find_models(name: str) -> list[Path]:
    """Base models with this file name, in any subfolder."""
    names = [n for n in host.list_training_bases() if Path(n.replace("\\", "/")).name == name]
    return [host.find_training_base(n) for n in names]


def find_datasets(name: str) -> list[Path]:
    """The cached training set with this name, if there is one."""
    folder = host.get_cache_folder() / "datasets" / SETS_FOLDER / name
    return [folder] if folder.is_dir() else []


def get(job_id: str) -> Job:
    return get_store().get(job_id)


def find(job_id: str) -> Job:
    """The job with this id; the newest one for an empty id.

    Raises:
        UnknownJobError, ConfigError: no such job.
    """
    if job_id.strip():
        return get(job_id.strip())
    jobs = get_store().list()
    if not jobs:
        raise UnknownJobError("there is no job yet; queue a Train Qwen Edit LoRA first")
    return jobs[-1]


def find_same(key: str) -> Job | None:
    return get_store().find_same(key)


def wait(job_id: str, notify: Callable[[Job], None] | None = None) -> Job:
    return get_jobs().wait(job_id, notify)


def describe(job: Job) -> str:
    return job.describe()


def describe_states(with_steps: bool = False) -> str:
    """A text that changes whenever a job is added, removed or changes state; a cache key."""
    try:
        jobs = get_store().list()
    except FileError as e:
        return str(e)
    return " ".join(
        f"{job.id} {job.status.value}{f' {job.state.step}' if with_steps else ''}" for job in jobs
    )
