"""The store without any worker: its API, and disk errors."""

from __future__ import annotations

import dataclasses
import json
import os
import threading
import time
from pathlib import Path

import pytest
from qwen_edit_lora.lora_core import ConfigError
from qwen_edit_lora.lora_core.jobs.folder import JobFolder
from qwen_edit_lora.lora_core.jobs.job import (
    JobSettings,
    JobStateError,
    JobStatus,
    Phase,
    UnknownJobError,
    WorkerIdentity,
)
from qwen_edit_lora.lora_core.jobs.store import JobStore
from tiny_jobs import make_train


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
