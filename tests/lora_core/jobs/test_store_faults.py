"""The store when its index or files are broken, missing or in use, or the disk takes nothing."""

from __future__ import annotations

import dataclasses
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from qwen_edit_lora.lora_core import ConfigError, FileError
from qwen_edit_lora.lora_core.disk import writing
from qwen_edit_lora.lora_core.jobs import folder
from qwen_edit_lora.lora_core.jobs.folder import BusyFileError
from qwen_edit_lora.lora_core.jobs.job import (
    JobFailure,
    JobStatus,
    Request,
)
from qwen_edit_lora.lora_core.jobs.job_reporter import JobReporter, is_deleted
from qwen_edit_lora.lora_core.jobs.store import JobStore
from qwen_edit_lora.lora_core.jobs.supervisor import Supervisor
from qwen_edit_lora.lora_core.jobs.transitions import Event
from tiny_jobs import make_train, take


@pytest.fixture
def submit(store: JobStore, material: Path):
    return lambda **settings: store.submit(make_train(material), **settings)


# --- a broken index and broken files ---


def damage(path: Path) -> None:
    path.write_bytes(b"no database " * 500)
    for suffix in ("-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


def delete(path: Path) -> None:
    for file in path.parent.glob("jobs.sqlite*"):
        file.unlink()


def empty_tables(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("DROP TABLE jobs")
    connection.execute("CREATE TABLE jobs (id TEXT, stamp TEXT, job TEXT)")
    connection.execute("INSERT INTO jobs VALUES ('x', 'y', 'no json')")
    connection.commit()
    connection.close()


@pytest.mark.parametrize("harm", [damage, delete, empty_tables])
@pytest.mark.parametrize("is_open", [True, False], ids=["in use", "at start"])
def test_a_lost_or_broken_index_is_rebuilt(harm, is_open, store, submit, caplog):
    jobs = [submit(key="k"), submit()]
    before = store.list()
    if not is_open:
        store.index.close()
        store = JobStore(store.root)
    harm(store.root / "jobs.sqlite")
    assert store.list() == before
    assert [job.id for job in store.list()] == jobs
    assert submit(key="k") == jobs[0]
    store.index.close()
    if is_open:  # the next to open it
        store = JobStore(store.root)
        assert store.list() == before
        store.index.close()
    connection = sqlite3.connect(store.root / "jobs.sqlite")
    assert connection.execute("SELECT COUNT(*) FROM jobs").fetchone() == (2,)
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()
    if harm is not delete and not is_open:  # SQLite itself repairs what it has in its log
        assert "the job index was damaged" in caplog.text
        assert len([r for r in caplog.records if "index" in r.message]) == 1


def test_without_any_index_the_jobs_are_read_from_their_folders(store, submit, caplog):
    jobs = [submit(), submit()]
    store.index.close()
    delete(store.root / "jobs.sqlite")
    (store.root / "jobs.sqlite").mkdir()  # nothing that SQLite could open
    store = JobStore(store.root)
    assert [job.id for job in store.list()] == jobs
    assert store.cancel(jobs[0]).status is JobStatus.CANCELLED
    assert "the job index cannot be used" in caplog.text


@pytest.mark.parametrize("name", ["config.json", "state.json"])
@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"version": 1}', '{"version": 99}', '{"version": 1, "train": 3}']
)
def test_a_job_with_a_broken_file_is_a_failed_one_that_can_be_deleted(name, content, store, submit):
    good, bad = submit(), submit()
    (store.root / "jobs" / bad / name).write_text(content)
    store = JobStore(store.root)
    listed = {job.id: job for job in store.list()}
    assert listed[good].status is JobStatus.PENDING
    if name == "config.json" or content != '{"version": 1}':
        if not (name == "state.json" and "train" in content):
            failure = listed[bad].state.failure
            assert listed[bad].status is JobStatus.FAILED
            assert f"{name} of job {bad}" in failure.sentence
            with pytest.raises(FileError, match=name):
                store.get(bad)
    store.delete(bad)
    assert [job.id for job in store.list()] == [good]


@pytest.fixture
def in_use(monkeypatch):
    """`in_use(name, times)`: as on Windows, files of that name are unreadable for `times` tries."""

    def deny(name: str, times: float) -> None:
        open_any = os.open
        left = {"tries": times}

        def open_one(path, *arguments, **named) -> int:
            if Path(path).name == name and left["tries"] > 0:
                left["tries"] -= 1
                raise PermissionError(13, "The process cannot access the file")
            return open_any(path, *arguments, **named)

        monkeypatch.setattr(os, "open", open_one)

    monkeypatch.setattr(folder, "BRIEF_PATIENCE_S", 0.05)
    monkeypatch.setattr(writing, "RETRY_INTERVAL_S", 0.0)
    return deny


@pytest.mark.parametrize("name", ["config.json", "state.json", "request.json"])
def test_a_file_that_is_being_replaced_is_read_a_moment_later(name, store, submit, in_use):
    job_id = submit()
    store.catalog.find(job_id).write_request(Request.PAUSE)
    expected = store.get(job_id)
    in_use(name, 3)
    assert JobStore(store.root).get(job_id) == expected
    assert expected.request is Request.PAUSE


@pytest.mark.parametrize("is_known", ["from memory", "from the index"])
def test_a_running_job_whose_state_is_in_use_is_listed_as_it_was(is_known, store, submit, in_use):
    job_id = submit()
    job_folder = store.catalog.find(job_id)
    running = dataclasses.replace(job_folder.read_state(), status=JobStatus.IN_PROGRESS, step=1)
    job_folder.write_state(running)
    (before,) = store.list()
    job_folder.write_state(dataclasses.replace(running, step=2))
    if is_known == "from the index":
        store = JobStore(store.root)
    in_use("state.json", float("inf"))
    assert store.list() == [before]
    with pytest.raises(BusyFileError, match="state"):
        store.get(job_id)


def test_waiting_goes_on_while_the_state_is_in_use(store, submit, in_use):
    job_id = submit()
    asked = []

    def should_stop() -> bool:
        asked.append(True)
        if len(asked) == 2:
            in_use("state.json", float("inf"))
        return len(asked) == 4

    with pytest.raises(InterruptedError):
        store.wait(job_id, should_stop)
    assert len(asked) == 4


def test_a_state_is_written_over_one_that_is_being_read(store, submit, monkeypatch):
    folder_of_job = store.catalog.find(submit())
    replace, tries = os.replace, []

    def deny(source, target) -> None:
        tries.append(target)
        if len(tries) < 4:
            raise PermissionError(13, "The process cannot access the file")
        replace(source, target)

    monkeypatch.setattr(os, "replace", deny)
    JobReporter(folder_of_job, take(folder_of_job)).finish(Event.COMPLETE)
    assert len(tries) == 5
    assert folder_of_job.read_state().status is JobStatus.COMPLETED


def test_only_a_state_that_is_not_there_says_that_the_job_was_deleted(tmp_path, monkeypatch):
    assert is_deleted(tmp_path / "state.json")
    (tmp_path / "state.json").touch()
    assert not is_deleted(tmp_path / "state.json")

    def deny(path, **_):
        raise PermissionError(13, "Access is denied")

    monkeypatch.setattr(Path, "stat", deny)
    assert not is_deleted(tmp_path / "state.json")


@pytest.mark.parametrize(("ask", "status"), [("pause", "paused"), ("cancel", "cancelled")])
def test_what_is_asked_of_a_job_whose_worker_just_died_is_not_lost(ask, status, store, submit):
    """Nobody has its lock, and no supervisor has noticed yet."""
    job_id = submit()
    folder_of_job = store.catalog.find(job_id)
    folder_of_job.write_state(take(folder_of_job))
    assert getattr(store, ask)(job_id).request.value == ask
    assert store.get(job_id).status is JobStatus.IN_PROGRESS
    Supervisor(store, []).tick()
    job = store.get(job_id)
    assert (job.status.value, job.request) == (status, None)
    assert job.state.restarts == 1


@pytest.mark.parametrize("end", ["by an error", "by a kill"])
def test_a_withdrawn_pause_does_not_restart_a_job_that_fails_later(end, store, submit):
    job_id = submit(max_restarts=0)
    folder_of_job = store.catalog.find(job_id)
    reporter = JobReporter(folder_of_job, take(folder_of_job))
    with folder_of_job.lock.held(1.0):
        store.pause(job_id)
        store.resume(job_id)
        if end == "by an error":
            reporter.finish(Event.FAIL, failure=JobFailure(sentence="the loss is NaN"))
    Supervisor(store, []).tick()
    Supervisor(store, []).tick()
    job = store.get(job_id)
    assert (job.status, job.request) == (JobStatus.FAILED, None)
    assert store.resume(job_id).status is JobStatus.PENDING


# --- missing files and disks that refuse writes ---


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model.source": "gone.safetensors"}, "the model, gone.safetensors, does not exist"),
        ({"data.folder": "no_set"}, "the training set, no_set, does not exist"),
        ({"model.vae": "no_vae"}, "the VAE, no_vae, does not exist"),
    ],
)
def test_missing_files_are_reported_before_anything_is_queued(changes, sentence, store, material):
    with pytest.raises(FileError, match=sentence):
        store.submit(make_train(material, **changes))
    assert store.list() == []


def test_an_unwritable_loras_folder_is_reported_before_anything_is_queued(store, submit):
    with pytest.raises(
        FileError, match="the adapter cannot be written to the loras folder: it does"
    ):
        submit(loras="nowhere")
    with pytest.raises(FileError, match="the adapter cannot be written to the loras folder"):
        submit(loras="/proc/self")


@pytest.mark.parametrize("settings", [{"niceness": 20}, {"samples": {"steps": 0}}, {"lora": 1}])
def test_settings_out_of_range_are_refused(settings, submit, store):
    with pytest.raises(ConfigError):
        submit(**settings)
    assert store.list() == []


def test_a_root_that_cannot_be_created_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="the jobs' folder cannot be made"):
        JobStore(tmp_path / "file" / "root")


SUBMIT_WITHOUT_SPACE = """
import importlib.util, resource, signal, sys
from pathlib import Path

root, folder = Path(sys.argv[1]), Path(sys.argv[2])
spec = importlib.util.spec_from_file_location(
    "qwen_edit_lora", root / "__init__.py", submodule_search_locations=[str(root)]
)
sys.modules["qwen_edit_lora"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
from qwen_edit_lora.lora_core.errors import FileError
from qwen_edit_lora.lora_core.jobs.job_reporter import JobReporter, is_deleted
from qwen_edit_lora.lora_core.jobs.store import JobStore
from qwen_edit_lora.lora_core.jobs.supervisor import Supervisor
from qwen_edit_lora.lora_core.jobs.transitions import Event

store = JobStore(folder)
(job,) = store.list()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (64, resource.RLIM_INFINITY))
for action in (lambda: store.clone(job.id), lambda: store.pause(job.id)):
    try:
        action()
    except FileError as e:
        print(e)
print(len(store.list()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files")
def test_a_full_disk_is_a_clear_error_and_changes_nothing(store, submit):
    job_id = submit()
    root = Path(__file__).resolve().parents[3]
    result = subprocess.run(
        [sys.executable, "-c", SUBMIT_WITHOUT_SPACE, root, store.root],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    clone, pause, count = result.stdout.splitlines()
    assert "config.json of job" in clone
    assert "cannot be written" in clone
    assert f"state.json of job {job_id} cannot be written" in pause
    assert count == "1"
    assert store.get(job_id).status is JobStatus.PENDING
    assert sorted(p.name for p in (store.root / "jobs").iterdir()) == [job_id]
    assert [p for p in store.root.rglob(".*") if p.is_file()] == []
