"""HTTP routes and events of trainings and adapters; only this module imports server and aiohttp.

    GET  /qwen_edit_lora/jobs                {"jobs": [...]}
    GET  /qwen_edit_lora/jobs/{id}           the job, with its curves, settings, adapters
    GET  /qwen_edit_lora/jobs/{id}/log       ?offset=0&limit=65536; without offset the end of it
    GET  /qwen_edit_lora/jobs/{id}/pictures/{name}                     a PNG, by its listed name
    POST /qwen_edit_lora/jobs/{id}/pause | resume | cancel | delete | clone | publish
                                             with a JSON object, see job_views.ACTIONS
    GET  /qwen_edit_lora/adapters            {"adapters": [...], "pending": without a verdict yet}
    GET  /qwen_edit_lora/adapters/{id}       one, with its metadata, modules and verdict
    POST /qwen_edit_lora/adapters/{id}/train trains it again from its metadata; the new job

Errors are {"error": one sentence} with 400 for a bad request, 403 for another site's page, 404 for
an unknown job, 409 for what its state forbids, 413 for a body too large, 500 for what the disk
refuses. Paths of this machine are neither taken nor told.
The event `qwen_edit_lora.job` has a job as the list shows it, or {"id", "deleted"}, or {"warning"};
`qwen_edit_lora.adapters` what was found out: {"adapters": [...], "gone": ids, "pending": number}.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

from aiohttp import web
from server import PromptServer

from ..lora_core.errors import ConfigError, LoraError
from ..lora_core.jobs.job import JobStateError, UnknownJobError, UnknownPictureError, check_id
from ..lora_core.library import library
from . import adapter_library, host, job_host, job_views
from .hold import HOLD_ID

PREFIX = "/qwen_edit_lora/jobs"
EVENT = "qwen_edit_lora.job"
ADAPTERS = "/qwen_edit_lora/adapters"
ADAPTERS_EVENT = "qwen_edit_lora.adapters"
MAX_BODY_BYTES = 65536
USUAL_PORTS = (80, 443)

logger = logging.getLogger(__name__)


class ForeignPageError(LoraError):
    """A page of another site asks for a change."""


class BodySizeError(LoraError):
    """The request's body is larger than any that makes sense."""


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
    server.routes.get(PREFIX)(answer(lambda request: job_views.list_jobs))
    server.routes.get(PREFIX + "/{id}")(answer(with_id(job_views.show_job)))
    server.routes.get(PREFIX + "/{id}/log")(answer(with_id(job_views.show_log)))
    server.routes.get(PREFIX + "/{id}/pictures/{name}")(send_picture)
    for action, work in job_views.ACTIONS.items():
        server.routes.post(f"{PREFIX}/{{id}}/{action}")(change(check_id, work))
    start_adapters(server)


def start_adapters(server: PromptServer) -> None:
    adapter_library.connect(
        send=lambda data: server.send_sync(ADAPTERS_EVENT, data),
        is_busy=lambda: server.prompt_queue.get_current_queue_volatile()[0] != [],
    )

    def prepare(request: web.Request) -> Callable[[], dict[str, Any]]:
        adapter_id = library.check_id(request.match_info["id"])
        return lambda: adapter_library.show_adapter(adapter_id)

    server.routes.get(ADAPTERS)(answer(lambda request: adapter_library.list_adapters))
    server.routes.get(ADAPTERS + "/{id}")(answer(prepare))
    server.routes.post(ADAPTERS + "/{id}/train")(change(library.check_id, train_again))


def train_again(adapter_id: str, options: Mapping[str, Any]) -> dict[str, Any]:
    job_id = job_host.train_again(adapter_library.find_adapter(adapter_id))
    return job_host.get(job_id).to_dict()


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


# --- how ---


def with_id(show: Callable[[str, Mapping[str, str]], dict[str, Any]]):
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


async def send_picture(request: web.Request) -> web.Response:
    try:
        job_id, name = check_id(request.match_info["id"]), request.match_info["name"]
        store = job_host.get_store()
        loop = asyncio.get_running_loop()
        body = await loop.run_in_executor(None, store.read_picture, job_id, name)
    except LoraError as e:
        return refuse(e)
    # A picture never changes: its name has the step.
    headers = {"Cache-Control": "private, max-age=86400", "X-Content-Type-Options": "nosniff"}
    return web.Response(body=body, content_type="image/png", headers=headers)


def change(
    check: Callable[[object], str], work: Callable[[str, Mapping[str, Any]], dict[str, Any]]
):
    """A handler that lets ComfyUI's own page, or a program, change something.

    Args:
        check: gives the id back, or raises ConfigError for what is none.
        work: what is done, given the id and the request's JSON object.
    """

    async def handle(request: web.Request) -> web.Response:
        try:
            check_origin(request.headers, request.host, host.get_cors_origin())
            one = check(request.match_info["id"])
            options = await read_options(request)
            return await respond(lambda: work(one, options))
        except LoraError as e:
            return refuse(e)

    return handle


def check_origin(headers: Mapping[str, str], own_host: str, allowed: str | None) -> None:
    """Raises ForeignPageError where the browser says that another site's page asks.

    ComfyUI's own check ends where the Host is no loopback address, as with --listen. What is not a
    browser sends neither header.

    Args:
        headers: Sec-Fetch-Site is the browser's own word; it is missing on plain http, where Origin
            is compared with the Host.
        allowed: the origin that --enable-cors-header names; "*" names none.
    """
    site, origin = headers.get("Sec-Fetch-Site"), headers.get("Origin")
    if origin is not None and origin == allowed:
        return
    if site is not None:
        is_own = site in ("same-origin", "none")
    else:
        is_own = origin is None or split_origin(origin) == split_origin(f"http://{own_host}")
    if not is_own:
        raise ForeignPageError(
            "this request comes from a page of another site; only ComfyUI's own page may change "
            "trainings, or the one that --enable-cors-header names"
        )


def split_origin(origin: str) -> tuple[str, int | None] | None:
    """Host and port, None for a usual one; None for "null" and other texts without a host."""
    try:
        parts = urlsplit(origin)
        port = parts.port
    except ValueError:
        return None
    # A proxy may speak https to the browser and http to us.
    return (parts.hostname, None if port in USUAL_PORTS else port) if parts.hostname else None


async def read_options(request: web.Request) -> dict[str, Any]:
    """The body. Only JSON: a form of another site's page cannot send that unasked."""
    if request.content_type != "application/json":
        raise ConfigError("expected a JSON object with Content-Type: application/json")
    if (request.content_length or 0) > MAX_BODY_BYTES:
        raise BodySizeError(f"the body is too large; expected up to {MAX_BODY_BYTES} bytes")
    body = bytearray()
    async for chunk in request.content.iter_any():  # the length may be left unsaid
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise BodySizeError(f"the body is too large; expected up to {MAX_BODY_BYTES} bytes")
    try:
        options = json.loads(body)
    except (ValueError, RecursionError):
        options = None
    if not isinstance(options, dict):
        raise ConfigError('the body is no JSON object; expected {} or {"with_adapter": true}')
    return options


async def respond(work: Callable[[], dict[str, Any]]) -> web.Response:
    result = await asyncio.get_running_loop().run_in_executor(None, work)
    return web.json_response(result)


#: The first that fits; a LoraError of another kind is the disk's.
STATUSES: tuple[tuple[type[LoraError], int], ...] = (
    (ForeignPageError, 403),
    (UnknownJobError, 404),
    (UnknownPictureError, 404),
    (library.UnknownAdapterError, 404),
    (JobStateError, 409),
    (BodySizeError, 413),
    (ConfigError, 400),
    (LoraError, 500),
)


def refuse(error: LoraError) -> web.Response:
    status = next(status for kind, status in STATUSES if isinstance(error, kind))
    return web.json_response({"error": " ".join(str(error).split())}, status=status)
