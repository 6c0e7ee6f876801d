"""Links in a job's folder, as in one that came from elsewhere.

Nothing is written or deleted through them, and the job fails in one sentence.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from qwen_edit_lora.lora_core import FileError
from qwen_edit_lora.lora_core.disk import own_folders
from qwen_edit_lora.lora_core.jobs.devices import Device
from qwen_edit_lora.lora_core.jobs.job import JobFailure, JobStatus
from qwen_edit_lora.lora_core.jobs.job_reporter import JobReporter
from qwen_edit_lora.lora_core.jobs.supervisor import Supervisor
from qwen_edit_lora.lora_core.jobs.team import clear_failures, write_failure
from qwen_edit_lora.lora_core.jobs.training_job import run_job
from qwen_edit_lora.lora_core.training.run.adapter_files import write_adapters
from qwen_edit_lora.lora_core.training.run.checkpoint import CheckpointFolder, remove_leftovers
from qwen_edit_lora.lora_core.training.run.metrics import MetricsFile
from qwen_edit_lora.lora_core.training.sampling.images import write_image
from tiny_jobs import make_train, run_here, run_to_end, take

FOLDERS = ("checkpoints", "adapters", "samples")
#: What a killed process may leave, and is deleted.
LEFTOVER = ".0123456789abcdef.tmp"


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / LEFTOVER).write_bytes(b"the user's")
    (folder / "tiny_00000001.safetensors").write_bytes(b"the user's too")
    return folder


def list_contents(folder: Path) -> dict[str, str]:
    """Also when it changed: a file that came and went again was written outside too."""
    return {".": str(folder.stat().st_mtime_ns)} | {
        str(path.relative_to(folder)): (
            hashlib.blake2b(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        )
        for path in folder.rglob("*")
    }


@pytest.fixture
def submit(store, material):
    def make() -> str:
        changes = {"saving.adapter_every": 1, "saving.keep_adapters": 1}
        train = make_train(material, steps=2, **changes)
        return store.submit(train, samples={"every": 1, "steps": 1})

    return make


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("is_dangling", [False, True])
def test_a_job_with_a_linked_folder_fails_before_it_writes(
    store, submit, outside, name, is_dangling
):
    job_id = submit()
    folder = store.catalog.find(job_id)
    target = outside / "nothing" if is_dangling else outside
    (folder.path / name).symlink_to(target, target_is_directory=True)
    before = list_contents(outside)
    reporter = JobReporter(folder, take(folder))
    with pytest.raises(FileError, match=rf"{name} in {job_id} is a link; expected a folder of its"):
        run_job(folder.read_settings(), folder, ["cpu"], reporter)
    assert list_contents(outside) == before
    assert {path.name for path in folder.path.iterdir()} <= {"config.json", "state.json", name}
    (folder.path / name).unlink()  # as the message says
    run_here(store, job_id)


def test_a_worker_reports_a_linked_folder_as_its_jobs_failure(store, submit, outside):
    job_id = submit()
    link = store.catalog.find(job_id).path / "checkpoints"
    link.symlink_to(outside, target_is_directory=True)
    before = list_contents(outside)
    job = run_to_end(Supervisor(store, [Device("cpu", "test-cpu", "")]), job_id)
    assert job.status is JobStatus.FAILED
    assert f"checkpoints in {job_id} is a link" in job.state.failure.sentence
    assert list_contents(outside) == before


def test_each_writer_refuses_a_link_that_comes_later(store, submit, outside, tmp_path):
    """The check at the start is for the user; what keeps every byte inside is each writer's own."""
    import torch
    from qwen_edit_lora.lora_core import Adapter, LoraWeights

    run = tmp_path / "run"
    run.mkdir()
    for name in FOLDERS:
        (run / name).symlink_to(outside, target_is_directory=True)
    adapter = Adapter(
        {"transformer_blocks.0.attn.to_q": LoraWeights(torch.ones(1, 8), torch.ones(8, 1))}
    )
    before = list_contents(outside)
    checkpoints = CheckpointFolder(run / "checkpoints")
    for write in (
        checkpoints.prepare,
        lambda: checkpoints.write(1, {"adapter": {"a": torch.ones(1)}}, {}),
        lambda: write_adapters({"": adapter}, run, "tiny", 2, keep=1),
        lambda: write_image(torch.zeros(3, 8, 8), run / "samples" / "step_00000001_a"),
        lambda: remove_leftovers(run / "adapters"),
    ):
        with pytest.raises(FileError, match="is a link"):
            write()
        assert list_contents(outside) == before


def test_a_linked_checkpoint_is_passed_over_and_its_link_removed(store, submit, tmp_path, outside):
    done = store.catalog.find(run_here(store, submit()))
    newest = done.path / "checkpoints" / "step_00000002"
    newest.rename(outside / "two")
    newest.symlink_to(outside / "two", target_is_directory=True)
    before = list_contents(outside)
    checkpoints = CheckpointFolder(done.path / "checkpoints")
    assert checkpoints.read_latest().step == 1
    assert "step_00000002 is a link" in checkpoints.passed_over[0]
    import torch

    for step in (2, 3):  # over the link, and then away with what is older
        checkpoints.write(step, {"adapter": {"a": torch.ones(1)}}, {})
    assert not newest.is_symlink()
    assert checkpoints.read_latest().step == 3
    (done.path / "checkpoints" / LEFTOVER).symlink_to(outside, target_is_directory=True)
    checkpoints.prepare()
    assert not (done.path / "checkpoints" / LEFTOVER).is_symlink()
    assert list_contents(outside) == before


class Report:
    def to_dict(self) -> dict:
        return {"step": 1, "loss": 0.5}


def test_metrics_are_not_written_through_a_link(tmp_path, outside):
    run = tmp_path / "run"
    run.mkdir()
    metrics = MetricsFile(run)
    metrics.path.symlink_to(outside / "nothing")
    with pytest.raises(FileError, match=r"metrics\.jsonl cannot be written: it is a link"):
        metrics.append(Report())
    assert metrics.cut(0) == 0  # as a run does when it starts
    metrics.append(Report())
    assert not metrics.path.is_symlink()
    metrics.path.rename(outside / "lines")
    metrics.path.symlink_to(outside / "lines")
    before = list_contents(outside)
    metrics.cut(5)
    metrics.append(Report())
    assert metrics.path.read_bytes().count(b"\n") == 2
    assert list_contents(outside) == before


def test_the_message_of_a_process_is_not_written_through_a_link(store, submit, outside):
    folder = store.catalog.find(submit())
    link = folder.path / ".process_1.new"
    link.symlink_to(outside / LEFTOVER)
    before = list_contents(outside)
    write_failure(folder, 1, JobFailure(sentence="it failed"))
    clear_failures(folder)
    assert list_contents(outside) == before


def test_a_junction_of_windows_is_a_link(tmp_path, monkeypatch):
    monkeypatch.setattr(own_folders.os.path, "isjunction", lambda path: True, raising=False)
    with pytest.raises(FileError, match="is a link"):
        own_folders.make_own_folder(tmp_path / "a")
    assert not (tmp_path / "a").exists()
