"""A job's texts on disk: plain English for whoever reads the file, translatable for the page."""

from __future__ import annotations

import dataclasses
import json

import pytest
from qwen_edit_lora.lora_core.jobs.catalog import from_row, to_row
from qwen_edit_lora.lora_core.jobs.failure import explain_death
from qwen_edit_lora.lora_core.jobs.folder import STATE_FILE, JobFolder
from qwen_edit_lora.lora_core.jobs.job import Job, JobFailure, JobSettings, JobState, JobStatus
from qwen_edit_lora.lora_core.jobs.log_pieces import hide_paths
from qwen_edit_lora.lora_core.jobs.team import pop_failure, write_failure
from qwen_edit_lora.lora_core.messages import message
from qwen_edit_lora.lora_core.training.config.config_files import config_from_dict
from qwen_edit_lora.lora_core.translation import translate, translate_all

NOTE = message("resumed after step {step} of {steps}", step=3, steps=9)


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "20260131-120000-0123abcd"
    path.mkdir()
    return JobFolder(path)


def build_state(folder, **changes):
    failure = explain_death(-9, folder, restarts=1)
    return JobState(
        status=JobStatus.FAILED, failure=failure, notes=(NOTE, "an old note"), **changes
    )


def test_a_stored_failure_is_english_on_disk_and_chinese_in_a_chinese_page(folder):
    state = build_state(folder)
    folder.write_state(state)
    stored = json.loads((folder.path / STATE_FILE).read_text(encoding="utf-8"))
    assert stored["failure"]["sentence"] == (
        "the worker was terminated 2 times in a row by SIGKILL, manually or because the computer "
        "ran out of memory"
    )
    assert stored["notes"] == ["resumed after step 3 of 9", "an old note"]
    read = folder.read_state()
    assert read == state
    assert translate(read.failure.sentence, "zh") == (
        "工作进程连续 2 次被 SIGKILL 终止，可能是手动终止，也可能是计算机内存不足"
    )
    shown = translate_all(dataclasses.asdict(read), "zh")
    assert shown["notes"] == ("已从第 3 / 9 步之后继续", "an old note")
    assert shown["failure"]["advice"][0].startswith("请释放主内存")


def test_a_page_sees_a_translatable_failure_without_paths(folder):
    said = message("{path} cannot be read: {reason}.", path="/srv/me/secret/a.png", reason="why")
    train = {"name": "a", "output": "x", "model": {"source": "m"}, "data": {"folder": "d"}}
    settings = JobSettings(train=config_from_dict(train))
    for sentence, chinese in (
        (said, "无法读取 …/a.png：why。"),
        (message("failed: {sentence}", sentence=said), "失败：无法读取 …/a.png：why。"),
        (message("the loss is {loss}", loss="nan"), "损失为 nan"),
    ):
        state = JobState(status=JobStatus.FAILED, failure=JobFailure(sentence=sentence))
        shown = Job(folder.path.name, settings, state).to_dict()["failure"]["sentence"]
        assert "secret" not in shown
        assert translate(shown, "zh") == chinese


def test_a_path_that_is_only_recognised_in_the_whole_text_is_hidden_all_the_same():
    said = message("{name!r} is missing", name="/srv/me/two words/a.png")
    assert hide_paths(said) == "'…/a.png' is missing"


def test_a_state_of_an_earlier_version_stays_english(folder):
    folder.write_state(build_state(folder))
    path = folder.path / STATE_FILE
    stored = json.loads(path.read_text(encoding="utf-8"))
    del stored["messages"]
    path.write_text(json.dumps(stored), encoding="utf-8")
    read = folder.read_state()
    assert translate(read.failure.sentence, "zh") == stored["failure"]["sentence"]


def test_a_state_without_messages_is_stored_as_before(folder):
    folder.write_state(JobState(notes=("plain",)))
    stored = json.loads((folder.path / STATE_FILE).read_text(encoding="utf-8"))
    assert "messages" not in stored


def test_the_index_keeps_what_translates_a_jobs_texts(folder):
    train = {"name": "a", "output": "x", "model": {"source": "m"}, "data": {"folder": "d"}}
    settings = JobSettings(train=config_from_dict(train))
    job = Job(folder.path.name, settings, build_state(folder))
    row = json.loads(json.dumps(to_row(job)))
    assert translate(from_row(folder, row).state.notes[0], "zh") == "已从第 3 / 9 步之后继续"


def test_the_failure_of_another_process_can_be_translated(folder):
    failure = explain_death(7, folder)
    write_failure(folder, 1, failure)
    popped = pop_failure(folder, 1)
    assert popped == failure
    assert translate(popped.sentence, "zh") == "工作进程在报告原因之前以退出码 7 结束"
