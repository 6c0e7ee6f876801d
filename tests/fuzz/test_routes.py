"""Our HTTP routes, live: any method, id, query and body gets an answer or a clear refusal.

The routes run on ComfyUI's own application, without workers. Never a 500, never NaN, and refused
requests leave nothing behind.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from demo_base.damaged_jobs import FILES, REPLACED_BY, damage
from demo_base.route_inputs import (
    HEADERS,
    METHODS,
    NUMBERS,
    TEXTS,
    VALUES,
    build_bodies,
    check_form,
    is_route,
    write_query,
)
from demo_base.route_server import JSON, Answer, encode
from hypothesis import example, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.comfy

SHARE = settings.default.max_examples
JOBS, ADAPTERS = "/qwen_edit_lora/jobs", "/qwen_edit_lora/adapters"
ACTIONS = ("pause", "resume", "cancel", "sample", "save", "delete", "clone", "publish")
UNKNOWN = "20260131-120000-0123abcd"


class Place:
    """The server with a job in each state, recreated when a request removed one."""

    def __init__(self, routes: Any, folder: Path):
        self.routes, self.folder, self.store = routes, folder, routes.store
        self.ids: dict[str, str] = {}

    def fill(self) -> None:
        from qwen_edit_lora.lora_core.jobs.job import JobStatus

        states = {job.id: job.status for job in self.store.list()}
        wanted = {"paused": JobStatus.PAUSED, "cancelled": JobStatus.CANCELLED}
        for name, status in wanted.items():
            if states.get(self.ids.get(name, "")) is not status:
                self.ids[name] = self.submit()
                {"paused": self.store.pause, "cancelled": self.store.cancel}[name](self.ids[name])
        if self.ids.get("completed", "") not in states:
            self.ids["completed"] = self.complete(self.submit())
        for job_id in states.keys() - set(self.ids.values()):
            self.store.delete(job_id)

    def submit(self) -> str:
        from qwen_edit_lora.lora_core.training.config.config_files import config_from_dict

        train = {
            "name": "fuzzed",
            "output": "unused",
            "steps": 6,
            "model": {"source": str(self.folder / "base.safetensors"), "device": "cpu"},
            "data": {"folder": str(self.folder / "data")},
        }
        return self.store.submit(config_from_dict(train), loras=str(self.folder / "loras"))

    def complete(self, job_id: str) -> str:
        """A job as a worker leaves it, with an adapter and a sample."""
        import dataclasses

        import torch
        from PIL import Image
        from qwen_edit_lora.lora_core.jobs.job import JobStatus
        from safetensors.torch import save_file

        folder = self.store.catalog.find(job_id)
        save_file({"a": torch.zeros(1)}, folder.path / "fuzzed.safetensors")
        folder.samples.mkdir()
        Image.new("RGB", (8, 8)).save(folder.samples / "step_00000004_item.png")
        folder.log.write_bytes(b"line\n" * 100 + b"\xff\x00")
        done = {"status": JobStatus.COMPLETED, "step": 6, "adapters": ("fuzzed.safetensors",)}
        folder.write_state(dataclasses.replace(folder.read_state(), **done))
        return job_id

    def list_places(self) -> set[str]:
        """Everything in the jobs folder and the loras folder except the jobs themselves."""
        found = {path.name for path in (self.store.root / "jobs").iterdir()}
        known = {job.id for job in self.store.list()}
        return (found - known) | {p.name for p in (self.folder / "loras").glob(".*")}


@pytest.fixture(scope="module")
def place(routes: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("fuzzed")
    for name in ("data", "loras"):
        (folder / name).mkdir()
    (folder / "base.safetensors").write_bytes(b"")
    place = Place(routes, folder)
    place.fill()
    yield place
    shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Asserts that the log has no traceback."""
    caplog.set_level(logging.WARNING)
    yield
    assert [record.getMessage() for record in caplog.records if record.exc_info] == []


def check_answer(place: Place, answer: Answer, is_ours: bool = True) -> None:
    check_form(answer, place.folder, is_ours)
    if is_ours:
        assert place.list_places() == set()


DAMAGES = st.one_of(
    st.tuples(
        st.sampled_from(["cut", "flip", "put in", "instead"]),
        st.integers(0, 4000),
        st.sampled_from([b"null", b"{}", b"[]", b"[" * 9999, b"NaN", b"\n"])
        | st.binary(max_size=20),
    ),
    st.tuples(st.sampled_from(REPLACED_BY), st.just(0), st.just(b"")),
)


@settings(max_examples=SHARE // 4)
@given(
    st.lists(st.tuples(st.sampled_from(FILES), DAMAGES), min_size=1, max_size=3),
    st.lists(st.sampled_from(ACTIONS), max_size=3),
)
def test_every_route_of_a_damaged_job_is_answered(place, damages, actions):
    place.fill()
    job_id = place.ids["completed"]
    folder = place.store.catalog.find(job_id).path
    whole = shutil.copytree(folder, place.folder / "whole")
    place.store.catalog._settings.clear()  # as after a restart
    place.store.catalog._read_jobs.clear()
    try:
        for name, (kind, at, piece) in damages:
            damage(folder / name, kind, at, piece)
        page = place.routes.ask("GET", f"{JOBS}/{job_id}")
        assert page.status == 200
        (listed,) = (
            job for job in place.routes.ask("GET", JOBS).read()["jobs"] if job["id"] == job_id
        )
        assert [page.read()[name] for name in ("status", "failure")] == [
            listed[name] for name in ("status", "failure")
        ]
        for rest in ("", "/log", "/log?offset=9", "/pictures/step_00000004_item.png"):
            check_answer(place, place.routes.ask("GET", f"{JOBS}/{job_id}{rest}"))
        for action in actions:
            check_answer(place, place.routes.post(f"{JOBS}/{job_id}/{action}"))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.move(whole, folder)
        place.store.catalog._settings.clear()
        place.store.catalog._read_jobs.clear()


#: Ids of existing jobs, by their state, or any text.
IDS = st.one_of(st.sampled_from(["paused", "cancelled", "completed", UNKNOWN]), TEXTS)
SETTINGS = (
    *("steps", "name", "seed", "lora.rank", "lora.targets", "lora.alpha", "lora.use_dora"),
    *("optimizer.name", "optimizer.options", "optimizer.learning_rate", "optimizer.ema_decay"),
    *("model.storage", "model.device", "model.offload_blocks", "data.batch_size", "samples"),
    *("samples.every", "samples.items", "samples.guidance", "niceness", "num_devices"),
    *("saving.adapter_every", "objective.sampling", "max_restarts", "model", "train", "loras"),
    *("objective", "optimizer", "lora", "no.such", "steps.more", "lora.rank.more", ""),
)
OPTIONS = st.one_of(
    st.just({}),
    st.fixed_dictionaries({"with_adapter": st.booleans() | VALUES}),
    st.fixed_dictionaries({"adapter": st.just("fuzzed.safetensors") | VALUES}),
    st.builds(
        lambda changes: {"changes": changes},
        st.dictionaries(st.sampled_from(SETTINGS) | TEXTS, VALUES, max_size=3),
    ),
    st.dictionaries(TEXTS, VALUES, max_size=3),
)
BODIES = build_bodies(OPTIONS)
#: Parts of a job's address that a name follows, and others that send files.
NAMED, DOWNLOADS = ("/pictures/", "/files/"), ("/samples.zip", "/log.txt")
QUERIES = st.dictionaries(st.sampled_from(["offset", "limit", "x"]), TEXTS | NUMBERS.map(str))


@settings(max_examples=SHARE)
@given(IDS, st.sampled_from(["", "/log", *NAMED, *DOWNLOADS]), TEXTS, QUERIES)
@example("completed", "/log", "", {"offset": "9" * 15, "limit": "0"})
@example("completed", "/pictures/", "step_00000004_item.png", {})
@example("completed", "/files/", "fuzzed.safetensors", {})
@example("completed", "/samples.zip", "", {})
@example("completed", "/log.txt", "", {})
def test_any_request_for_a_job_is_answered(place, job_id, part, name, query):
    place.fill()
    path = f"{JOBS}/{encode(place.ids.get(job_id, job_id))}{part}"
    if part in NAMED:
        path += encode(name)
    check_answer(place, place.routes.ask("GET", path + write_query(query)), is_route(job_id, path))


@settings(max_examples=2 * SHARE)
@given(IDS, st.sampled_from(ACTIONS), BODIES)
@example("completed", "publish", b'{"adapter": "fuzzed.safetensors"}')
@example("paused", "clone", b'{"changes": {"optimizer.options": {"eps": 1e999}}}')
@example("paused", "clone", b'{"changes": {"name": "\\ud800"}}')
def test_any_action_is_done_or_refused_with_a_message(place, job_id, action, body):
    place.fill()
    before = {job.id for job in place.store.list()}
    path = f"{JOBS}/{encode(place.ids.get(job_id, job_id))}/{action}"
    answer = place.routes.ask("POST", path, body, JSON)
    check_answer(place, answer, is_route(job_id, path))
    after = {job.id for job in place.store.list()}
    if answer.status != 200:
        assert after == before
    for made in after - before:  # accepted data can be shown
        assert place.routes.ask("GET", f"{JOBS}/{made}").read()["id"] == made
    assert [job["id"] for job in place.routes.ask("GET", JOBS).read()["jobs"]] != []


#: Parts of an adapter's address, by method.
READ, CHANGED = ("", "/preview"), ("/train", "/favourite")


@settings(max_examples=SHARE // 2)
@given(TEXTS, st.sampled_from(["GET", "POST"]), st.sampled_from([*READ, *CHANGED]), BODIES)
@example("x", "POST", "/favourite", b'{"favourite": true}')
@example("x", "GET", "/preview", b"")
def test_any_request_for_an_adapter_is_answered(place, adapter_id, method, part, body):
    path = f"{ADAPTERS}/{encode(adapter_id)}{part}"
    known = [entry["id"] for entry in place.routes.ask("GET", ADAPTERS).read()["adapters"]]
    for one in (path, f"{ADAPTERS}/{known[0]}{part}"):
        is_ours = is_route(adapter_id, one) and (method == "GET") == (part in READ)
        check_answer(place, place.routes.ask(method, one, body, JSON), is_ours)


@settings(max_examples=SHARE)
@given(METHODS, IDS, HEADERS)
def test_any_method_and_headers_are_answered_and_only_our_actions_change_anything(
    place, method, job_id, headers
):
    place.fill()
    before = [(job.id, job.status) for job in place.store.list()]
    for path in (JOBS, f"{JOBS}/{encode(place.ids.get(job_id, job_id))}", ADAPTERS):
        answer = place.routes.ask(method, path, b"{}", headers)
        assert answer.status < 500 or headers.get("Origin"), (answer.status, answer.body[:300])
        if answer.status == 200 and method == "GET":
            answer.read()
    assert [(job.id, job.status) for job in place.store.list()] == before
