"""What our routes show of a job's files: its log, samples and published copies."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.comfy

JOBS = "/qwen_edit_lora/jobs"


@pytest.fixture
def completed(routes: Any, job_id: str) -> Any:
    """The job's folder, with an adapter and one sample, as a worker leaves it."""
    import torch
    from PIL import Image
    from qwen_edit_lora.lora_core.jobs.job import JobStatus
    from safetensors.torch import save_file

    folder = routes.store.catalog.find(job_id)
    save_file({"a": torch.zeros(1)}, folder.path / "tiny.safetensors")
    folder.samples.mkdir()
    Image.new("RGB", (8, 8)).save(folder.samples / "step_00000004_item.png")
    done = {"status": JobStatus.COMPLETED, "step": 6, "adapters": ("tiny.safetensors",)}
    folder.write_state(dataclasses.replace(folder.read_state(), **done))
    return folder


def test_delete_with_adapter_deletes_a_copy_that_was_published_on_request(
    routes, completed, tmp_path
):
    """README of the route: also its copies in the loras folder, if they still are this job's."""
    published = routes.post(f"{JOBS}/{completed.id}/publish").read()["published"]
    assert [path.name for path in (tmp_path / "loras").iterdir()] == published
    assert routes.post(f"{JOBS}/{completed.id}/delete", {"with_adapter": True}).status == 200
    assert list((tmp_path / "loras").iterdir()) == []


def test_a_copy_that_was_published_on_request_is_listed_with_the_job(routes, completed):
    published = routes.post(f"{JOBS}/{completed.id}/publish").read()["published"]
    assert routes.ask("GET", f"{JOBS}/{completed.id}").read()["published"] == published


def test_a_sample_that_is_no_png_is_not_sent(routes, completed):
    """SECURITY.md: a job's samples are read only as PNG."""
    (completed.samples / "step_00000005_item.png").write_bytes(b"<script>alert(1)</script>")
    answer = routes.ask("GET", f"{JOBS}/{completed.id}/pictures/step_00000005_item.png")
    assert 400 <= answer.status
    assert "step_00000005_item.png" in answer.sentence


def test_a_sample_larger_than_any_image_is_not_read_into_memory(routes, completed):
    """A sparse file of half a gigabyte takes no disk, and as much memory per request."""
    with (completed.samples / "step_00000005_item.png").open("wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        file.truncate(1 << 29)
    answer = routes.ask("GET", f"{JOBS}/{completed.id}/pictures/step_00000005_item.png")
    assert 400 <= answer.status
    assert len(answer.body) < 1000


@pytest.mark.parametrize("limit", [4, 10, 11])
def test_a_log_read_piece_by_piece_is_the_whole_log(routes, completed, limit):
    """A page asks on from next_offset; no character may be cut in two."""
    text = "步骤 1/6: café 日本語\n" * 3
    completed.log.write_text(text, encoding="utf-8")
    found, offset = "", 0
    while True:
        url = f"{JOBS}/{completed.id}/log?offset={offset}&limit={limit}"
        piece = routes.ask("GET", url).read()
        if piece["next_offset"] == offset:
            break
        found, offset = found + piece["text"], piece["next_offset"]
    assert found == text


def test_the_end_of_a_log_begins_with_a_whole_character(routes, completed):
    completed.log.write_text("日本語" * 10, encoding="utf-8")
    piece = routes.ask("GET", f"{JOBS}/{completed.id}/log?limit=10").read()
    assert "\ufffd" not in piece["text"]


def print_traceback() -> str:
    """As lora_core/jobs/worker.py prints an unexpected error into the job's log."""
    import traceback

    from qwen_edit_lora.lora_core.disk.json_reader import parse_json

    try:
        parse_json(None, "config.json")
    except AttributeError:
        return traceback.format_exc()
    raise AssertionError("it was expected to fail")


def test_a_log_is_shown_without_the_paths_of_this_machine(routes, completed):
    """SECURITY.md: the routes' responses contain no paths of this machine."""
    completed.log.write_text(print_traceback())
    answer = routes.ask("GET", f"{JOBS}/{completed.id}/log")
    assert str(Path(__file__).resolve().parents[2]) not in answer.read()["text"]


def test_a_failed_job_is_shown_without_the_paths_of_this_machine(routes, completed):
    from qwen_edit_lora.lora_core.jobs.failure import read_log_tail
    from qwen_edit_lora.lora_core.jobs.job import JobFailure, JobStatus

    completed.log.write_text(print_traceback())
    failure = JobFailure(sentence="unexpected", log_tail=read_log_tail(completed))
    failed = dataclasses.replace(
        completed.read_state(), status=JobStatus.FAILED, failure=failure, adapters=()
    )
    completed.write_state(failed)
    for path in (JOBS, f"{JOBS}/{completed.id}"):
        body = routes.ask("GET", path).body.decode()
        assert "Traceback" in body
        assert str(Path(__file__).resolve().parents[2]) not in body
