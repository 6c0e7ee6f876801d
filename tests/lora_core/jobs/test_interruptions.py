"""Interruptions: withdrawn pauses, kills, moves, deletions; nothing is lost or left over."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from qwen_edit_lora.lora_core import FileError, LoraError
from qwen_edit_lora.lora_core.formats import files
from qwen_edit_lora.lora_core.jobs import publication
from qwen_edit_lora.lora_core.jobs import store as store_module
from qwen_edit_lora.lora_core.jobs.folder import JobFolder
from qwen_edit_lora.lora_core.jobs.identity import describe_host, identify
from qwen_edit_lora.lora_core.jobs.job import (
    JobStatus,
    UnknownJobError,
    WorkerIdentity,
)
from qwen_edit_lora.lora_core.jobs.job_reporter import JobReporter
from qwen_edit_lora.lora_core.jobs.store import JobStore
from qwen_edit_lora.lora_core.jobs.supervisor import Supervisor
from qwen_edit_lora.lora_core.jobs.training_job import run_job
from qwen_edit_lora.lora_core.jobs.worker import finish_stopped
from tiny_jobs import (
    Fickle,
    assert_equal_weights,
    make_train,
    read_weights,
    run_here,
    take,
    train_here,
)

NAMES = ("tiny.safetensors", "tiny_ema.safetensors")
SAMPLES = {"every": 3, "steps": 2}
STEPS = 4
JOB = "20260131-120000-0123abcd"


@pytest.fixture(scope="module")
def whole(material, tmp_path_factory):
    """The folder of a job that was not interrupted."""
    store = JobStore(tmp_path_factory.mktemp("whole"))
    job_id = train_here(store, make_train(material, steps=STEPS), SAMPLES)
    yield store.catalog.find(job_id)
    store.index.close()


@pytest.fixture
def submit(store, material):
    return lambda **settings: store.submit(make_train(material, steps=STEPS), **settings)


def assert_same_run(ours: Path, whole: JobFolder) -> None:
    for name in NAMES:
        assert_equal_weights(ours / name, whole.path / name)
    expected = {path.name: read_weights(path)["samples"] for path in whole.samples.iterdir()}
    assert {path.name for path in (ours / "samples").iterdir()} == set(expected)
    for name, latents in expected.items():
        assert bool((read_weights(ours / "samples" / name)["samples"] == latents).all())


# --- withdrawn pauses ---


def test_a_pause_withdrawn_before_it_took_effect_costs_nothing(store, submit, whole):
    """At every second point where a run checks for it: before and in a sample, before a step."""
    first = store.catalog.find(submit(samples=SAMPLES))
    calm = Fickle(first, None)
    assert run_job(first.read_settings(), first, ["cpu"], calm)
    assert_same_run(first.path, whole)
    met = set()
    for at in range(0, calm.count, 2):
        folder = store.catalog.find(submit(samples=SAMPLES, max_restarts=0))
        reporter = Fickle(folder, at)
        assert run_job(folder.read_settings(), folder, ["cpu"], reporter), at
        assert_same_run(folder.path, whole)
        assert reporter.state.restarts == 0
        met.add(reporter.count > calm.count)
        shutil.rmtree(folder.path)
    assert True in met


def test_a_pause_withdrawn_as_the_worker_ends_is_not_a_restart(store, submit, whole):
    job_id = submit(samples=SAMPLES, max_restarts=0)
    folder = store.catalog.find(job_id)
    settings, reporter = folder.read_settings(), Fickle(folder, 9, 10**6)
    assert not run_job(settings, folder, ["cpu"], reporter)
    assert 0 < reporter.state.step < STEPS
    finish_stopped(settings, folder, reporter)  # the request is taken back by now
    job = store.get(job_id)
    assert (job.status, job.state.restarts, job.state.failure) == (JobStatus.PENDING, 0, None)
    Supervisor(store, []).tick()
    assert store.get(job_id).request is None
    run_here(store, job_id)
    assert_same_run(folder.path, whole)


def test_a_shutdown_still_counts(store, submit):
    folder = store.catalog.find(submit(max_restarts=0))
    reporter = JobReporter(folder, take(folder))
    reporter.is_terminated = lambda: True
    finish_stopped(folder.read_settings(), folder, reporter)
    assert folder.read_state().status is JobStatus.FAILED


# --- folders that disappear ---


class Mover(JobReporter):
    """Moves the job's folder away at a moment."""

    def __init__(self, folder: JobFolder, moment: str, target: Path):
        super().__init__(folder, take(folder))
        self.moment, self.target = moment, target

    def move(self, moment: str) -> None:
        if moment == self.moment and self.folder.path.exists():
            self.folder.path.rename(self.target)

    def log(self, sentence: str) -> None:
        self.move("while it loads")  # the first thing that a worker says

    def report(self, report) -> None:
        super().report(report)
        self.move(f"after step {report.step}")

    def update(self, **changes) -> None:
        super().update(**changes)
        if phase := changes.get("phase"):
            self.move(f"at {phase.value}")


MOMENTS = [
    *(("while it loads", 1), ("at training", 1), ("at sampling", 0), ("after step 1", 1)),
    *(("after step 3", 0), (f"after step {STEPS}", 0)),
]


@pytest.mark.parametrize(("moment", "adapter_every"), MOMENTS)
def test_a_moved_folder_is_not_recreated_and_continues_elsewhere(
    moment, adapter_every, store, material, whole, tmp_path
):
    train = make_train(material, steps=STEPS, **{"saving.adapter_every": adapter_every})
    job_id = store.submit(train, samples=SAMPLES)
    folder = store.catalog.find(job_id)
    other = JobStore(tmp_path / "other")
    target = other.root / "jobs" / job_id
    reporter = Mover(folder, moment, target)
    with pytest.raises((FileError, OSError)):
        run_job(folder.read_settings(), folder, ["cpu"], reporter)
    assert not folder.path.exists()
    assert store.list() == []
    run_here(other, job_id)
    assert_same_run(target, whole)
    assert {path.name for path in target.iterdir()} >= {*NAMES, "state.json", "samples"}
    other.index.close()


# --- concurrently deleted jobs ---


def delete_before(monkeypatch, owner, name: str, path: Path) -> None:
    """Deletes the job just before a function is called."""
    function = getattr(owner, name)

    def call(*arguments, **named):
        shutil.rmtree(path, ignore_errors=True)
        return function(*arguments, **named)

    monkeypatch.setattr(owner, name, call)


@pytest.mark.parametrize(
    ("action", "owner", "name"),
    [
        (lambda store, job: store.pause(job), JobStore, "_acquire"),
        (lambda store, job: store.cancel(job), JobStore, "_acquire"),
        (lambda store, job: store.pause(job), JobStore, "apply_request"),
        (lambda store, job: store.delete(job), JobStore, "_acquire"),
        (lambda store, job: store.delete(job), store_module, "rename"),
        (lambda store, job: store.publish(job), store_module, "publish"),
        (lambda store, job: store.read_log(job), store_module, "open_inside"),
        (lambda store, job: store.read_metrics(job), store_module, "read_metrics"),
        (lambda store, job: store.get(job), JobFolder, "read_state"),
        (lambda store, job: store.get(job), JobFolder, "read_settings"),
    ],
)
def test_a_concurrently_deleted_job_is_not_found(
    action, owner, name, store, submit, tmp_path, monkeypatch
):
    loras = tmp_path / "loras"
    loras.mkdir()
    job_id = submit(loras=str(loras))
    folder = store.catalog.find(job_id)
    (folder.path / "tiny.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")
    state = folder.read_state()
    folder.write_state(type(state)(adapters=("tiny.safetensors",), created_at=1.0))
    fresh = JobStore(store.root)
    delete_before(monkeypatch, owner, name, folder.path)
    with pytest.raises(UnknownJobError, match=f"there is no job {job_id}"):
        action(fresh, job_id)
    monkeypatch.undo()
    assert list(loras.iterdir()) == []
    assert store.list() == []
    fresh.index.close()


def test_a_storm_of_requests_is_answered_or_not_found(store, submit, tmp_path):
    (tmp_path / "loras").mkdir()
    jobs = [submit(loras=str(tmp_path / "loras")) for _ in range(6)]
    strange: list[Exception] = []

    def storm(action) -> None:
        own = JobStore(store.root)
        for job_id in jobs:
            try:
                action(own, job_id)
            except FileError as e:
                strange.append(e)
            except LoraError:
                pass
            except Exception as e:  # noqa: BLE001 - whatever it is, the test fails with it
                strange.append(e)
        own.index.close()

    actions = [JobStore.pause, JobStore.cancel, JobStore.resume, JobStore.delete, JobStore.delete]
    threads = [threading.Thread(target=storm, args=(action,)) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert strange == []
    assert store.list() == []


# --- publications ---


@pytest.fixture
def adapter(whole) -> Path:
    return whole.path / NAMES[0]


@pytest.fixture
def loras(tmp_path: Path) -> Path:
    folder = tmp_path / "loras"
    folder.mkdir()
    return folder


def test_a_copy_in_progress_is_left_to_its_process(adapter, loras, monkeypatch):
    copy = publication.shutil.copyfileobj

    def copy_beside_a_deletion(*arguments):
        publication.remove_unfinished(loras, JOB)
        copy(*arguments)

    monkeypatch.setattr(publication.shutil, "copyfileobj", copy_beside_a_deletion)
    assert publication.publish([adapter], loras, JOB) == (NAMES[0],)
    assert_equal_weights(loras / NAMES[0], adapter)
    assert [path.name for path in loras.iterdir()] == [NAMES[0]]


def test_leftovers_of_a_dead_process_are_removed(loras):
    this = identify()
    dead = WorkerIdentity(host=describe_host(), pid=this.pid, started=this.started - 1)
    for owner in (dead, None):
        name = publication.name_owner(owner)
        (loras / f".{JOB}.{name}.0123456789abcdef.tmp").touch()
    mine = publication.name_temporary(loras, JOB)
    mine.touch()
    publication.remove_unfinished(loras, JOB)
    assert list(loras.iterdir()) == [mine]


def test_publications_within_a_second_are_one_file_per_job(adapter, loras):
    jobs = [f"20260131-120000-0123abc{i}" for i in range(4)]
    names: dict[str, tuple[str, ...]] = {}

    def publish(job_id: str) -> None:
        names[job_id] = publication.publish([adapter], loras, job_id)

    threads = [threading.Thread(target=publish, args=(job,)) for job in jobs for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = {path.name: publication.read_job_id(path) for path in loras.iterdir()}
    assert sorted(found.values()) == jobs  # the same job's twice is the same file
    assert {job: (name,) for name, job in found.items()} == names
    for name in found:
        assert_equal_weights(loras / name, adapter)


def test_a_copy_that_cannot_be_deleted_is_reported(store, submit, adapter, loras, monkeypatch):
    job_id = submit(loras=str(loras))
    folder = store.catalog.find(job_id)
    (name,) = publication.publish([adapter], loras, job_id)
    state = folder.read_state()
    folder.write_state(type(state)(published=(name,), created_at=1.0))
    unlink = Path.unlink

    def refuse(path, missing_ok=False):
        if path.parent == loras:
            raise PermissionError(errno.EACCES, "Permission denied")
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(FileError, match="the job is deleted, but tiny"):
        store.delete(job_id, with_adapter=True)
    assert store.list() == []


def test_an_adapter_with_a_damaged_header_is_not_published(store, submit, loras):
    job_id = submit(loras=str(loras))
    path = store.catalog.find(job_id).path / "x.safetensors"
    for header in (b"", b"[]", b'{"__metadata__": 7}', b"\xff\xff", b"[" * 10**5):
        path.write_bytes(len(header).to_bytes(8, "little") + header)
        with pytest.raises(FileError) as caught:
            store.publish(job_id, path.name)
        assert len(str(caught.value)) <= 400
    assert list(loras.iterdir()) == []


# --- kills while a job is submitted ---

TRACED = tuple(
    f"{os.sep}{name}.py" for name in ("store", "submission", "publication", "folder", "files")
)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks what is killed")
def test_a_submission_killed_at_any_line_leaves_a_complete_job_or_nothing(store, material, loras):
    train = make_train(material)
    jobs = store.root / "jobs"
    line, is_over = 0, False
    while not is_over:
        line += 1
        child = os.fork()
        if not child:
            try:
                kill_at_line(line)
                store.submit(train, loras=str(loras))
                sys.settrace(None)
                os._exit(0)
            finally:
                os._exit(99)
        _, status = os.waitpid(child, 0)
        is_over = status == 0
        assert is_over or os.WTERMSIG(status) == signal.SIGKILL
        for path in jobs.glob(".*"):
            long_ago = time.time() - 3600
            os.utime(path, (long_ago, long_ago))
        store.remove_leftovers()
        assert list(loras.iterdir()) == []
        assert [path.name for path in jobs.iterdir() if path.name.startswith(".")] == []
        for job in store.list():
            assert job.status is JobStatus.PENDING
            assert job.settings.loras == str(loras)
            store.delete(job.id)
    assert line > 60  # it did reach the lines


def kill_at_line(number: int) -> None:
    """Ends this process at the n-th line it runs of the code that writes a job."""
    left = number

    def look(frame, event, _):
        nonlocal left
        if not frame.f_code.co_filename.endswith(TRACED):
            return None
        if event == "line":
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return look

    sys.settrace(look)


# --- disk errors ---


def test_a_file_name_the_disk_refuses_costs_no_step(store, submit, whole, monkeypatch):
    """As on eCryptfs, which allows 143 bytes; the check at submission allows 255."""
    job_id = submit(samples=SAMPLES)
    folder = store.catalog.find(job_id)
    reporter = JobReporter(folder, take(folder))
    replace = os.replace

    def refuse(source, target) -> None:
        if Path(target).name == NAMES[0]:
            raise OSError(errno.ENAMETOOLONG, "File name too long")
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", refuse)
    with pytest.raises(FileError, match="the name is too long"):
        run_job(folder.read_settings(), folder, ["cpu"], reporter)
    monkeypatch.undo()
    assert (folder.path / "checkpoints" / f"step_{STEPS:08d}").is_dir()
    run_here(store, job_id)
    assert_same_run(folder.path, whole)


def test_damage_to_any_file_of_the_newest_checkpoint_costs_one_step_and_no_bit(
    store, submit, whole
):
    first = store.catalog.find(submit(samples=SAMPLES))
    settings = first.read_settings()
    assert not run_job(settings, first, ["cpu"], StopsAfter(first, 2))
    newest = Path("checkpoints") / "step_00000002"
    names = sorted(path.name for path in (first.path / newest).iterdir())
    assert len(names) == 5
    for name in names:
        job_id = submit(samples=SAMPLES)
        folder = store.catalog.find(job_id)
        shutil.copytree(first.path, folder.path, dirs_exist_ok=True)
        path = folder.path / newest / name
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        run_here(store, job_id)
        assert_same_run(folder.path, whole)
        assert any("skipped" in note for note in folder.read_state().notes), name
        shutil.rmtree(folder.path)


class StopsAfter(JobReporter):
    """Somebody asks for a pause after so many steps."""

    def __init__(self, folder: JobFolder, step: int):
        super().__init__(folder, take(folder))
        self.last = step

    def should_stop(self) -> bool:
        return self.state.step >= self.last
