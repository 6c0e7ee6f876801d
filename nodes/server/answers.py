"""How our HTTP routes check requests and answer them; no route is defined here.

Errors are {"error": one sentence} with 400 for a bad request, 403 for another site's page or name,
404 for what is unknown, 409 for what the present state or damaged
files forbid, 413 for a body too large, 500 for
disk errors. Paths of this machine are neither accepted nor revealed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

from aiohttp import web

from ...lora_core.disk.json_reader import parse_object
from ...lora_core.disk.plain_json import write_json
from ...lora_core.errors import ConfigError, FileError, LoraError, MissingFileError
from ...lora_core.jobs.folder import DamagedJobError
from ...lora_core.jobs.job import JobStateError, UnknownFileError, UnknownJobError
from ...lora_core.library import library
from ...lora_core.pairs.pair_set import PairConflictError, UnknownPairError
from ...lora_core.text import shorten
from ...lora_core.translation import translate_all
from .. import host
from .origins import ForeignPageError, check_host, check_origin

MAX_BODY_BYTES = 65536
#: Maximum length of an error message.
MAX_MESSAGE = 400

T = TypeVar("T")


class BodySizeError(LoraError):
    """The request body is larger than any valid one."""


class UnreadBodyError(ConfigError):
    """The request body cannot be read; what follows it on the connection neither."""


Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def guard(handle: Handler) -> Handler:
    """Wraps a handler to accept only requests by a name of this server; refuses with a message."""

    async def guarded(request: web.Request) -> web.StreamResponse:
        try:
            host.use_page_language(request.headers)
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
        return await respond(lambda: show(one, query))

    return guard(handle)


async def run(work: Callable[[], T]) -> T:
    """Runs in a thread, so that ComfyUI's event loop never waits for the disk."""
    return await asyncio.get_running_loop().run_in_executor(None, work)


def change(work: Callable[[str, Mapping[str, Any]], dict[str, Any]]) -> Handler:
    """A handler for a change requested by ComfyUI's own page, or by a program.

    Args:
        work: the action, called with the path's id and the request's JSON object.
    """

    async def handle(request: web.Request) -> web.Response:
        check_origin(request.headers, request.host, host.get_cors_origin())
        one, options = request.match_info["id"], await read_options(request)
        return await respond(lambda: work(one, options))

    return guard(handle)


async def read_options(request: web.Request) -> dict[str, Any]:
    """The request's body. Only JSON: another site's form cannot send that without a preflight."""
    if request.content_type != "application/json":
        raise ConfigError("expected a JSON object with Content-Type: application/json")
    if (request.content_length or 0) > MAX_BODY_BYTES:
        raise BodySizeError(
            "the body is too large; expected up to {max_body_bytes} bytes",
            max_body_bytes=MAX_BODY_BYTES,
        )
    body, is_whole = bytearray(), True
    try:
        async for chunk in request.content.iter_any():  # Content-Length may be missing
            body += chunk
            if len(body) > MAX_BODY_BYTES:
                raise BodySizeError(
                    "the body is too large; expected up to {max_body_bytes} bytes",
                    max_body_bytes=MAX_BODY_BYTES,
                )
    except (OSError, web.RequestPayloadError):
        # The client disconnected, or sent invalid chunks, or no gzip where it said so. aiohttp
        # would read on after the answer, and log the same error with a traceback.
        request.content.feed_eof()
        is_whole = False
    encoding = request.headers.get("Content-Encoding", "identity")
    if encoding.strip().lower() != "identity":
        raise UnreadBodyError(
            "the body has Content-Encoding {encoding}; expected JSON without one",
            encoding=shorten(encoding),
        )
    if not is_whole:
        raise UnreadBodyError("the body ended early; send it again")
    try:
        return parse_object(bytes(body), "the body")
    except FileError as e:
        raise ConfigError(e) from None


async def respond(work: Callable[[], dict[str, Any]]) -> web.Response:
    """What `work` gives, in the language of the page that asked."""
    language = host.get_language()
    result = await run(lambda: translate_all(work(), language))
    return web.json_response(result, dumps=write_json)


#: The first match counts; any other LoraError is a disk error.
STATUSES: tuple[tuple[type[LoraError], int], ...] = (
    (ForeignPageError, 403),
    (UnknownJobError, 404),
    (UnknownFileError, 404),
    (library.UnknownAdapterError, 404),
    (UnknownPairError, 404),
    (MissingFileError, 404),
    (JobStateError, 409),
    (DamagedJobError, 409),
    (PairConflictError, 409),
    (BodySizeError, 413),
    (ConfigError, 400),
    (LoraError, 500),
)


def refuse(error: LoraError) -> web.Response:
    status = next(status for kind, status in STATUSES if isinstance(error, kind))
    text = host.translate(error.message)
    message = shorten(" ".join(text.split()), MAX_MESSAGE)
    # ComfyUI lets a browser keep any answer for a name that ends in .png, a refusal too.
    headers = {"Cache-Control": "no-store"}
    response = web.json_response({"error": message}, status=status, headers=headers)
    if isinstance(error, UnreadBodyError):
        response.force_close()
    return response
