"""Generated job folders: each is one job of the list, correct or failed, and no other job is
affected.

The folders are those of a real tiny job that paused after two steps. Any error outside our own
family fails the test, as does a message that cannot be shown or JSON that a browser refuses.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sqlite3
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from demo_base.damaged_jobs import FILES as FILES_OF_A_JOB
from demo_base.damaged_jobs import REPLACED_BY, damage
from hypothesis import example, given, settings
from hypothesis import strategies as st
from qwen_edit_lora.lora_core import LoraError
from qwen_edit_lora.lora_core.jobs.curves import MetricsReader, build_curves, build_health
from qwen_edit_lora.lora_core.jobs.devices import Device
from qwen_edit_lora.lora_core.jobs.job import Job, JobStatus
from qwen_edit_lora.lora_core.jobs.store import JobStore
from qwen_edit_lora.lora_core.jobs.supervisor import Supervisor

MAX_MESSAGE = 400
SHARE = settings.default.max_examples
JOBS = Path(__file__).parent.with_name("lora_core") / "jobs"
#: What a link in a job's folder leads to, and nobody may read through it.
PASSWD = Path("/etc/passwd").read_text() if os.name == "posix" else "no such file"
CPU = Device("cpu", "test-cpu", "")
GOOD, BAD = "20260131-120000-0123abcd", "20260131-120001-0123abcd"

for name, path in (
    ("tiny", JOBS.with_name("training") / "tiny.py"),
    ("tiny_jobs", JOBS / "tiny_jobs.py"),
):
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)


class Sleeper:
    """A worker that never ends."""

    pid = 1

    def poll(self) -> int | None:
        return None


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store's folder with a pending job, and one with all files of a run."""
    from tiny_jobs import make_material, make_train, train_here

    folder = tmp_path_factory.mktemp("whole")
    store = JobStore(folder / "root")
    train = make_train(make_material(folder), steps=2, **{"saving.health_every": 1})
    done = train_here(store, train, {"every": 1, "steps": 1})
    waiting = store.submit(train)
    jobs = store.root / "jobs"
    for job_id, name in ((waiting, GOOD), (done, BAD)):
        (jobs / job_id).rename(jobs / name)
    state = json.loads((jobs / BAD / "state.json").read_text())
    worker = {"host": "here", "pid": 1, "started": 0.5}
    failure = {"sentence": "it failed", "advice": ["lower lora.rank"], "log_tail": "the end"}
    state |= {"status": "paused", "worker": worker, "failure": failure, "notes": ["a note"]}
    (jobs / BAD / "state.json").write_text(json.dumps(state))
    (jobs / BAD / "log.txt").write_text("loading\nstep 1\n")
    (jobs / BAD / "request.json").write_text('{"version": 1, "request": "run"}')
    store.index.close()
    for path in (folder / "root").glob("jobs.sqlite*"):
        path.unlink()
    return folder / "root"


@contextmanager
def copied(whole: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name, "root")
        shutil.copytree(whole, root, ignore=shutil.ignore_patterns("checkpoints"))
        yield root


def check_text(text: str) -> None:
    assert 0 < len(text.strip()) <= len(text) <= MAX_MESSAGE, text
    assert text.isprintable(), repr(text)


def try_to(action: Any) -> Any:
    """Its result; None if it is refused, which is allowed."""
    try:
        return action()
    except LoraError as e:
        check_text(" ".join(str(e).split()))
        return None


def check_store(root: Path) -> Job:
    """Makes all requests of the panel and the supervisor; returns the damaged job as listed."""
    store = JobStore(root)
    try:
        jobs = {job.id: job for job in store.list()}
        assert set(jobs) == {GOOD, BAD}
        assert jobs[GOOD].status is JobStatus.PENDING
        json.dumps([job.to_dict() for job in jobs.values()], allow_nan=False)
        job = jobs[BAD]
        assert job.describe()
        assert (job.status is JobStatus.FAILED) <= (job.state.failure is not None)
        if job.state.failure is not None:
            check_text(job.state.failure.sentence)
        assert all(map(str.strip, (*job.state.notes, *job.state.alarms)))
        shown = store.show(BAD)  # its own page
        assert (shown.status, shown.state.failure) == (job.status, job.state.failure)
        check_job(store)
        started: list[str] = []

        def launch(root, folder, devices):
            started.append(folder.id)
            return Sleeper()

        reported: dict[str, Job | None] = {}
        two = [CPU, Device("cpu", "other-cpu", "")]
        Supervisor(store, two, listener=reported.__setitem__, launch=launch).tick()
        assert GOOD in started
        assert set(reported) == {GOOD, BAD}
        json.dumps([reported[BAD].to_dict()], allow_nan=False)
        assert store.pause(GOOD).status is JobStatus.PAUSED
        try_to(lambda: store.cancel(BAD))
        try_to(lambda: store.clone(BAD))
        try_to(lambda: store.delete(BAD))
        assert GOOD in {job.id for job in store.list()}
        return job
    finally:
        store.index.close()


def check_job(store: JobStore) -> None:
    """Makes the requests of the job's own page."""
    shown = [
        try_to(lambda: store.get(BAD).to_dict()),
        try_to(lambda: store.read_log(BAD)),
        try_to(lambda: store.read_metrics(BAD)),
    ]
    rows = try_to(lambda: MetricsReader().read(store.catalog.find(BAD).metrics)) or []
    shown += [build_curves(rows, 4), build_health(rows, 4)]
    json.dumps(shown, allow_nan=False)
    assert shown[1] is None or PASSWD.partition("\n")[0] not in shown[1]["text"]
    for path in [*store.list_samples(BAD), *store.list_adapters(BAD)]:
        assert not path.is_symlink()
        assert path.resolve().is_relative_to(store.root.resolve())
    assert all(store.read_image(BAD, one.name) for one in store.list_images(BAD))


# --- values of JSON, as texts, since some are none that Python would write ---

TEXTS = st.one_of(
    st.sampled_from(
        [
            *("null", "true", "NaN", "Infinity", "-Infinity", "1e999", "-0.0", "1e308", "{}", "[]"),
            *("1" + "0" * 400, "9" * 5000, "-9223372036854775809", "18446744073709551616"),
            *(
                '""',
                '" "',
                '"\\u200b\\n"',
                '"failed"',
                '"\\ud800"',
                '"\\u0000"',
                '"a\\nb\\u001b[1m"',
                '"../../x"',
                '"CON"',
            ),
            *(f'"{"x" * 5000}"', "[" * 5000 + "]" * 5000, '{"a":' * 5000 + "1" + "}" * 5000),
            *('"paused"', '"in_progress"', '"completed"', '"pending"', '[null, "a"]', '{"a": NaN}'),
        ]
    ),
    st.integers(-(2**70), 2**70).map(str),
    st.floats(allow_nan=True).map(json.dumps),
    st.text(max_size=30).map(json.dumps),
)
FILES = st.sampled_from(["state.json", "state.json", "config.json", "request.json"])
INDICES = st.lists(st.integers(0, 40), min_size=1, max_size=5)


def change(values: Any, indices: list[int]) -> bool:
    """Puts "PLACE" into the tree at the position given by the indices; False if there is none."""
    place = values
    for depth, index in enumerate(indices):
        keys = list(place) if isinstance(place, dict) else range(len(place))
        if not keys:
            return False
        key = keys[index % len(keys)]
        if depth == len(indices) - 1 or not isinstance(place[key], dict | list):
            place[key] = "PLACE"
            return True
        place = place[key]
    return False


@settings(max_examples=SHARE // 2)
@given(file=FILES, indices=INDICES, text=TEXTS)
@example(file="state.json", indices=[22, 0], text='""')  # a failure without a sentence
def test_a_value_of_any_type_in_any_place_is_a_correct_or_failed_job(whole, file, indices, text):
    with copied(whole) as root:
        path = root / "jobs" / BAD / file
        values = json.loads(path.read_text())
        if not change(values, indices):
            return
        path.write_text(json.dumps(values).replace('"PLACE"', text))
        check_store(root)


DAMAGES = st.one_of(
    st.tuples(st.just("cut"), st.integers(0, 4000), st.just(b"")),
    st.tuples(st.just("flip"), st.integers(0, 4000), st.binary(min_size=1, max_size=1)),
    st.tuples(st.just("put in"), st.integers(0, 4000), st.binary(max_size=20)),
    st.tuples(st.just("instead"), st.just(0), st.binary(max_size=60)),
    st.tuples(st.sampled_from(REPLACED_BY), st.just(0), st.just(b"")),
)


@settings(max_examples=SHARE // 2)
@given(
    damages=st.lists(st.tuples(st.sampled_from(FILES_OF_A_JOB), DAMAGES), min_size=1, max_size=3)
)
def test_files_of_any_bytes_or_none_are_a_correct_or_failed_job(whole, damages):
    with copied(whole) as root:
        for name, (kind, at, piece) in damages:
            damage(root / "jobs" / BAD / name, kind, at, piece)
        check_store(root)


@pytest.mark.parametrize("name", FILES_OF_A_JOB)
def test_a_file_that_is_something_else_is_a_correct_or_failed_job(whole, name):
    """Every kind for every file: chance would seldom make them."""
    for kind in REPLACED_BY:
        with copied(whole) as root:
            damage(root / "jobs" / BAD / name, kind)
            job = check_store(root)
            if name in ("state.json", "config.json") or (name == "lock" and kind != "nothing"):
                assert job.status is JobStatus.FAILED, kind


@pytest.mark.parametrize("name", ["state.json", "config.json", "request.json"])
@pytest.mark.parametrize("text", ["{}", '{"version": 1}', '{"version": 2}', "[]", "", "{" * 500])
def test_a_file_that_says_nothing_is_a_correct_or_failed_job(whole, name, text):
    with copied(whole) as root:
        (root / "jobs" / BAD / name).write_text(text)
        job = check_store(root)
        assert (job.status is JobStatus.FAILED) == (name != "request.json")


LINES = st.one_of(
    TEXTS.map(lambda text: f'{{"step": 2, "loss": {text}}}'),
    TEXTS.map(lambda text: f'{{"step": {text}}}'),
    TEXTS.map(lambda text: f'{{"step": 1, "health": {{"std": {text}}}}}'),
    TEXTS.map(lambda text: f'{{"step": 1, "health": {text}}}'),
    TEXTS,
).map(lambda text: text.encode("utf-8", "replace"))


@settings(max_examples=SHARE // 2)
@given(lines=st.lists(st.one_of(LINES, st.binary(max_size=30)), max_size=6))
def test_metrics_of_any_type_are_drawn_or_left_out(whole, lines):
    with tempfile.TemporaryDirectory() as name:
        path = Path(name, "metrics.jsonl")
        known = (whole / "jobs" / BAD / "metrics.jsonl").read_bytes()
        path.write_bytes(known + b"\n".join([*lines, b""]))
        rows = MetricsReader().read(path)
        assert [row["step"] for row in rows[:2]] == [1, 2]
        for points in (2, 3, 1000):
            json.dumps([build_curves(rows, points), build_health(rows, points)], allow_nan=False)


COLUMNS = st.sampled_from(["id", "stamp", "job", "digest"])
CELLS = st.one_of(TEXTS, st.none(), st.binary(max_size=20), st.integers(-9, 9), st.floats())


@settings(max_examples=SHARE // 4)
@given(column=COLUMNS, cell=CELLS, row=st.sampled_from([GOOD, BAD]))
def test_a_row_of_the_index_with_any_cell_changes_no_job(whole, column, cell, row):
    with copied(whole) as root:
        store = JobStore(root)
        before = store.list()
        store.index.close()
        connection = sqlite3.connect(root / "jobs.sqlite")
        try:
            connection.execute(f"UPDATE jobs SET {column} = ? WHERE id = ?", (cell, row))
            connection.commit()
        except sqlite3.IntegrityError:  # NOT NULL
            return
        finally:
            connection.close()
        store = JobStore(root)
        assert store.list() == before
        store.index.close()
