"""The store without any worker: its API, and disk errors."""

from __future__ import annotations

import dataclasses
import json
import os
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from qwen_edit_lora.lora_core import ConfigError, FileError
from qwen_edit_lora.lora_core.disk import writing
from qwen_edit_lora.lora_core.jobs import folder
from qwen_edit_lora.lora_core.jobs.folder import BusyFileError, JobFolder
from qwen_edit_lora.lora_core.jobs.job import (
    JobFailure,
    JobSettings,
    JobStateError,
    JobStatus,
    Phase,
    Request,
    UnknownJobError,
    WorkerIdentity,
)
from qwen_edit_lora.lora_core.jobs.job_reporter import JobReporter, is_deleted
from qwen_edit_lora.lora_core.jobs.store import JobStore
from qwen_edit_lora.lora_core.jobs.supervisor import Supervisor
from qwen_edit_lora.lora_core.jobs.transitions import Event
from tiny_jobs import make_train, take


@pytest.fixture
def submit(store: JobStore, material: Path):
    return lambda **settings: store.submit(make_train(material), **settings)


def test_a_submitted_job_is_a_folder_with_everything_in_it(store, submit, material):
    started = time.monotonic()
    job_id = submit(samples={"every": 3, "items": ["item_1"]}, origin={"dataset": "a1"})
    assert time.monotonic() - started < 1
    job = store.get(job_id)
    assert job.status is JobStatus.PENDING
    assert job.settings.samples.items == ("item_1",)
    assert job.settings.origin == {"dataset": "a1"}
    folder = store.root / "jobs" / job_id
    assert job.settings.train == dataclasses.replace(make_train(material), output=str(folder))
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "state.json"]
    assert JobStore(store.root).get(job_id) == job


def test_the_public_view_of_a_job_contains_no_path(store, submit, tmp_path):
    shown = json.dumps(store.get(submit(loras=str(tmp_path))).to_dict())
    assert str(tmp_path) not in shown
    assert json.loads(shown)["status"] == "pending"


def test_jobs_are_listed_in_the_order_they_came_from_several_threads(store, material):
    train = make_train(material)
    threads = [threading.Thread(target=store.submit, args=(train,)) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    jobs = store.list()
    assert len({job.id for job in jobs}) == 12
    assert jobs == sorted(jobs, key=lambda job: (job.state.created_at, job.id))


@pytest.mark.parametrize(
    "bad",
    [
        "",
        "..",
        "../jobs",
        "a/b",
        "20260131-120000-0123ABCD",
        "٢٠260131-120000-0123abcd",
        "x" * 300,
        None,
        "\0",
        "jobs",
    ],
)
def test_an_invalid_id_never_becomes_a_path(bad, store):
    for method in (store.get, store.pause, store.delete, store.read_log, store.clone):
        with pytest.raises(ConfigError, match="is not a job id; expected one such as"):
            method(bad)


def test_an_unknown_id_is_a_clear_error(store):
    with pytest.raises(UnknownJobError, match="there is no job 20260131-120000-0123abcd"):
        store.get("20260131-120000-0123abcd")


def test_a_waiting_job_is_paused_resumed_and_cancelled_at_once(store, submit):
    first, second = submit(), submit()
    assert store.pause(first).status is JobStatus.PAUSED
    resumed = store.resume(first)
    assert resumed.status is JobStatus.PENDING
    assert resumed.state.queued_at > store.get(second).state.queued_at  # at the end of the queue
    with pytest.raises(JobStateError, match="is waiting and cannot be resumed"):
        store.resume(first)
    assert store.cancel(first).status is JobStatus.CANCELLED
    with pytest.raises(JobStateError, match="is cancelled and cannot be paused"):
        store.pause(first)
    assert store.resume(first).status is JobStatus.PENDING


def test_the_same_key_gives_the_same_job_until_it_failed_or_was_cancelled(store, submit):
    first = submit(key="graph 1")
    assert submit(key="graph 1") == first
    assert submit(key="graph 2") != first
    assert submit() != submit()
    store.cancel(first)
    assert submit(key="graph 1") != first
    assert len(store.list()) == 5


def test_the_same_key_from_several_threads_is_one_job(store, material):
    train, ids = make_train(material), []
    threads = [
        threading.Thread(target=lambda: ids.append(store.submit(train, key="k"))) for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ids) == 6
    assert len(set(ids)) == len(store.list()) == 1


def test_only_leftovers_of_killed_processes_are_removed(store, submit):
    job_id = submit()
    folder = store.root / "jobs"
    for name in (".a.new", ".b.new", ".c.deleted"):
        (folder / name).mkdir()
    long_ago = time.time() - 3600
    os.utime(folder / ".a.new", (long_ago, long_ago))
    store.remove_leftovers()
    assert sorted(p.name for p in folder.iterdir()) == [".b.new", job_id]


def test_a_clone_has_the_changes_and_nothing_of_the_progress(store, submit, tmp_path):
    original = submit(key="k", loras=str(tmp_path), niceness=3)
    store.cancel(original)
    changes = {"steps": 9, "lora.rank": 2, "name": "other", "samples.every": 5}
    clone = store.get(store.clone(original, changes))
    before = store.get(original).settings
    assert (clone.settings.train.steps, clone.settings.train.lora.rank) == (9, 2)
    assert (clone.name, clone.settings.samples.every) == ("other", 5)
    assert (clone.settings.loras, clone.settings.niceness) == (before.loras, 3)
    assert clone.settings.train.optimizer == before.train.optimizer
    assert clone.settings.origin["clone_of"] == original
    assert (clone.status, clone.state.num_steps, clone.settings.key) == (JobStatus.PENDING, 9, "")
    with pytest.raises(ConfigError, match="did you mean rank"):
        store.clone(original, {"lora.rang": 2})
    with pytest.raises(ConfigError, match=r"there is no setting 'lorra\.rank'"):
        store.clone(original, {"lorra.rank": 2})


def test_deleting_removes_only_the_jobs_folder(store, submit, tmp_path):
    loras = tmp_path / "loras"
    loras.mkdir()
    (loras / "tiny.safetensors").write_bytes(b"mine")
    keep, gone = submit(loras=str(loras)), submit(loras=str(loras))
    folder = store.catalog.find(gone)
    state = dataclasses.replace(folder.read_state(), published=("tiny.safetensors",))
    folder.write_state(state)
    store.delete(gone, with_adapter=True)
    assert [job.id for job in store.list()] == [keep]
    assert not folder.path.exists()
    # its metadata does not name this job
    assert (loras / "tiny.safetensors").read_bytes() == b"mine"
    assert [p.name for p in (store.root / "jobs").iterdir()] == [keep]


def test_jobs_are_deleted_while_others_list_them(store, submit):
    jobs = [submit() for _ in range(30)]
    other = JobStore(store.root)
    errors: list[Exception] = []

    def delete_all() -> None:
        try:
            for job_id in jobs:
                other.delete(job_id)
        except Exception as e:  # noqa: BLE001 - whatever it is, the test fails with it
            errors.append(e)

    thread = threading.Thread(target=delete_all)
    thread.start()
    while thread.is_alive():
        assert {job.status for job in JobStore(store.root).list()} <= {JobStatus.PENDING}
    thread.join()
    assert errors == []
    assert store.list() == []
    other.index.close()


def test_a_link_among_the_jobs_is_not_a_job(store, submit, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("x")
    link = store.root / "jobs" / "20260131-120000-0123abcd"
    link.symlink_to(outside, target_is_directory=True)
    with pytest.raises(UnknownJobError):
        store.delete(link.name)
    assert (outside / "precious").exists()
    assert store.list() == []


def test_a_job_held_by_its_worker_gets_a_request_and_is_not_changed(store, submit):
    job_id = submit()
    folder = store.catalog.find(job_id)
    assert folder.lock.try_acquire()
    state = dataclasses.replace(
        folder.read_state(), status=JobStatus.IN_PROGRESS, phase=Phase.TRAINING
    )
    folder.write_state(state)
    assert store.pause(job_id).request == "pause"
    assert store.cancel(job_id).request == "cancel"  # the later one counts
    assert store.resume(job_id).request == "run"  # and may be withdrawn
    assert store.get(job_id).state == state
    folder.lock.release()


def test_waiting_can_be_stopped_and_the_job_goes_on(store, submit):
    job_id = submit()
    reported, asked = [], []
    with pytest.raises(InterruptedError, match="the job continues"):
        store.wait(
            job_id, should_stop=lambda: len(asked) > 1 or asked.append(1), notify=reported.append
        )
    assert [job.status for job in reported] == [JobStatus.PENDING]
    assert store.wait(job_id, timeout_s=0).status is JobStatus.PENDING
    store.cancel(job_id)
    assert store.wait(job_id).status is JobStatus.CANCELLED


def test_the_log_is_read_from_the_end_or_from_an_offset(store, submit):
    job_id = submit()
    assert store.read_log(job_id) == {"text": "", "offset": 0, "next_offset": 0, "size": 0}
    store.catalog.find(job_id).log.write_bytes("ä1234\n".encode() * 10)  # 7 bytes each
    tail = store.read_log(job_id, limit=7)
    assert tail == {"text": "ä1234\n", "offset": 63, "next_offset": 70, "size": 70}
    first = store.read_log(job_id, offset=0, limit=14)
    assert (first["text"], first["next_offset"]) == ("ä1234\n" * 2, 14)
    assert store.read_log(job_id, offset=999)["text"] == ""


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


# --- processes and locks of the system ---


def test_a_reused_pid_is_another_process():
    from qwen_edit_lora.lora_core.jobs.identity import identify, is_running

    this = identify()
    assert is_running(this)
    assert not is_running(dataclasses.replace(this, started=this.started - 1))
    assert not is_running(dataclasses.replace(this, host="another machine"))
    assert not is_running(WorkerIdentity(host=this.host, pid=2**22 + 1, started=this.started))
    assert not is_running(None)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_lock_dies_with_its_holder_even_where_the_holder_forked(tmp_path):
    from qwen_edit_lora.lora_core.jobs.locks import FileLock

    lock = FileLock(tmp_path / "lock")
    ready, go = os.pipe(), os.pipe()
    holder = os.fork()
    if not holder:
        lock.try_acquire()
        child = os.fork()
        if not child:  # lives on without the holder
            os.write(ready[1], b"x")
            os.read(go[0], 1)
            os._exit(0)
        time.sleep(60)
        os._exit(0)
    os.read(ready[0], 1)
    assert lock.is_held()
    assert not lock.try_acquire()
    os.kill(holder, 9)
    os.waitpid(holder, 0)
    assert not lock.is_held()
    assert lock.try_acquire()
    assert not FileLock(lock.path).try_acquire()  # not even from the same process
    lock.release()
    os.write(go[1], b"x")


def test_settings_survive_a_round_trip(tmp_path, material):
    settings = JobSettings(
        train=make_train(material, output=str(tmp_path)),
        loras="x",
        max_restarts=0,
        origin={"a": [1]},
    )
    folder = JobFolder(tmp_path)
    folder.write_settings(settings)
    assert folder.read_settings() == settings
