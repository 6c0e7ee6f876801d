"""Starts, queries and stops a real ComfyUI server. Standard library only."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HOST = "127.0.0.1"
#: A folder of static files of another frontend than the one ComfyUI installed; see dev.py.
FRONTEND = "QWEN_EDIT_LORA_FRONTEND"
START_TIMEOUT = 120.0  # seconds; about 10 on two cores
STOP_TIMEOUT = 10.0  # seconds between asking it to stop and killing it
REQUEST_TIMEOUT = 60.0  # seconds
POLL_INTERVAL = 0.05  # seconds
LOG_TAIL_LINES = 30


class ServerError(Exception):
    """The server did not start, exited, or did not answer in time."""


class PromptError(Exception):
    """The server refused or failed a graph; the text is the server's own, with the node named."""


class ComfyServer:
    """Our own ComfyUI process on a throw-away base directory.

    with ComfyServer.start(base, python, comfyui) as server:
        entry = server.run_prompt(graph)
    """

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        self.process = process
        self.port = port
        self.url = f"http://{HOST}:{port}"
        self.log = log

    @classmethod
    def start(
        cls,
        base_directory: Path | str,
        python: Path | str,
        comfyui_path: Path | str,
        port: int | None = None,
        extra_args: Sequence[str] = (),
        *,
        cpu: bool = True,
    ) -> ComfyServer:
        """Starts the process; call `wait_ready` before asking it anything."""
        port = find_free_port() if port is None else port
        check_port(port)
        command = [str(python), str(Path(comfyui_path) / "main.py"), "--port", str(port)]
        command += ["--listen", HOST, "--base-directory", str(base_directory)]
        command += ["--database-url", "sqlite:///:memory:", "--disable-api-nodes"]
        # on a CPU the default attention makes a 1-megapixel VAE encode five times slower
        command += ["--cpu", "--use-pytorch-cross-attention"] if cpu else []
        if frontend := os.environ.get(FRONTEND):
            command += ["--front-end-root", frontend]
        log = Path(base_directory) / "server.log"
        # its own group, so that Ctrl-C reaches only us and we can stop its children with it
        group: dict[str, Any] = (
            {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
            if os.name == "nt"
            else {"start_new_session": True}
        )
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*command, *extra_args],
                cwd=base_directory,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                **group,
            )
        return cls(process, port, log)

    def __enter__(self) -> ComfyServer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def wait_ready(self, timeout: float = START_TIMEOUT) -> ComfyServer:
        """Returns once the server answers; ServerError with the end of its log otherwise."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            self.check_alive()
            try:
                self.get("/system_stats")
                return self
            except (OSError, ValueError):
                time.sleep(POLL_INTERVAL)
        raise ServerError(f"no answer after {timeout:.0f} s\n{self.read_log_tail()}")

    def check_alive(self) -> None:
        """Raises ServerError when the process has ended."""
        status = self.process.poll()
        if status is not None:
            raise ServerError(f"ended with status {status}\n{self.read_log_tail()}")

    def read_log_tail(self) -> str:
        """The end of the server's log."""
        lines = self.log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
        return "\n".join([f"The end of {self.log}:", *lines])

    def get(self, path: str, **query: str) -> Any:
        """The JSON answer to a GET."""
        return json.loads(self.request(path, query))

    def post(self, path: str, body: Any = None) -> Any:
        """The JSON answer to a POST with a JSON body; None if there is no answer."""
        answer = self.request(path, {}, json.dumps({} if body is None else body).encode())
        return json.loads(answer) if answer else None

    def request(self, path: str, query: dict[str, str], body: bytes | None = None) -> bytes:
        """The raw answer to a GET, or with a body to a POST; urllib's HTTPError on 4xx and 5xx."""
        query_text = f"?{urllib.parse.urlencode(query)}" if query else ""
        headers = {"Content-Type": "application/json"} if body is not None else {}
        request = urllib.request.Request(f"{self.url}{path}{query_text}", body, headers)
        # no proxy: that of the environment is for the internet
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=REQUEST_TIMEOUT) as response:
            return response.read()

    def queue_prompt(self, api_prompt: dict[str, Any]) -> str:
        """Queues a graph in API form and returns its id; PromptError when it is refused."""
        try:
            return self.post("/prompt", {"prompt": api_prompt})["prompt_id"]
        except urllib.error.HTTPError as error:
            answer = error.read().decode(errors="replace")
            raise PromptError(describe_refusal(answer)) from None

    def wait_for_prompt(self, prompt_id: str, timeout: float = 120.0) -> dict[str, Any]:
        """Waits for the end of a queued graph and returns its history entry."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            self.check_alive()
            entry = self.get(f"/history/{prompt_id}").get(prompt_id)
            if entry is not None:
                if entry["status"]["status_str"] != "success":
                    raise PromptError(describe_failure(entry["status"]))
                return entry
            time.sleep(POLL_INTERVAL)
        raise ServerError(f"graph not done after {timeout:.0f} s\n{self.read_log_tail()}")

    def run_prompt(self, api_prompt: dict[str, Any], timeout: float = 120.0) -> dict[str, Any]:
        """Queues a graph in API form, waits for its end and returns its history entry."""
        return self.wait_for_prompt(self.queue_prompt(api_prompt), timeout)

    def images(self, entry: dict[str, Any]) -> list[bytes]:
        """The image files a history entry names, saved ones before previews, by node id."""
        described = [
            image
            for _, output in sorted(entry["outputs"].items(), key=lambda item: item[0].zfill(9))
            for image in output.get("images", [])
        ]
        described.sort(key=lambda image: image["type"] != "output")
        return [
            self.request("/view", {key: image[key] for key in ("filename", "subfolder", "type")})
            for image in described
        ]

    def stop(self) -> None:
        """Ends the process and its group; harmless if it has already ended."""
        self.signal_group(signal.SIGTERM)
        try:
            self.process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            pass
        finally:  # also on a second Ctrl-C, and for children that outlive the server
            if os.name == "nt":
                self.process.kill()
            else:
                self.signal_group(signal.SIGKILL)
            self.process.wait()

    def signal_group(self, signal_number: int) -> None:
        """Sends a signal to the server's process group, on Windows to the server."""
        if os.name == "nt":
            self.process.terminate()
            return
        try:
            os.killpg(self.process.pid, signal_number)
        except ProcessLookupError:
            pass


def find_free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def check_port(port: int) -> None:
    """Raises ServerError when the port cannot be listened on."""
    with socket.socket() as probe:
        if os.name != "nt":  # like aiohttp; otherwise a just closed connection blocks the port
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except (OSError, OverflowError) as error:
            raise ServerError(
                f"port {port} must be free, but is not ({error}): choose another one or leave "
                "--port away."
            ) from None


def describe_refusal(answer: str) -> str:
    """The server's validation errors, one line per node."""
    try:
        refusal = json.loads(answer)
    except ValueError:
        return answer
    error = refusal.get("error", {})
    if isinstance(error, str):
        return error
    lines = [f"{error.get('message', '')} {error.get('details', '')}".strip()]
    for node_id, node in (refusal.get("node_errors") or {}).items():
        lines += [
            f"node {node_id} ({node['class_type']}): {problem['message']}: {problem['details']}"
            for problem in node["errors"]
        ]
    return "\n".join(lines)


def describe_failure(status: dict[str, Any]) -> str:
    """The error message of the node that failed, with its traceback."""
    for event, details in status["messages"]:
        if event == "execution_error":
            node = f"node {details['node_id']} ({details['node_type']})"
            message = f"{details['exception_type']}: {details['exception_message'].strip()}"
            return "\n".join([f"{node}: {message}", *details["traceback"]])
    return f"ended as {status['status_str']}: {[event for event, _ in status['messages']]}"
