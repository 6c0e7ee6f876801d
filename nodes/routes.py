"""HTTP routes and events of training jobs. The only module that imports server and aiohttp.

    GET  /qwen_edit_lora/jobs                {"jobs": [...]}
    GET  /qwen_edit_lora/jobs/{id}           the job, with its losses, samples and adapters
    GET  /qwen_edit_lora/jobs/{id}/log       ?offset=0&limit=65536; without offset the end of it
    POST /qwen_edit_lora/jobs/{id}/pause | resume | cancel | delete      with a JSON object
    GET  /qwen_edit_lora/adapters            {"adapters": [...], "pending": without a verdict yet}
    GET  /qwen_edit_lora/adapters/{id}       one, with its metadata, modules and verdict

Errors are {"error": one sentence} with 400 for a bad request, 404 for an unknown job, 409 for what
its state forbids, 500 for what the disk refuses. Paths of this machine are neither taken nor told.
The event `qwen_edit_lora.job` has a job as the list shows it, or {"id", "deleted"}, or {"warning"}.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from aiohttp import web
from server import PromptServer

from ..lora_core.errors import ConfigError, LoraError
from ..lora_core.jobs.job import JobStateError, UnknownJobError, check_id
from ..lora_core.library import library
from . import adapter_library, job_host
from .hold import HOLD_ID

PREFIX = "/qwen_edit_lora/jobs"
EVENT = "qwen_edit_lora.job"
#: Points of the loss curve that a job is shown with.
MAX_POINTS = 500
CURVES = ("step", "loss", "smoothed_loss", "learning_rate", "grad_norm")

logger = logging.getLogger(__name__)


class PromptQueue:
    """ComfyUI's queue of prompts, as `job_host.Prompts`."""

    def __init__(self, server: PromptServer):
        self.server = server

    @property
    def queue(self):
        return self.server.prompt_queue

    def request_release(self) -> None:
        self.queue.set_flag("unload_models", True)
        self.queue.set_flag("free_memory", True)

    def is_release_pending(self) -> bool:
        return "unload_models" in self.queue.get_flags(reset=False)

    def put_hold(self, prompt_id: str) -> None:
        graph = {"hold": {"class_type": HOLD_ID, "inputs": {}}}
        _, waiting = self.queue.get_current_queue_volatile()
        number = min((item[0] for item in waiting), default=0) - 1
        self.queue.put((number, prompt_id, graph, {}, ["hold"], {}))

    def has(self, prompt_id: str) -> bool:
        running, waiting = self.queue.get_current_queue_volatile()
        return any(item[1] == prompt_id for item in (*running, *waiting))


def start() -> None:
    """Starts the jobs and adds the routes; called once, when ComfyUI loads the extension."""
    server = PromptServer.instance
    job_host.start_jobs(PromptQueue(server), lambda data: server.send_sync(EVENT, data))
    server.add_on_prompt_handler(warn_of_conflict)
    server.routes.get(PREFIX)(answer(lambda request: list_jobs))
    server.routes.get(PREFIX + "/{id}")(answer(with_id(show_job)))
    server.routes.get(PREFIX + "/{id}/log")(answer(with_id(show_log)))
    for action in ACTIONS:
        server.routes.post(f"{PREFIX}/{{id}}/{action}")(act(action))
    start_adapters(server)


# --- adapters; the event has what was found out: {"adapters": [...], "gone": ids, "pending": n} ---


def start_adapters(server: PromptServer) -> None:
    event, prefix = "qwen_edit_lora.adapters", "/qwen_edit_lora/adapters"
    adapter_library.connect(
        send=lambda data: server.send_sync(event, data),
        is_busy=lambda: server.prompt_queue.get_current_queue_volatile()[0] != [],
    )

    def prepare(request: web.Request) -> Callable[[], dict[str, Any]]:
        adapter_id = library.check_id(request.match_info["id"])
        return lambda: adapter_library.show_adapter(adapter_id)

    server.routes.get(prefix)(answer(lambda request: adapter_library.list_adapters))
    server.routes.get(prefix + "/{id}")(answer(prepare))


def warn_of_conflict(prompt: dict[str, Any]) -> dict[str, Any]:
    """For every prompt that is queued; leaves it as it is."""
    try:
        sentence = job_host.get_jobs().describe_conflict()
    except LoraError:
        return prompt
    if sentence:
        logger.warning("Qwen Edit LoRA: %s.", sentence)
        PromptServer.instance.send_sync(EVENT, {"warning": sentence})
    return prompt


# --- what is answered ---


def list_jobs() -> dict[str, Any]:
    return {"jobs": [job.to_dict() for job in job_host.get_jobs().store.list()]}


def show_job(job_id: str, query: dict[str, str]) -> dict[str, Any]:
    store = job_host.get_jobs().store
    job = store.get(job_id).to_dict()
    metrics = store.read_metrics(job_id)
    every = -(-len(metrics) // MAX_POINTS) or 1
    points = metrics[::-every][::-1]  # always with the last one
    return {
        **job,
        "metrics": {name: [point.get(name) for point in points] for name in CURVES},
        "samples": [path.name for path in store.list_samples(job_id)],
        "files": [path.name for path in store.list_adapters(job_id)],
    }


def show_log(job_id: str, query: dict[str, str]) -> dict[str, Any]:
    numbers = {name: parse_number(query, name) for name in ("offset", "limit") if name in query}
    return job_host.get_jobs().store.read_log(job_id, **numbers)


def parse_number(query: dict[str, str], name: str) -> int:
    text = query[name]
    if not (text.isascii() and text.isdigit() and len(text) < 16):
        raise ConfigError(f"{name} is {text[:20]!r}; expected a whole number from 0")
    return int(text)


def delete(job_id: str, options: dict[str, Any]) -> dict[str, Any]:
    with_adapter = options.get("with_adapter", False)
    if not isinstance(with_adapter, bool):
        raise ConfigError(f"with_adapter is {with_adapter!r}; expected true or false")
    job_host.get_jobs().store.delete(job_id, with_adapter)
    return {"id": job_id, "deleted": True}


ACTIONS: dict[str, Callable[[str, dict[str, Any]], dict[str, Any]]] = {
    "pause": lambda job_id, options: job_host.get_jobs().store.pause(job_id).to_dict(),
    "resume": lambda job_id, options: job_host.get_jobs().store.resume(job_id).to_dict(),
    "cancel": lambda job_id, options: job_host.get_jobs().store.cancel(job_id).to_dict(),
    "delete": delete,
}


# --- how ---


def with_id(show: Callable[[str, dict[str, str]], dict[str, Any]]):
    def prepare(request: web.Request) -> Callable[[], dict[str, Any]]:
        job_id, query = check_id(request.match_info["id"]), dict(request.query)
        return lambda: show(job_id, query)

    return prepare


def answer(prepare: Callable[[web.Request], Callable[[], dict[str, Any]]]):
    """A handler that does its work in a thread, so that ComfyUI's loop never waits for a disk."""

    async def handle(request: web.Request) -> web.Response:
        try:
            return await respond(prepare(request))
        except LoraError as e:
            return refuse(e)

    return handle


def act(action: str):
    async def handle(request: web.Request) -> web.Response:
        try:
            job_id = check_id(request.match_info["id"])
            options = await read_options(request)
            return await respond(lambda: ACTIONS[action](job_id, options))
        except LoraError as e:
            return refuse(e)

    return handle


async def read_options(request: web.Request) -> dict[str, Any]:
    """The body. Only JSON: a form of another site's page cannot send that unasked."""
    if request.content_type != "application/json":
        raise ConfigError("expected a JSON object with Content-Type: application/json")
    try:
        options = await request.json()
    except ValueError:
        options = None
    if not isinstance(options, dict):
        raise ConfigError('the body is no JSON object; expected {} or {"with_adapter": true}')
    return options


async def respond(work: Callable[[], dict[str, Any]]) -> web.Response:
    result = await asyncio.get_running_loop().run_in_executor(None, work)
    return web.json_response(result)


def refuse(error: LoraError) -> web.Response:
    if isinstance(error, (UnknownJobError, library.UnknownAdapterError)):
        status = 404
    elif isinstance(error, JobStateError):
        status = 409
    else:
        status = 400 if isinstance(error, ConfigError) else 500
    return web.json_response({"error": " ".join(str(error).split())}, status=status)
