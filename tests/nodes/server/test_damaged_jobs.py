"""The page and all other routes of a job whose files are damaged: never an HTTP 500."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from demo_base.damaged_jobs import FILES, REPLACED_BY, damage
from PIL import Image
from safetensors.torch import save_file

pytestmark = pytest.mark.comfy

JOBS = "/qwen_edit_lora/jobs"
PICTURE = "step_00000004_item.png"
ACTIONS = ("pause", "resume", "cancel", "clone", "publish", "delete")
KINDS = [
    *((kind, 0, b"") for kind in REPLACED_BY),
    *(("cut", 0, b""), ("cut", 20, b""), ("flip", 3, b"\0"), ("put in", 30, b"\xff\n{")),
    *(("instead", 0, b"[]"), ("instead", 0, b"[" * 9999), ("instead", 0, b'{"version": 1}')),
    ("instead", 0, b'{"version": 2}'),
]


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Asserts that the log has no traceback."""
    caplog.set_level(logging.WARNING)
    yield
    assert [record.getMessage() for record in caplog.records if record.exc_info] == []


@pytest.fixture(scope="module")
def whole(routes: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A copy of a cancelled job's folder, with everything that a worker leaves."""
    from qwen_edit_lora.lora_core.training.config.config_files import config_from_dict

    folder = tmp_path_factory.mktemp("damaged")
    for name in ("data", "loras"):
        (folder / name).mkdir()
    (folder / "base.safetensors").write_bytes(b"")
    train = {
        "name": "damaged",
        "output": "unused",
        "steps": 6,
        "model": {"source": str(folder / "base.safetensors"), "device": "cpu"},
        "data": {"folder": str(folder / "data")},
    }
    store = routes.store
    job_id = store.submit(config_from_dict(train), loras=str(folder / "loras"))
    store.cancel(job_id)
    job = store.catalog.find(job_id)
    state = dataclasses.replace(job.read_state(), adapters=("damaged.safetensors",), step=4)
    job.write_state(state)
    for path in (job.path / "damaged.safetensors", job.path / "adapters" / "a.safetensors"):
        path.parent.mkdir(exist_ok=True)
        save_file({"a": torch.zeros(1)}, path)
    (job.path / "checkpoints" / "step_00000004").mkdir(parents=True)
    job.samples.mkdir()
    Image.new("RGB", (8, 8)).save(job.samples / PICTURE)
    job.log.write_bytes(b"line\n" * 20)
    job.metrics.write_text('{"step": 1, "loss": 0.5}\n')
    (job.path / "request.json").write_text('{"version": 1, "request": "run"}')
    kept = shutil.copytree(job.path, folder / job_id)
    store.delete(job_id)
    yield kept
    for one in store.list():
        store.delete(one.id)


@pytest.fixture
def job(routes: Any, whole: Path) -> Iterator[Path]:
    """Its folder, among the jobs again."""
    path = shutil.copytree(whole, routes.store.root / "jobs" / whole.name)
    yield path
    if path.exists():
        shutil.rmtree(path)


def ask_everything(routes: Any, job_id: str) -> dict[str, Any]:
    """Each route of one job; the last is what removes it."""
    gets = {
        "page": "",
        "log": "/log",
        "piece": "/log?offset=3&limit=5",
        "picture": f"/pictures/{PICTURE}",
        "no picture": "/pictures/state.json",
    }
    answers = {name: routes.ask("GET", f"{JOBS}/{job_id}{rest}") for name, rest in gets.items()}
    answers["list"] = routes.ask("GET", JOBS)
    for action in ACTIONS:
        answers[action] = routes.post(f"{JOBS}/{job_id}/{action}")
    return answers


def check(answers: dict[str, Any]) -> None:
    for name, answer in answers.items():
        assert answer.status in (200, 400, 404, 409), (name, answer.status, answer.body)
        if answer.status != 200:
            assert 0 < len(answer.sentence) <= 400
            assert answer.sentence.isprintable()


@pytest.mark.parametrize("file", FILES)
def test_every_route_of_a_damaged_job_answers_or_refuses(routes, whole, file):
    job_id = whole.name
    for kind, at, piece in KINDS:
        path = shutil.copytree(whole, routes.store.root / "jobs" / job_id)
        routes.store.catalog._settings.clear()  # as after a restart
        routes.store.catalog._read_jobs.clear()
        try:
            damage(path / file, kind, at, piece)
            answers = ask_everything(routes, job_id)
            check(answers)
            page = answers["page"].read()
            assert answers["page"].status == 200
            (listed,) = (one for one in answers["list"].read()["jobs"] if one["id"] == job_id)
            assert page["status"] == listed["status"]
            assert page["failure"] == listed["failure"]
            if file in ("state.json", "config.json"):
                assert page["status"] == "failed", (kind, at, piece)
                assert f"{file} of job {job_id}" in page["failure"]["sentence"]
            assert (answers["delete"].status == 200) == (not path.exists())
        finally:
            shutil.rmtree(path, ignore_errors=True)
            for other in routes.store.list():  # clones
                routes.store.delete(other.id)


def test_a_damaged_jobs_page_is_a_failed_job_in_one_sentence(routes, job):
    (job / "state.json").write_text("{")
    page = routes.ask("GET", f"{JOBS}/{job.name}").read()
    assert page["status"] == "failed"
    assert "state.json of job" in page["failure"]["sentence"]
    assert "delete the job" in page["failure"]["sentence"]
    assert page["pictures"][0]["name"] == PICTURE
    assert routes.post(f"{JOBS}/{job.name}/resume").status == 409
    assert routes.post(f"{JOBS}/{job.name}/delete").status == 200


def test_metrics_that_cannot_be_read_cost_the_page_its_curves_only(routes, job):
    (job / "metrics.jsonl").unlink()
    (job / "metrics.jsonl").mkdir()
    page = routes.ask("GET", f"{JOBS}/{job.name}").read()
    assert page["status"] == "cancelled"
    assert page["metrics"]["step"] == []
    assert page["notes"][-1].startswith("no curves: metrics.jsonl is a folder")


def test_a_log_that_is_a_link_is_refused_as_damage(routes, job):
    (job / "log.txt").unlink()
    (job / "log.txt").symlink_to("/etc/passwd")
    answer = routes.ask("GET", f"{JOBS}/{job.name}/log")
    assert answer.status == 409
    assert "log.txt is a link" in answer.sentence
    assert json.loads(routes.ask("GET", f"{JOBS}/{job.name}").body)["status"] == "cancelled"
