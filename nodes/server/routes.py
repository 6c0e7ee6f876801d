"""HTTP routes and events of trainings and adapters; those of pairs are in `pair_routes`.

    GET  /qwen_edit_lora/jobs                {"jobs": [...], "measuring": [...]}
    GET  /qwen_edit_lora/jobs/{id}           the job, with its curves, settings, adapters
    GET  /qwen_edit_lora/jobs/{id}/log       ?offset=0&limit=65536: lines; without offset the end
    GET  /qwen_edit_lora/jobs/{id}/pictures/{name}                     a PNG, by its listed name
    GET  /qwen_edit_lora/jobs/{id}/...       downloads, see download_routes
    POST /qwen_edit_lora/jobs/{id}/pause | resume | cancel | sample | save | delete | clone
                                             | publish
                                             with a JSON object, see job_views.ACTIONS; a job's
                                             "actions" are those that make sense now
    GET  /qwen_edit_lora/adapters            {"adapters": [...], "pending": without a verdict yet}
    GET  /qwen_edit_lora/adapters/{id}       one, with its metadata, modules and verdict
    GET  /qwen_edit_lora/adapters/{id}/preview         a JPEG, where its "preview" is not empty
    POST /qwen_edit_lora/adapters/{id}/favourite       {"favourite": true or false}; the adapter
    POST /qwen_edit_lora/adapters/{id}/train trains it again from its metadata; the new job

Errors are as in `answers`.
The event `qwen_edit_lora.job` has a job as the list shows it, or {"id", "deleted"}, or {"warning"},
or {"measuring": what is measured for a training that does not exist yet};
`qwen_edit_lora.adapters` has new results: {"adapters": [...], "gone": ids, "pending": number};
`qwen_edit_lora.finding` is for a node that ran before: {"node", "source", "finding" or null}.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from aiohttp import web
from server import PromptServer

from ...lora_core.disk.plain_json import drop_non_finite
from ...lora_core.errors import LoraError
from .. import host
from . import (
    adapter_library,
    download_routes,
    job_host,
    job_views,
    measurements,
    pair_routes,
    repeated_training,
)
from .answers import answer, change, guard, run
from .prompt_policy import HOLD_ID

PREFIX = "/qwen_edit_lora/jobs"
EVENT = "qwen_edit_lora.job"
ADAPTERS = "/qwen_edit_lora/adapters"
ADAPTERS_EVENT = "qwen_edit_lora.adapters"

logger = logging.getLogger(__name__)


class PromptQueue:
    """ComfyUI's prompt queue, as `prompt_policy.Prompts`."""

    def __init__(self, server: PromptServer):
        self.server = server

    @property
    def queue(self) -> Any:
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
    host.connect_events(lambda event, data: send(server, event, data))
    job_host.start_jobs(PromptQueue(server), lambda data: send(server, EVENT, data))
    server.add_on_prompt_handler(warn_of_conflict)
    server.routes.get(PREFIX)(answer(lambda _, query: job_views.list_jobs()))
    server.routes.get(PREFIX + "/{id}")(answer(job_views.show_job))
    server.routes.get(PREFIX + "/{id}/log")(answer(job_views.show_log))
    server.routes.get(PREFIX + "/{id}/pictures/{name}")(guard(send_image))
    for action, work in job_views.ACTIONS.items():
        server.routes.post(f"{PREFIX}/{{id}}/{action}")(change(work))
    download_routes.start(server.routes, PREFIX)
    measurements.connect(lambda data: send(server, EVENT, data))
    start_adapters(server)
    pair_routes.start(server.routes, lambda: is_busy(server))


def is_busy(server: PromptServer) -> bool:
    """Whether a prompt is running."""
    return server.prompt_queue.get_current_queue_volatile()[0] != []


def start_adapters(server: PromptServer) -> None:
    adapter_library.connect(
        send=lambda data: send(server, ADAPTERS_EVENT, data),
        is_busy=lambda: is_busy(server),
    )

    server.routes.get(ADAPTERS)(answer(lambda _, query: adapter_library.list_adapters()))
    server.routes.get(ADAPTERS + "/{id}")(answer(lambda one, _: adapter_library.show_adapter(one)))
    server.routes.get(ADAPTERS + "/{id}/preview")(guard(send_preview))
    server.routes.post(ADAPTERS + "/{id}/train")(change(train_again))
    server.routes.post(ADAPTERS + "/{id}/favourite")(change(adapter_library.set_favourite))


def send(server: PromptServer, event: str, data: dict[str, Any]) -> None:
    """Sends an event to every open page; to none while ComfyUI stops."""
    if not server.loop.is_closed():  # whoever reports, such as a sampling, must not fail of it
        server.send_sync(event, drop_non_finite(host.translate(data)))


def train_again(adapter_id: str, options: Mapping[str, Any]) -> dict[str, Any]:
    path = adapter_library.find_adapter(adapter_id)
    return job_host.get_jobs().store.get(repeated_training.train_again(path)).to_dict()


def warn_of_conflict(prompt: dict[str, Any]) -> dict[str, Any]:
    """Called for every queued prompt; returns it unchanged."""
    if not host.has_model(prompt.get("prompt")):
        return prompt
    try:
        warning = job_host.get_jobs().policy.take_warning()
    except LoraError:
        return prompt
    if warning:
        logger.warning("Qwen Edit LoRA: %s.", warning)
        PromptServer.instance.send_sync(EVENT, {"warning": host.translate(warning)})
    return prompt


async def send_image(request: web.Request) -> web.Response:
    one, name = request.match_info["id"], request.match_info["name"]
    body = await run(lambda: job_host.get_jobs().store.read_image(one, name))
    return web.Response(body=body, content_type="image/png", headers=pair_routes.IMAGE_HEADERS)


async def send_preview(request: web.Request) -> web.Response:
    one = request.match_info["id"]
    body = await run(lambda: adapter_library.read_preview(one))
    return web.Response(body=body, content_type="image/jpeg", headers=pair_routes.IMAGE_HEADERS)
