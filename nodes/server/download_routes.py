"""HTTP: a job's files, for the user to keep: sent piece by piece, as attachments.

    GET /qwen_edit_lora/jobs/{id}/samples.zip       all images
    GET /qwen_edit_lora/jobs/{id}/log.txt           the log without this machine's paths
    GET /qwen_edit_lora/jobs/{id}/files/{name}      a LoRA file, by its listed name

A download whose file is deleted in the middle breaks off, so that a browser reports it as failed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from urllib.parse import quote

from aiohttp import web

from ...lora_core.errors import LoraError
from ...lora_core.jobs import downloads
from ...lora_core.text import shorten
from . import job_host
from .answers import guard, run

logger = logging.getLogger(__name__)


def start(routes: web.RouteTableDef, prefix: str) -> None:
    """Adds the routes.

    Args:
        prefix: of the routes of jobs.
    """
    routes.get(prefix + "/{id}/samples.zip")(guard(send_images))
    routes.get(prefix + "/{id}/log.txt")(guard(send_log))
    routes.get(prefix + "/{id}/files/{name}")(guard(send_adapter))


async def send_images(request: web.Request) -> web.StreamResponse:
    job = await run(lambda: job_host.get_jobs().store.show(request.match_info["id"]))
    pieces = await run(lambda: downloads.iterate_images(job_host.get_jobs().store, job.id))
    return await send(request, pieces, f"{job.name} samples.zip", "application/zip")


async def send_log(request: web.Request) -> web.StreamResponse:
    job = await run(lambda: job_host.get_jobs().store.show(request.match_info["id"]))
    pieces = await run(lambda: downloads.iterate_log(job_host.get_jobs().store, job.id))
    return await send(request, pieces, f"{job.name} log.txt", "text/plain; charset=utf-8")


async def send_adapter(request: web.Request) -> web.StreamResponse:
    one, name = request.match_info["id"], request.match_info["name"]
    store = job_host.get_jobs().store
    file, size = await run(lambda: downloads.open_adapter(store, one, name))
    pieces = downloads.iterate_file(file, size)
    try:
        return await send(request, pieces, name, "application/octet-stream", size)
    finally:
        file.close()


async def send(
    request: web.Request,
    pieces: Iterator[bytes],
    name: str,
    content_type: str,
    size: int | None = None,
) -> web.StreamResponse:
    """Sends the pieces, each made in a thread once the one before is on its way."""
    response = web.StreamResponse(
        headers={
            "Content-Type": content_type,
            "Content-Disposition": f"attachment; filename*=UTF-8''{quote(name, safe='')}",
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
        }
    )
    response.content_length = size
    piece = await run(lambda: next(pieces, None))  # an error here is still a plain refusal
    await response.prepare(request)
    try:
        while piece is not None and request.method != "HEAD":
            await response.write(piece)
            piece = await run(lambda: next(pieces, None))
    except LoraError as e:
        logger.warning("Qwen Edit LoRA: the download of %s ended early: %s", shorten(name), e)
        if request.transport is not None:
            request.transport.abort()
        return response
    await response.write_eof()
    return response
