"""HTTP routes and events of trainings and adapters; only this module imports server and aiohttp.

    GET  /qwen_edit_lora/jobs                {"jobs": [...]}
    GET  /qwen_edit_lora/jobs/{id}           the job, with its curves, settings, adapters
    GET  /qwen_edit_lora/jobs/{id}/log       ?offset=0&limit=65536: lines; without offset the end
    GET  /qwen_edit_lora/jobs/{id}/pictures/{name}                     a PNG, by its listed name
    POST /qwen_edit_lora/jobs/{id}/pause | resume | cancel | delete | clone | publish
                                             with a JSON object, see job_views.ACTIONS; a job's
                                             "actions" are those that make sense now
    GET  /qwen_edit_lora/adapters            {"adapters": [...], "pending": without a verdict yet}
    GET  /qwen_edit_lora/adapters/{id}       one, with its metadata, modules and verdict
    POST /qwen_edit_lora/adapters/{id}/train trains it again from its metadata; the new job

Errors are {"error": one sentence} with 400 for a bad request, 403 for another site's page or name,
404 for an unknown job, 409 for what its state forbids, 413 for a body too large, 500 for disk
errors. Paths of this machine are neither accepted nor revealed.
The event `qwen_edit_lora.job` has a job as the list shows it, or {"id", "deleted"}, or {"warning"};
`qwen_edit_lora.adapters` has new results: {"adapters": [...], "gone": ids, "pending": number}.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

from aiohttp import web
from server import PromptServer

from ...lora_core.disk.json_reader import parse_object
from ...lora_core.disk.plain_json import drop_non_finite, write_json
from ...lora_core.errors import ConfigError, FileError, LoraError, MissingFileError
from ...lora_core.jobs.job import JobStateError, UnknownImageError, UnknownJobError
from ...lora_core.library import library
from ...lora_core.text import shorten
from .. import host
from . import adapter_library, job_host, job_views, repeated_training
from .origins import ForeignPageError, check_host, check_origin
from .prompt_policy import HOLD_ID

PREFIX = "/qwen_edit_lora/jobs"
EVENT = "qwen_edit_lora.job"
ADAPTERS = "/qwen_edit_lora/adapters"
ADAPTERS_EVENT = "qwen_edit_lora.adapters"
MAX_BODY_BYTES = 65536
#: Maximum length of an error message.
MAX_MESSAGE = 400

T = TypeVar("T")

logger = logging.getLogger(__name__)


class BodySizeError(LoraError):
    """The request body is larger than any valid one."""


class UnreadBodyError(ConfigError):
    """The request body cannot be read; what follows it on the connection neither."""


class PromptQueue:
    """ComfyUI's prompt queue, as `prompt_policy.Prompts`."""

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
    host.connect_queue(server.prompt_queue)
    job_host.start_jobs(PromptQueue(server), lambda data: send(server, EVENT, data))
    server.add_on_prompt_handler(warn_of_conflict)
    server.routes.get(PREFIX)(answer(lambda _, query: job_views.list_jobs()))
    server.routes.get(PREFIX + "/{id}")(answer(job_views.show_job))
    server.routes.get(PREFIX + "/{id}/log")(answer(job_views.show_log))
    server.routes.get(PREFIX + "/{id}/pictures/{name}")(guard(send_image))
    for action, work in job_views.ACTIONS.items():
        server.routes.post(f"{PREFIX}/{{id}}/{action}")(change(work))
    start_adapters(server)


def start_adapters(server: PromptServer) -> None:
    adapter_library.connect(
        send=lambda data: send(server, ADAPTERS_EVENT, data),
        is_busy=lambda: server.prompt_queue.get_current_queue_volatile()[0] != [],
    )

    server.routes.get(ADAPTERS)(answer(lambda _, query: adapter_library.list_adapters()))
    server.routes.get(ADAPTERS + "/{id}")(answer(lambda one, _: adapter_library.show_adapter(one)))
    server.routes.post(ADAPTERS + "/{id}/train")(change(train_again))


def send(server: PromptServer, event: str, data: dict[str, Any]) -> None:
    """Sends an event to every open page."""
    server.send_sync(event, drop_non_finite(data))


def train_again(adapter_id: str, options: Mapping[str, Any]) -> dict[str, Any]:
    path = adapter_library.find_adapter(adapter_id)
    return job_host.get_jobs().store.get(repeated_training.train_again(path)).to_dict()


def warn_of_conflict(prompt: dict[str, Any]) -> dict[str, Any]:
    """Called for every queued prompt; returns it unchanged."""
    try:
        warning = job_host.get_jobs().policy.describe_conflict()
    except LoraError:
        return prompt
    if warning:
        logger.warning("Qwen Edit LoRA: %s.", warning)
        PromptServer.instance.send_sync(EVENT, {"warning": warning})
    return prompt


# --- how ---


Handler = Callable[[web.Request], Awaitable[web.Response]]


def guard(handle: Handler) -> Handler:
    """Wraps a handler to accept only requests by a name of this server; refuses with a message."""

    async def guarded(request: web.Request) -> web.Response:
        try:
            given = request.headers.get("Host")
            check_host(given, host.get_listen_addresses(), host.get_cors_origin())
            return await handle(request)
        except LoraError as e:
            return refuse(e)

    return guarded


def answer(show: Callable[[str, Mapping[str, str]], dict[str, Any]]) -> Handler:
    """A handler that shows something.

    Args:
        show: called with the path's id, "" if it has none, and the query.
    """

    async def handle(request: web.Request) -> web.Response:
        one, query = request.match_info.get("id", ""), dict(request.query)
        return respond(await run(lambda: show(one, query)))

    return guard(handle)


async def run(work: Callable[[], T]) -> T:
    """Runs in a thread, so that ComfyUI's event loop never waits for the disk."""
    return await asyncio.get_running_loop().run_in_executor(None, work)


async def send_image(request: web.Request) -> web.Response:
    one, name = request.match_info["id"], request.match_info["name"]
    body = await run(lambda: job_host.get_jobs().store.read_image(one, name))
    # An image never changes: its name has the step.
    headers = {"Cache-Control": "private, max-age=86400", "X-Content-Type-Options": "nosniff"}
    return web.Response(body=body, content_type="image/png", headers=headers)


def change(work: Callable[[str, Mapping[str, Any]], dict[str, Any]]) -> Handler:
    """A handler for a change requested by ComfyUI's own page, or by a program.

    Args:
        work: the action, called with the path's id and the request's JSON object.
    """

    async def handle(request: web.Request) -> web.Response:
        check_origin(request.headers, request.host, host.get_cors_origin())
        one, options = request.match_info["id"], await read_options(request)
        return respond(await run(lambda: work(one, options)))

    return guard(handle)


async def read_options(request: web.Request) -> dict[str, Any]:
    """The request's body. Only JSON: another site's form cannot send that without a preflight."""
    if request.content_type != "application/json":
        raise ConfigError("expected a JSON object with Content-Type: application/json")
    if (request.content_length or 0) > MAX_BODY_BYTES:
        raise BodySizeError(f"the body is too large; expected up to {MAX_BODY_BYTES} bytes")
    body, is_whole = bytearray(), True
    try:
        async for chunk in request.content.iter_any():  # Content-Length may be missing
            body += chunk
            if len(body) > MAX_BODY_BYTES:
                raise BodySizeError(f"the body is too large; expected up to {MAX_BODY_BYTES} bytes")
    except (OSError, web.RequestPayloadError):
        # The client disconnected, or sent invalid chunks, or no gzip where it said so. aiohttp
        # would read on after the answer, and log the same error with a traceback.
        request.content.feed_eof()
        is_whole = False
    encoding = request.headers.get("Content-Encoding", "identity")
    if encoding.strip().lower() != "identity":
        raise UnreadBodyError(
            f"the body has Content-Encoding {shorten(encoding)}; expected JSON without one"
        )
    if not is_whole:
        raise UnreadBodyError("the body ended early; send it again")
    try:
        return parse_object(bytes(body), "the body")
    except FileError as e:
        raise ConfigError(str(e)) from None


def respond(result: dict[str, Any]) -> web.Response:
    return web.json_response(result, dumps=write_json)


#: The first match counts; any other LoraError is a disk error.
STATUSES: tuple[tuple[type[LoraError], int], ...] = (
    (ForeignPageError, 403),
    (UnknownJobError, 404),
    (UnknownImageError, 404),
    (library.UnknownAdapterError, 404),
    (MissingFileError, 404),
    (JobStateError, 409),
    (BodySizeError, 413),
    (ConfigError, 400),
    (LoraError, 500),
)


def refuse(error: LoraError) -> web.Response:
    status = next(status for kind, status in STATUSES if isinstance(error, kind))
    message = shorten(" ".join(str(error).split()), MAX_MESSAGE)
    # ComfyUI lets a browser keep any answer for a name that ends in .png, a refusal too.
    headers = {"Cache-Control": "no-store"}
    response = web.json_response({"error": message}, status=status, headers=headers)
    if isinstance(error, UnreadBodyError):
        response.force_close()
    return response
