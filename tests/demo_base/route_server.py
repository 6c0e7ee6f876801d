"""Our HTTP routes on ComfyUI's own application in this process; no worker trains here.

Needs ComfyUI in this process (the fixture `comfyui`) and folders to serve.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import pytest

JSON = {"Content-Type": "application/json"}
TIMEOUT = 30.0  # seconds


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    def read(self) -> Any:
        """Its JSON; ValueError for NaN and Infinity, which are not JSON."""
        return json.loads(self.body, parse_constant=refuse)

    @property
    def sentence(self) -> str:
        return self.read()["error"]


def refuse(name: str) -> None:
    raise ValueError(name)


class RouteServer:
    """Answers on a port of 127.0.0.1."""

    def __init__(self, port: int, store: Any):
        self.port = port
        self.store = store
        self._connection: http.client.HTTPConnection | None = None

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()

    def ask(
        self, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None
    ) -> Answer:
        """Sends one request; a path of any characters is percent-encoded as needed."""
        try:
            return self._ask(method, path, body, headers or {})
        except (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError):
            self._connection = None  # the server closes after a body not fully read
            return self._ask(method, path, body, headers or {})

    def _ask(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> Answer:
        if self._connection is None:
            self._connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT)
        connection = self._connection
        connection.putrequest(method, path, skip_host="Host" in headers)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            connection.putheader(name, value)
        connection.endheaders(body)
        response = connection.getresponse()
        answer = Answer(response.status, dict(response.headers), response.read())
        if response.will_close:
            connection.close()
            self._connection = None
        return answer

    def post(self, path: str, value: Any = None, **headers: str) -> Answer:
        body = value if isinstance(value, bytes) else json.dumps(value or {}).encode()
        return self.ask("POST", path, body, {**JSON, **headers})


def encode(part: str) -> str:
    """One part of a path."""
    return quote(part.encode("utf-8", "surrogatepass"), safe="")


@contextmanager
def serve_routes(folder: Path, loras: Path) -> Iterator[RouteServer]:
    """Serves the jobs below `folder` and the LoRA files below `loras`."""
    import server
    from aiohttp import web
    from qwen_edit_lora.lora_core.jobs.supervisor import Supervisor
    from qwen_edit_lora.nodes import host
    from qwen_edit_lora.nodes.server import adapter_library, job_host, routes

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Supervisor, "start", lambda self: None)
        patch.setattr(host, "get_jobs_folder", lambda: folder / "training")
        patch.setattr(host, "get_cache_folder", lambda: folder)
        patch.setattr(host, "find_lora_files", lambda: {p.name: p for p in loras.iterdir()})
        patch.setattr(adapter_library, "_library", None)
        patch.setattr(job_host, "_jobs", None)
        patch.setattr(server.PromptServer, "instance", None, raising=False)
        app_server = server.PromptServer(loop)
        routes.start()
        adapter_library.connect(send=lambda data: None, is_busy=lambda: True)
        app_server.app.add_routes(app_server.routes)
        thread.start()

        async def start() -> tuple[web.AppRunner, int]:
            runner = web.AppRunner(app_server.app, access_log=None)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            return runner, runner.addresses[0][1]

        runner, port = asyncio.run_coroutine_threadsafe(start(), loop).result(TIMEOUT)
        answers = RouteServer(port, job_host.get_jobs().store)
        try:
            yield answers
        finally:
            answers.close()
            asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(TIMEOUT)
            if adapter_library._library is not None:
                adapter_library._library.stop()
            job_host.get_jobs().store.index.close()
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()
