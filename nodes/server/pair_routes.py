"""HTTP routes of sets of image pairs, which the page shows and edits.

    GET  /qwen_edit_lora/pairs                      {"sets": [...]}
    POST /qwen_edit_lora/pairs                      {"name"}: a new set; the set as listed
    GET  /qwen_edit_lora/pairs/{id}                 the set with its pairs
    GET  /qwen_edit_lora/pairs/{id}/{pair}/images/{slot}    ?side=384; a JPEG. Slot 0 is the target
    GET  /qwen_edit_lora/pairs/{id}/{pair}/findings {"findings": [...]}, of this pair alone
    POST /qwen_edit_lora/pairs/{id}/images          ?name=a.png&slot=0&pair=; the file as the body
    POST /qwen_edit_lora/pairs/{id}/captions        {"fill"} for all without one, or {"trigger"}
    POST /qwen_edit_lora/pairs/{id}/restore         {"removed": token}
    POST /qwen_edit_lora/pairs/{id}/{pair}/caption  {"caption", "before"}
    POST /qwen_edit_lora/pairs/{id}/{pair}/remove   {}; {"removed": token}
    GET  /qwen_edit_lora/pair_cache                 the size of all encoded pairs
    POST /qwen_edit_lora/pair_cache/clean           {}: removes those that no training uses

Ids stand for names below ComfyUI's datasets and input folders. Errors are as in `answers`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from aiohttp import web

from ...lora_core.disk.writing import explain
from ...lora_core.errors import ConfigError, FileError
from ...lora_core.text import shorten
from .. import host
from ..datasets import pair_changes, pair_views
from ..datasets.pair_sets import check_id
from . import pair_cache
from .answers import BodySizeError, Handler, answer, change, guard, read_options, respond, run
from .job_views import parse_number
from .origins import check_origin

PREFIX = "/qwen_edit_lora/pairs"
CACHE = "/qwen_edit_lora/pair_cache"
MAX_UPLOAD_BYTES = 100_000_000  # ComfyUI's own default
MAX_NAME = 400  # characters of a file's name in a query
#: Of an upload. A form of another site's page can send none of these without a preflight.
UPLOAD_TYPE = "application/octet-stream"
#: An image's URL changes with it: by its file's version, or by the step in its name.
IMAGE_HEADERS = {"Cache-Control": "private, max-age=86400", "X-Content-Type-Options": "nosniff"}

Options = Mapping[str, Any]


def start(routes: web.RouteTableDef, is_busy: Callable[[], bool]) -> None:
    """Adds the routes.

    Args:
        is_busy: whether a prompt is running; the cache is not cleaned meanwhile.
    """
    routes.get(PREFIX)(answer(lambda _, query: pair_views.list_sets()))
    routes.post(PREFIX)(guard(create))
    routes.get(PREFIX + "/{id}")(answer(show_set))
    routes.get(PREFIX + "/{id}/{pair}/images/{slot}")(guard(send_thumbnail))
    routes.get(PREFIX + "/{id}/{pair}/findings")(guard(show_findings))
    routes.post(PREFIX + "/{id}/images")(guard(receive_image))
    routes.post(PREFIX + "/{id}/captions")(change(change_captions))
    routes.post(PREFIX + "/{id}/restore")(change(restore))
    routes.post(PREFIX + "/{id}/{pair}/caption")(change_pair(set_caption))
    routes.post(PREFIX + "/{id}/{pair}/remove")(change_pair(remove))

    async def clean(request: web.Request) -> web.Response:
        check_origin(request.headers, request.host, host.get_cors_origin())
        await read_options(request)
        return await respond(lambda: pair_cache.clean_cache(is_busy()))

    routes.get(CACHE)(answer(lambda _, query: pair_cache.measure_cache()))
    routes.post(CACHE + "/clean")(guard(clean))


# --- reading --------------------------------------------------------------------------------------


def show_set(set_id: str, query: Mapping[str, str]) -> dict[str, Any]:
    return pair_views.show_set(check_id(set_id))


async def show_findings(request: web.Request) -> web.Response:
    ids = check_id(request.match_info["id"]), check_id(request.match_info["pair"])
    return await respond(lambda: pair_views.show_findings(*ids))


async def send_thumbnail(request: web.Request) -> web.Response:
    ids = check_id(request.match_info["id"]), check_id(request.match_info["pair"])
    slot = parse_number(request.match_info, "slot")
    query = {"side": str(pair_views.THUMBNAIL_SIDES[0]), **request.query}
    side = parse_number(query, "side")
    body = await run(lambda: pair_views.read_thumbnail(*ids, slot, side))
    return web.Response(body=body, content_type="image/jpeg", headers=IMAGE_HEADERS)


# --- changing -------------------------------------------------------------------------------------


def change_pair(work: Callable[[str, str, Options], dict[str, Any]]) -> Handler:
    """As `answers.change`, for a pair."""

    async def handle(request: web.Request) -> web.Response:
        check_origin(request.headers, request.host, host.get_cors_origin())
        ids = check_id(request.match_info["id"]), check_id(request.match_info["pair"])
        options = await read_options(request)
        return await respond(lambda: work(*ids, options))

    return guard(handle)


async def create(request: web.Request) -> web.Response:
    check_origin(request.headers, request.host, host.get_cors_origin())
    name = get_text(await read_options(request), "name")
    return await respond(lambda: pair_changes.create(name))


def set_caption(set_id: str, pair_id: str, options: Options) -> dict[str, Any]:
    before = None if options.get("before") is None else get_text(options, "before")
    return pair_changes.set_caption(set_id, pair_id, get_text(options, "caption"), before)


def change_captions(set_id: str, options: Options) -> dict[str, Any]:
    if ("fill" in options) == ("trigger" in options):
        raise ConfigError("expected either fill or trigger")
    texts = {name: get_text(options, name) for name in ("fill", "trigger") if name in options}
    return pair_changes.change_captions(check_id(set_id), texts.get("fill"), texts.get("trigger"))


def remove(set_id: str, pair_id: str, options: Options) -> dict[str, Any]:
    return pair_changes.remove(set_id, pair_id)


def restore(set_id: str, options: Options) -> dict[str, Any]:
    return pair_changes.restore(check_id(set_id), get_text(options, "removed"))


async def receive_image(request: web.Request) -> web.Response:
    check_origin(request.headers, request.host, host.get_cors_origin())
    set_id = check_id(request.match_info["id"])
    # aiohttp takes a missing header for this type, and a form can leave the header away.
    if "Content-Type" not in request.headers or request.content_type != UPLOAD_TYPE:
        raise ConfigError(
            "expected an image file with Content-Type: {upload_type}", upload_type=UPLOAD_TYPE
        )
    name, pair_id = request.query.get("name", ""), request.query.get("pair", "")
    if not 0 < len(name) <= MAX_NAME:
        raise ConfigError(
            "the name has {length} characters; expected a file name of 1 to {max_name}",
            length=len(name),
            max_name=MAX_NAME,
        )
    slot = parse_number({"slot": "", **request.query}, "slot")
    if pair_id:
        check_id(pair_id)
    with await run(lambda: pair_changes.Upload(set_id)) as upload:
        await receive(request, upload.path)
        return await respond(
            lambda: pair_changes.take_upload(set_id, upload.path, name, slot, pair_id)
        )


async def receive(request: web.Request, path: Path) -> None:
    """Writes the body into a new file.

    Raises:
        BodySizeError: it is larger than MAX_UPLOAD_BYTES.
        ConfigError: it broke off.
        FileError: the disk does not take it.
    """
    too_large = BodySizeError(
        "the file is too large; expected up to {max_upload_bytes} MB. Scale it down",
        max_upload_bytes=MAX_UPLOAD_BYTES // 10**6,
    )
    if (request.content_length or 0) > MAX_UPLOAD_BYTES:
        raise too_large
    size = 0
    try:
        with await run(lambda: path.open("xb")) as file:
            async for chunk in request.content.iter_chunked(1 << 20):
                size += len(chunk)
                if size > MAX_UPLOAD_BYTES:
                    raise too_large
                await run(partial(file.write, chunk))
    except web.RequestPayloadError:
        raise ConfigError("the body ended early; send it again") from None
    except ConnectionError:  # the client disconnected
        raise ConfigError("the body ended early; send it again") from None
    except OSError as e:
        raise FileError("the upload cannot be written: {reason}.", reason=explain(e)) from None


def get_text(options: Options, name: str) -> str:
    value = options.get(name)
    if not isinstance(value, str):
        raise ConfigError(
            "{name} is {value}; expected a text", name=name, value=shorten(repr(value))
        )
    return value
