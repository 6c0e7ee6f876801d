"""How our HTTP routes answer names, bodies and races that our own page never sends."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import shutil
import socket
import struct
import time
from pathlib import Path
from typing import Any

import pytest
from demo_base.dit import write_dit

pytestmark = pytest.mark.comfy

JOBS = "/qwen_edit_lora/jobs"
ADAPTERS = "/qwen_edit_lora/adapters"


@pytest.fixture
def job_id(routes: Any, tmp_path: Path, demo_models: Any) -> Any:
    """A paused job; deleted after the test."""
    from qwen_edit_lora.lora_core.training.config.config_files import config_from_dict

    (tmp_path / "data").mkdir()
    write_dit(tmp_path / "base.safetensors", "2509", "fp32")
    train = config_from_dict(
        {
            "name": "tiny",
            "output": "unused",
            "steps": 6,
            "model": {"source": str(tmp_path / "base.safetensors"), "device": "cpu"},
            "data": {"folder": str(tmp_path / "data")},
        }
    )
    job_id = routes.store.submit(train, loras=str(tmp_path))
    routes.store.pause(job_id)
    yield job_id
    for job in routes.store.list():
        routes.store.delete(job.id)


OWN_NAMES = ["127.0.0.1", "127.9.8.7", "localhost", "LOCALHOST", "localhost.", "me.localhost"]
FOREIGN_NAMES = [
    *("rebind.attacker.example", "localhost.attacker.example", "127.0.0.1.nip.io", "10.0.0.7"),
    *("attacker.example#localhost", "localhost@attacker.example", "", "[::2]", "notlocalhost"),
]


@pytest.fixture
def listen(comfyui: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets what ComfyUI was started with: listen("0.0.0.0", cors="http://x")."""
    from comfy.cli_args import args

    def listen(addresses: str, cors: str | None = None) -> None:
        monkeypatch.setattr(args, "listen", addresses)
        monkeypatch.setattr(args, "enable_cors_header", cors)

    return listen


def ask_all(routes: Any, job_id: str, host: str) -> set[int]:
    """Status of each kind of route for a page at this host name."""
    # Without Origin, for which ComfyUI's own check resolves names on the network.
    headers = {"Host": host}
    return {
        *(routes.ask("GET", path, headers=headers).status for path in (JOBS, ADAPTERS)),
        *(routes.ask("GET", f"{JOBS}/{job_id}{p}", headers=headers).status for p in ("", "/log")),
        routes.post(f"{JOBS}/{job_id}/pause", **headers).status,
    }


@pytest.mark.parametrize("port", ["", ":8188"])
@pytest.mark.parametrize("name", [*OWN_NAMES, "[::1]", "[::ffff:127.0.0.1]"])
def test_a_server_on_loopback_answers_to_its_own_names(routes, job_id, listen, name, port):
    listen("127.0.0.1,::1")
    assert ask_all(routes, job_id, f"{name}{port}") == {200}


@pytest.mark.parametrize("name", FOREIGN_NAMES)
def test_a_server_on_loopback_refuses_pages_of_rebound_names(routes, job_id, listen, name):
    listen("127.0.0.1")
    for host in (name, f"{name}:8188"):
        answer = routes.ask("GET", JOBS, headers={"Host": host})
        assert answer.status == 403
        assert "open it as 127.0.0.1 or localhost" in answer.sentence
        assert ask_all(routes, job_id, host) <= {403, 400}  # 400: aiohttp's own, of no Host at all


def test_a_configured_proxy_and_servers_on_other_addresses_are_answered(routes, job_id, listen):
    listen("127.0.0.1", cors="https://comfy.example")
    assert routes.ask("GET", JOBS, headers={"Host": "comfy.example"}).status == 200
    assert routes.ask("GET", JOBS, headers={"Host": "other.example"}).status == 403
    listen("127.0.0.1", cors="*")
    assert routes.ask("GET", JOBS, headers={"Host": "other.example"}).status == 403
    for addresses in ("0.0.0.0,::", "127.0.0.1,192.168.1.5", "", "comfy.lan"):
        listen(addresses)
        assert ask_all(routes, job_id, "comfy.lan:8188") == {200}


#: A page of another site, by the browser's header or by its address; ComfyUI's own check passes if
#: the Host is not a loopback address.
ADDRESS = "192.168.1.5"
FOREIGN = [
    {"Host": f"{ADDRESS}:8188", "Origin": "http://evil.example"},
    {"Host": f"{ADDRESS}:8188", "Origin": f"http://{ADDRESS}:9999"},
    {"Host": f"{ADDRESS}:8188", "Origin": "null"},
    {"Host": f"{ADDRESS}:8188", "Sec-Fetch-Site": "same-site"},
]
OWN = [
    {"Host": f"{ADDRESS}:8188", "Origin": f"http://{ADDRESS}:8188"},
    {"Host": ADDRESS, "Origin": f"https://{ADDRESS}", "Sec-Fetch-Site": "same-origin"},
    {"Host": ADDRESS, "Origin": f"https://{ADDRESS}"},
    {},
]


def test_pages_of_other_sites_change_nothing(routes, job_id, listen):
    from qwen_edit_lora.lora_core.jobs.job import JobStatus

    listen("0.0.0.0")
    for headers in FOREIGN:
        for action in ("resume", "cancel", "delete", "clone", "publish"):
            answer = routes.post(f"{JOBS}/{job_id}/{action}", **headers)
            assert (answer.status, "page of another site" in answer.sentence) == (403, True)
    assert routes.store.get(job_id).status is JobStatus.PAUSED
    for headers in OWN:
        assert routes.post(f"{JOBS}/{job_id}/resume", **headers).status == 200
        assert routes.store.get(job_id).status is JobStatus.PENDING
        routes.store.pause(job_id)
    assert len(routes.store.list()) == 1


BODIES = {
    "NaN": b'{"changes": {"optimizer.options": {"eps": NaN}}}',
    "Infinity": b'{"changes": {"optimizer.learning_rate": Infinity}}',
    "1e999": b'{"changes": {"optimizer.learning_rate": 1e999}}',
    "400 digits": b'{"changes": {"steps": ' + b"9" * 400 + b"}}",
    "5000 digits": b'{"changes": {"model.seed": ' + b"9" * 5000 + b"}}",
    "490 deep": b'{"changes": {"optimizer.options": ' + b'{"a":' * 490 + b"1" + b"}" * 491 + b"}",
    "30,000 deep": b"[" * 30_000,
    "a list": b"[]",
    "null": b"null",
    "not UTF-8": b'{"a": "\xff"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "nothing": b"",
}


def list_files(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


@pytest.mark.parametrize("name", BODIES)
def test_a_body_of_odd_numbers_or_depth_is_refused_with_a_message_and_leaves_nothing(
    routes, job_id, name
):
    before = list_files(routes.store.root)
    answer = routes.post(f"{JOBS}/{job_id}/clone", BODIES[name])
    assert answer.status == 400
    assert "the body" in answer.sentence
    assert len(answer.sentence) <= 200
    assert list_files(routes.store.root) == before


@pytest.mark.parametrize("value", ["x" * 60_000, ["\x00" * 9_000], {"\ud800": "y" * 9_000}])
def test_a_value_of_a_request_is_shortened_in_errors(routes, job_id, value):
    for action, options in (
        ("delete", {"with_adapter": value}),
        ("publish", {"adapter": value}),
        ("clone", {"changes": {"name": value}}),
        ("clone", {"changes": {"optimizer.name": value}}),
        ("clone", {"changes": {f"no.{value}": 1}}),
        ("clone", {"changes": {f"model.{value}": 1}}),
    ):
        answer = routes.post(f"{JOBS}/{job_id}/{action}", options)
        assert answer.status == 400, (action, options)
        assert len(answer.sentence) <= 400
        assert answer.sentence.isprintable()
    answer = routes.ask("GET", f"{JOBS}/{job_id}/log?offset={'9' * 4000}")
    assert (answer.status, len(answer.sentence) < 200) == (400, True)


def test_non_finite_numbers_are_null_in_every_answer(routes, job_id, monkeypatch):
    folder = routes.store.catalog.find(job_id)
    state = dataclasses.replace(
        folder.read_state(), loss=float("nan"), smoothed_loss=float("inf"), seconds_per_step=1.5
    )
    from qwen_edit_lora.lora_core.jobs.store import JobStore

    job = dataclasses.replace(routes.store.get(job_id), state=state)
    monkeypatch.setattr(JobStore, "list", lambda self: [job])
    (shown,) = routes.ask("GET", JOBS).read()["jobs"]
    assert (shown["loss"], shown["smoothed_loss"], shown["seconds_per_step"]) == (None, None, 1.5)


def test_a_job_deleted_during_a_request_is_a_404_and_not_a_server_error(
    routes, job_id, monkeypatch
):
    from qwen_edit_lora.lora_core.jobs.catalog import Catalog

    find, folder = Catalog.find, routes.store.catalog.find(job_id).path
    kept = folder.with_name("kept")
    shutil.copytree(folder, kept)

    def find_and_lose(self: Catalog, job_id: str) -> Any:
        """As if another page deleted it right after the lookup."""
        found = find(self, job_id)
        shutil.rmtree(folder)
        return found

    for action in ("pause", "resume", "cancel", "delete", "clone", "publish"):
        with monkeypatch.context() as patch:
            patch.setattr(Catalog, "find", find_and_lose)
            answer = routes.post(f"{JOBS}/{job_id}/{action}")
        assert (action, answer.status) == (action, 404)
        assert answer.sentence == f"there is no job {job_id}; it may have been deleted"
        shutil.copytree(kept, folder)
    shutil.rmtree(kept)


@pytest.mark.parametrize("status", ["pending", "in_progress", "paused", "completed", "failed"])
@pytest.mark.parametrize("request_", [None, "pause", "cancel"])
def test_the_server_does_what_it_offers_and_refuses_what_the_state_forbids(
    routes, job_id, status, request_
):
    """A worker is simulated by its lock."""
    from qwen_edit_lora.lora_core.jobs.job import JobStatus, Request
    from qwen_edit_lora.lora_core.jobs.transitions import REQUESTS, Event, find_next, find_stage

    folder = routes.store.catalog.find(job_id)
    state = dataclasses.replace(folder.read_state(), status=JobStatus(status))
    is_running = status == "in_progress"
    stage = find_stage(state.status, Request(request_) if request_ else None)

    def reset() -> None:
        folder.write_state(state)
        folder.clear_request()
        if request_ is not None and is_running:
            folder.write_request(Request(request_))

    if is_running:
        assert folder.lock.try_acquire()
    try:
        reset()
        (listed,) = routes.ask("GET", JOBS).read()["jobs"]
        shown = routes.ask("GET", f"{JOBS}/{job_id}").read()
        assert listed["actions"] == shown["actions"]
        for event in (Event.PAUSE, Event.RESUME, Event.CANCEL):
            reset()
            answer = routes.post(f"{JOBS}/{job_id}/{event.value}")
            after = find_next(stage, event)
            assert answer.status == (409 if after is None else 200), event
            assert (event.value in listed["actions"]) == (after not in (None, stage))
            if after is not None and is_running:
                assert folder.read_request() is REQUESTS[event]
            elif after is not None:
                assert answer.read()["status"] == after.status.value
        is_deleted = routes.post(f"{JOBS}/{job_id}/delete").status == 200
        assert is_deleted == ("delete" in listed["actions"])
    finally:
        folder.lock.release()
        if folder.path.exists():
            folder.write_state(dataclasses.replace(state, status=JobStatus.PAUSED))


def test_a_copy_that_stays_is_reported_and_not_a_job_that_is_unknown(
    routes, job_id, tmp_path, monkeypatch
):
    from qwen_edit_lora.lora_core.errors import FileError
    from qwen_edit_lora.lora_core.jobs import store as store_module

    def refuse(*_: Any) -> None:
        raise FileError("the job is deleted, but a.safetensors stays in loras: no permission")

    monkeypatch.setattr(store_module, "remove_published", refuse)
    answer = routes.post(f"{JOBS}/{job_id}/delete", {"with_adapter": True})
    assert answer.status == 500
    assert answer.sentence.startswith("the job is deleted, but a.safetensors stays in loras")


def test_clients_that_vanish_in_mid_body_leave_no_traceback(routes, job_id, caplog):
    caplog.set_level(logging.WARNING)
    head = f"POST {JOBS}/{job_id}/clone HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    head += "Content-Type: application/json\r\n"
    for rest in (
        b"Content-Length: 5000\r\n\r\n" + b'{"changes": ',
        b"Transfer-Encoding: chunked\r\n\r\nff\r\nabc",
    ):
        for linger in (False, True):
            client = socket.create_connection(("127.0.0.1", routes.port), timeout=10)
            client.sendall(head.encode() + rest)
            time.sleep(0.05)
            if linger:  # a reset instead of an end
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.close()
    time.sleep(0.3)
    assert routes.ask("GET", JOBS).status == 200
    assert [record.getMessage() for record in caplog.records if record.exc_info] == []
    assert [record.getMessage() for record in caplog.records if record.levelno > 30] == []


def test_json_with_non_finite_numbers_is_valid_json():
    from qwen_edit_lora.lora_core.disk.plain_json import write_json

    nan, inf = float("nan"), float("inf")
    odd = {"a": [nan, {"b": (inf, -inf, 1)}], "c": 0.5, "d": None, inf: 1}
    assert json.loads(write_json(odd)) == {
        "a": [None, {"b": [None, None, 1]}],
        "c": 0.5,
        "d": None,
        "null": 1,
    }


def test_an_event_while_comfyui_stops_fails_nothing(comfyui, monkeypatch):
    from qwen_edit_lora.nodes.server import routes as module
    from server import PromptServer

    monkeypatch.setattr(PromptServer, "instance", getattr(PromptServer, "instance", None))
    loop = asyncio.new_event_loop()
    stopped = PromptServer(loop)
    loop.close()
    module.send(stopped, "qwen_edit_lora.finding", {"node": "1"})
