"""Job folders damaged by a crash, a user or an attacker: one job each, and no other is affected."""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import sys
from pathlib import Path

import pytest
from qwen_edit_lora.lora_core import ConfigError, FileError
from qwen_edit_lora.lora_core.jobs.curves import MetricsReader
from qwen_edit_lora.lora_core.jobs.devices import Device
from qwen_edit_lora.lora_core.jobs.failure import explain_error
from qwen_edit_lora.lora_core.jobs.folder import JobFolder
from qwen_edit_lora.lora_core.jobs.identity import is_running
from qwen_edit_lora.lora_core.jobs.job import (
    UNEXPLAINED,
    JobStatus,
    UnknownImageError,
    WorkerIdentity,
)
from qwen_edit_lora.lora_core.jobs.retraining import read_settings
from qwen_edit_lora.lora_core.jobs.store import JobStore
from qwen_edit_lora.lora_core.jobs.supervisor import Supervisor, has_ended
from qwen_edit_lora.lora_core.jobs.team import get_failure_path, pop_failure
from qwen_edit_lora.lora_core.training.config.config_files import config_from_dict
from tiny_jobs import make_train

CPU = Device("cpu", "test-cpu", "")
DEEP = "[" * 100_000 + "]" * 100_000
HUGE = "1" + "0" * 400
LONG = "x" * 5000


@pytest.fixture
def submit(store: JobStore, material: Path):
    return lambda **settings: store.submit(make_train(material), **settings)


class Sleeper:
    """A worker that never ends."""

    pid = 1

    def poll(self) -> int | None:
        return None


def change(path: Path, name: str, text: str) -> None:
    """Replaces a field's value with a JSON text; a nested field is "table.name"."""
    values = json.loads(path.read_text())
    *tables, last = name.split(".")
    place = values
    for table in tables:
        place = place[table]
    place[last] = "PLACE"
    path.write_text(json.dumps(values).replace('"PLACE"', text))


def check_list(store: JobStore, damaged: str, others: list[str]) -> str:
    """The damaged job's error message, after checking that all other jobs are unchanged."""
    jobs = {job.id: job for job in store.list()}
    assert set(jobs) == {damaged, *others}
    assert {jobs[other].status for other in others} == {JobStatus.PENDING}
    assert jobs[damaged].status is JobStatus.FAILED
    json.dumps([job.to_dict() for job in jobs.values()], allow_nan=False)
    sentence = jobs[damaged].state.failure.sentence
    assert 0 < len(sentence) <= 400
    assert sentence.isprintable()
    return sentence


STATES = {
    "created_at": ("null", "NaN", "Infinity", "true", '"now"', HUGE),
    "step": ("null", "1.5", HUGE, "[]"),
    "adapters": ("null", '"abc"', "[3]", "[null]", '{"a": 1}'),
    "published": ("null", "7", "[[]]"),
    "notes": ("null", '"text"', "[1]"),
    "status": ("null", "[]", '"gone"'),
    "worker": ("3", "[]", '{"pid": 4}', '{"host": 1}'),
    "failure": ('"x"', "{}", '{"sentence": null}'),
    "loss": ("NaN", "-Infinity", '"low"', DEEP),
}


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("is_known", [True, False], ids=["known", "new"])
def test_a_state_of_odd_values_is_one_failed_job(name, is_known, store, submit):
    good, bad = submit(), submit()
    store.list()
    path = store.root / "jobs" / bad / "state.json"
    whole = path.read_text()
    for text in STATES[name]:
        path.write_text(whole)
        change(path, name, text)
        reader = store if is_known else JobStore(store.root)
        assert "state.json of job" in check_list(reader, bad, [good]), text
        reader.index.close()
    store.delete(bad)
    assert [job.id for job in store.list()] == [good]


@pytest.mark.parametrize("text", ["", " ", "\n\t", "\u200b", "\u3000\0"])
def test_a_failure_that_says_nothing_is_explained(text, store, submit):
    good, bad = submit(), submit()
    path = store.root / "jobs" / bad / "state.json"
    for failure in ({"sentence": text, "advice": [text, "wait"]}, None):
        for name, value in (("status", "failed"), ("failure", failure), ("notes", [text, "note"])):
            change(path, name, json.dumps(value))
        assert check_list(store, bad, [good]) == UNEXPLAINED
        shown = store.show(bad).to_dict()
        assert shown["notes"] == ["note"]
        assert list(shown["failure"]["advice"]) == (["wait"] if failure else [])


def test_an_error_without_a_text_is_explained(material):
    assert explain_error(FileError(" "), make_train(material)).sentence == UNEXPLAINED


CONFIGS = {
    "train.steps": (HUGE, "1e400", DEEP, "null"),
    "train.optimizer.learning_rate": (HUGE, "NaN"),
    "train.lora.targets": ('{"full": 1}', "[3]"),
    "train.optimizer.options": ('{"eps": NaN}', f'{{"x": {DEEP}}}'),
    "origin": ('{"a": Infinity}', "[]", f'{{"a": {HUGE}}}'),
    "train": ("[]",),
    "train.name": (f'"{LONG}"',),
    "train.nothing": (f'"{LONG}"',),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_settings_of_odd_values_are_one_failed_job(name, store, submit):
    good, bad = submit(), submit()
    path = store.root / "jobs" / bad / "config.json"
    whole = path.read_text()
    for text in CONFIGS[name]:
        path.write_text(whole)
        change(path, name, text)
        reader = JobStore(store.root)
        assert "config.json of job" in check_list(reader, bad, [good]), text
        reader.index.close()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes under a file's name")
@pytest.mark.parametrize("name", ["state.json", "config.json", "lock"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "link to a pipe"])
def test_a_non_regular_file_is_one_failed_job(name, kind, store, submit, tmp_path):
    good, bad = submit(), submit()
    path = store.root / "jobs" / bad / name
    path.unlink(missing_ok=True)
    if kind == "folder":
        path.mkdir()
    else:
        pipe = path if kind == "pipe" else tmp_path / "pipe"
        os.mkfifo(pipe)
        if pipe != path:
            path.symlink_to(pipe)
    assert f"{name} of job" in check_list(store, bad, [good])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes under a file's name")
def test_a_pipe_in_place_of_log_metrics_or_request_blocks_nothing(store, submit):
    job_id = submit()
    folder = store.catalog.find(job_id)
    for name in ("log.txt", "metrics.jsonl", "request.json"):
        os.mkfifo(folder.path / name)
    assert store.get(job_id).request is None
    for read in (store.read_log, store.read_metrics):
        with pytest.raises(FileError, match="pipe"):
            read(job_id)
    with pytest.raises(FileError, match="pipe"):
        MetricsReader().read(folder.metrics)
    with folder.open_log() as log:  # like a worker that starts
        log.write(b"said")
    assert store.read_log(job_id)["text"] == "said"


def test_other_jobs_are_started_and_settled_beside_an_odd_one(store, submit):
    """An odd "created_at" in a state once blocked the supervisor for all jobs at every tick."""
    dead, waiting, odd = submit(max_restarts=0), submit(), submit()
    path = store.root / "jobs"
    gone = '{"host": "here", "pid": 1, "started": 0.5}'
    change(path / dead / "state.json", "status", '"in_progress"')
    change(path / dead / "state.json", "worker", gone)
    change(path / odd / "state.json", "created_at", "null")
    reported: dict[str, object] = {}
    started: list[str] = []

    def launch(root, folder, devices):
        started.append(folder.id)
        return Sleeper()

    Supervisor(store, [CPU], listener=reported.__setitem__, launch=launch).tick()
    assert started == [waiting]
    assert store.get(dead).status is JobStatus.FAILED  # noticed
    assert reported[odd].status is JobStatus.FAILED
    assert store.pause(waiting).status is JobStatus.PAUSED


def test_an_unexpected_error_in_one_folder_is_a_failed_job_reported_once(
    store, submit, monkeypatch, caplog
):
    good, bad = submit(), submit()
    read_state = JobFolder.read_state

    def fail(folder):
        if folder.id == bad:
            raise ZeroDivisionError("unthought of")
        return read_state(folder)

    monkeypatch.setattr(JobFolder, "read_state", fail)
    assert "damaged (ZeroDivisionError)" in check_list(store, bad, [good])
    store.list()
    assert len([r for r in caplog.records if r.exc_info]) == 1


def test_a_job_that_cannot_be_supervised_does_not_affect_others(store, submit, monkeypatch, caplog):
    first, second = submit(), submit()
    started = []

    def prepare(job, device):
        if job.id == first:
            raise ZeroDivisionError("unthought of")
        return True

    def launch(root, folder, devices):
        started.append(folder.id)
        return Sleeper()

    two = [CPU, Device("cpu", "other-cpu", "")]
    supervisor = Supervisor(store, two, prepare=prepare, launch=launch)
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            supervisor.tick()
    assert started == [second]
    assert len([r for r in caplog.records if first in r.message]) == 1


def test_numbers_of_a_state_stay_valid_json(store, submit):
    job_id = submit()
    path = store.root / "jobs" / job_id / "state.json"
    for name, text in (
        ("status", '"in_progress"'),
        ("seconds_per_step", "1e308"),
        ("num_steps", "18446744073709551615"),
        ("heartbeat_at", "1e300"),
    ):
        change(path, name, text)
    (job,) = store.list()
    assert job.state.remaining_s is None
    json.dumps(job.to_dict(), allow_nan=False)
    assert "step 0 of 18446744073709551615" in job.describe()


def test_a_state_with_a_number_json_lacks_is_not_written(store, submit):
    folder = store.catalog.find(submit())
    before = folder.read_state()
    state = type(before)(loss=float("nan"))
    with pytest.raises(FileError, match=r"state\.json of job .* cannot be written"):
        folder.write_state(state)
    assert folder.read_state() == before
    assert [path.name for path in folder.path.glob(".*")] == []


def test_a_failure_of_any_length_is_shown_as_one_short_sentence(store, submit):
    job_id = submit()
    path = store.root / "jobs" / job_id / "state.json"
    change(path, "failure", json.dumps({"sentence": "a\x1b[1m\nb" * 9999, "advice": ["x" * 9999]}))
    (job,) = store.list()
    assert len(job.state.failure.sentence) <= 400
    assert job.state.failure.sentence.isprintable()
    assert len(job.state.failure.advice[0]) <= 400


# --- the index ---


@pytest.mark.parametrize(
    "harm",
    [
        "UPDATE jobs SET job = '{DEEP}'",
        "UPDATE jobs SET job = replace(job, '\"pending\"', '\"completed\"')",
        "UPDATE jobs SET job = CAST(x'ff00ff' AS TEXT)",
        "UPDATE jobs SET job = 7",
        "UPDATE jobs SET stamp = stamp || ' '",
        "UPDATE jobs SET id = 'x' WHERE rowid = 1",
    ],
    ids=["deep", "another status", "no text", "a number", "another stamp", "another id"],
)
def test_an_altered_row_is_never_a_job(harm, store, submit, caplog):
    jobs = [submit(), submit()]
    before = store.list()
    store.index.close()
    connection = sqlite3.connect(store.root / "jobs.sqlite")
    connection.execute(harm.replace("{DEEP}", DEEP))
    connection.commit()
    connection.close()
    store = JobStore(store.root)
    assert store.list() == before
    assert [job.id for job in before] == jobs
    assert "was damaged (a row is not what was written)" in caplog.text
    store.index.close()


def test_a_claim_of_any_owner_is_read():
    for owner in ("", "{}", DEEP, "NaN", '{"host": [], "pid": 1, "started": 0}', '{"pid": null}'):
        assert not has_ended(owner)
    for pid in (0, -1, 2**63):
        assert not is_running(WorkerIdentity(host="x", pid=pid, started=0.0))


@pytest.mark.parametrize("text", ["", DEEP, '{"sentence": NaN}', '{"advice": 3}', "[]", "\0"])
def test_a_failure_that_cannot_be_read_is_none(text, store, submit):
    folder = store.catalog.find(submit())
    get_failure_path(folder, 1).write_text(text)
    assert pop_failure(folder, 1) is None
    assert not get_failure_path(folder, 1).exists()


# --- submission ---


BAD_CHANGES = [
    *({"optimizer.options": {"eps": value}} for value in (float("nan"), float("inf"), 10**400)),
    {"steps": 10**400},
    {"steps": 10**5000},
    {"seed": 2**64},
    {"optimizer.learning_rate": 10**400},
    {"optimizer.learning_rate": float("nan")},
    {"objective.auxiliary": {"latent_l1": 10**400}},
    {"lora.rank": 10**400},
    {"lora.targets": {"full": 1}},
    {"lora.targets": ["full", {"x": 1}]},
    {"lora.rank_pattern": {LONG: "y" * 5000}},
    {"name": LONG},
    {"model.storage": LONG},
    {LONG: 1},
    {f"{LONG}.y": 1},
    {"samples.items": {"a": 1}},
    {"samples.guidance": float("nan")},
    {"lora": "\n" * 50},
]


def test_a_clone_of_odd_settings_is_refused_with_a_short_message(store, submit):
    job_id = submit()
    for changes in BAD_CHANGES:
        with pytest.raises(ConfigError) as caught:
            store.clone(job_id, changes)
        assert len(str(caught.value)) <= 400
        assert str(caught.value).isprintable()
    assert [path.name for path in (store.root / "jobs").iterdir()] == [job_id]


def test_options_nested_to_the_interpreters_limit_are_refused_and_leave_no_folder(store, submit):
    """json.dumps failed at about a thousand levels, and the incomplete folder remained."""
    job_id = submit()
    for depth in (12, 490, 3000):
        options: object = 1.0
        for _ in range(depth):
            options = {"a": options}
        with pytest.raises(ConfigError, match="inside each other"):
            store.clone(job_id, {"optimizer.options": options})
    assert [path.name for path in (store.root / "jobs").iterdir()] == [job_id]


def test_no_failure_of_a_submission_leaves_a_folder(store, submit, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(JobFolder, "write_state", fail)
    with pytest.raises(KeyboardInterrupt):
        submit()
    assert list((store.root / "jobs").iterdir()) == []


@pytest.mark.parametrize("what", ["model.source", "data.folder", "model.vae", "loras"])
def test_an_impossible_path_is_a_short_error(what, store, material):
    for place in (LONG, "a\0b", "\ud800", "/" + "y/" * 3000):
        settings = {"loras": place} if what == "loras" else {}
        train = make_train(material, **({} if settings else {what: place}))
        with pytest.raises(FileError) as caught:
            store.submit(train, **settings)
        assert len(str(caught.value)) <= 400
    assert list((store.root / "jobs").iterdir()) == []


@pytest.mark.parametrize("value", [2**64 - 1, 0])
def test_every_seed_of_comfyui_is_accepted(value, store, material):
    assert store.get(store.submit(make_train(material, seed=value))).settings.train.seed == value


@pytest.mark.parametrize(
    "text", ["", DEEP, "[]", '{"model": {}, "data": NaN}', HUGE, '{"model": 1}']
)
def test_unreadable_settings_of_a_lora_are_a_clear_error(text):
    with pytest.raises(ConfigError, match="the settings in this LoRA are damaged") as caught:
        read_settings({"qwen_edit_lora.config": text})
    assert len(str(caught.value)) <= 400


def test_settings_that_are_not_a_table_are_a_short_error():
    for values in ("x" * 9999, [["y" * 9999]], {"name": {}, "output": ["z" * 9999]}, {3: 4}):
        with pytest.raises(ConfigError) as caught:
            config_from_dict(values)
        assert len(str(caught.value)) <= 400


# --- links ---


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    folder = tmp_path / "outside"
    folder.mkdir()
    for name in ("a.safetensors", "step_00000001_x.png", "log.txt", "metrics.jsonl"):
        (folder / name).write_text('{"step": 1, "loss": 7}\n')
    return folder


@pytest.mark.parametrize("is_whole", [True, False], ids=["folder", "file"])
def test_links_in_a_jobs_folder_are_not_followed(is_whole, store, submit, secret, tmp_path):
    (tmp_path / "loras").mkdir()
    job_id = submit(loras=str(tmp_path / "loras"))
    folder = store.catalog.find(job_id)
    for name in ("samples", "adapters"):
        if is_whole:
            (folder.path / name).symlink_to(secret, target_is_directory=True)
        else:
            (folder.path / name).mkdir()
            for path in secret.iterdir():
                (folder.path / name / path.name).symlink_to(path)
    for name in ("log.txt", "metrics.jsonl", "a.safetensors"):
        (folder.path / name).symlink_to(secret / name)
    assert store.list_samples(job_id) == []
    assert store.list_images(job_id) == []
    assert store.list_adapters(job_id) == []
    with pytest.raises(UnknownImageError):
        store.read_image(job_id, "step_00000001_x.png")
    with pytest.raises(ConfigError, match="it has none yet"):
        store.publish(job_id, "a.safetensors")
    with pytest.raises(FileError, match=r"log\.txt is a link"):
        store.read_log(job_id)
    with pytest.raises(FileError, match=r"metrics\.jsonl is a link"):
        MetricsReader().read(folder.metrics)
    with folder.open_log() as log:
        log.write(b"of a worker")
    assert (secret / "log.txt").read_text() == '{"step": 1, "loss": 7}\n'
    assert store.read_log(job_id)["text"] == "of a worker"


@pytest.mark.skipif(sys.platform == "win32", reason="opens links")
def test_a_lock_that_is_a_link_creates_no_file_elsewhere(store, submit, tmp_path):
    job_id = submit()
    (store.catalog.find(job_id).path / "lock").symlink_to(tmp_path / "made")
    with pytest.raises(FileError):
        store.pause(job_id)
    assert not (tmp_path / "made").exists()
