"""The training jobs of this ComfyUI: `get_jobs` gives them to nodes and routes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...lora_core.errors import ConfigError, FileError
from ...lora_core.jobs.job import Job, UnknownJobError
from ...lora_core.jobs.store import JobStore
from ...lora_core.jobs.supervisor import Supervisor
from ...lora_core.messages import message
from ...lora_core.training.config.config import TrainConfig
from .. import host
from .job_devices import order_devices
from .prompt_policy import POLICIES, POLICY_KEY, WARN, PromptPolicy, Prompts

logger = logging.getLogger(__name__)


class JobHost:
    """The store of this ComfyUI's jobs, its supervisor, and its policy towards prompts.

    Args:
        send: sends an event to every open page.
    """

    def __init__(self, root: Path, prompts: Prompts, send: Callable[[dict[str, Any]], None]):
        """Raises FileError if the jobs folder cannot be used."""
        self.store = JobStore(root)
        self.policy = PromptPolicy(prompts)
        self.send = send
        self.supervisor = Supervisor(
            self.store, order_devices(), self.policy.prepare, self._handle_news
        )
        self._shown: dict[str, dict[str, Any]] = {}

    def start(self) -> None:
        """Finds the jobs of earlier sessions and supervises them from now on."""
        self.supervisor.start()

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
            raise ConfigError(
                "policy is {policy!r}; expected one of {policies}",
                policy=policy,
                policies=", ".join(POLICIES),
            )
        settings.setdefault("loras", str(host.get_loras_folder()))
        origin = {**settings.pop("origin", {}), POLICY_KEY: policy}
        return self.store.submit(train, key=key, origin=origin, **settings)

    def wait(self, job_id: str, notify: Callable[[Job], None] | None = None) -> Job:
        """Waits inside a running node; an interrupt ends the wait, not the job.

        No other prompt runs meanwhile, so ComfyUI's models are released at once.
        """
        with self.policy.holding():
            try:
                return self.store.wait(job_id, host.is_interrupted, notify)
            except InterruptedError:
                host.raise_if_interrupted()
                raise

    def find(self, job_id: str) -> Job:
        """The job with this id; the newest one for an empty id.

        Raises:
            UnknownJobError, ConfigError: no such job.
        """
        if job_id.strip():
            return self.store.get(job_id.strip())
        jobs = self.store.list()
        if not jobs:
            raise UnknownJobError("there is no job yet; queue a Train Qwen Edit LoRA first")
        return jobs[-1]

    def _handle_news(self, job_id: str, job: Job | None) -> None:
        """Handles news from the supervisor: updates what prompts do, and informs the pages."""
        self.policy.follow(job_id, job)
        if job is None:
            self._shown.pop(job_id, None)
            self.send({"id": job_id, "deleted": True})
            return
        shown = {k: v for k, v in job.to_dict().items() if k != "heartbeat_at"}
        if self._shown.get(job_id) != shown:
            self._shown[job_id] = shown
            self.send(shown)


_jobs: JobHost | None = None
_problem = message("the training jobs have not been started; restart ComfyUI")


def start_jobs(prompts: Prompts, send: Callable[[dict[str, Any]], None]) -> None:
    """Creates this ComfyUI's only JobHost; if that fails, `get_jobs` raises the reason."""
    global _jobs, _problem
    try:
        _jobs = JobHost(host.get_jobs_folder(), prompts, send)
        _jobs.start()
    except FileError as e:
        _problem = e.message
        logger.warning("Qwen Edit LoRA: no training: %s", e)


def get_jobs() -> JobHost:
    """Raises FileError with the reason if jobs cannot be stored."""
    if _jobs is None:
        raise FileError(_problem)
    return _jobs


def describe_states(with_steps: bool = False) -> str:
    """A text that changes whenever a job is added, removed or changes state; a cache key."""
    try:
        jobs = get_jobs().store.list()
    except FileError as e:
        return e.message
    return " ".join(
        f"{job.id} {job.status.value}{f' {job.state.step}' if with_steps else ''}" for job in jobs
    )
