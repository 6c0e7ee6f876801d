"""Pieces of a log: whole lines and characters, and no path of this machine."""

from __future__ import annotations

import io

import pytest
from qwen_edit_lora.lora_core.jobs.job import Job, JobFailure, JobSettings, JobState
from qwen_edit_lora.lora_core.jobs.log_pieces import LINE_BYTES, hide_paths, read_piece
from qwen_edit_lora.lora_core.training.config.config_files import config_from_dict

TRACEBACK = """Traceback (most recent call last):
  File "/houses/my user/ComfyUI/custom_nodes/qwen/lora_core/jobs/worker.py", line 3, in work
    run()
  File "/houses/my user/venv/lib/python3.11/site-packages/torch/nn/linear.py", line 9, in forward
  File "C:\\People\\me\\AppData\\python3.12\\json\\decoder.py", line 1, in decode
FileNotFoundError: [Errno 2] No such file or directory: '/mnt/secret disk/café/a.safetensors'
cannot open /houses/me/x/b.safetensors: it is a folder
PATH=/houses/me/bin:/houses/me/x/bin file:///houses/me/c.png file:///C:/People/me/d.png
"""
SHOWN = """Traceback (most recent call last):
  File "…/lora_core/jobs/worker.py", line 3, in work
    run()
  File "…/site-packages/torch/nn/linear.py", line 9, in forward
  File "…/python3.12/json/decoder.py", line 1, in decode
FileNotFoundError: [Errno 2] No such file or directory: '…/a.safetensors'
cannot open …/b.safetensors: it is a folder
PATH=…/bin:…/bin …/c.png …/d.png
"""
SECRETS = ("houses", "user", "People", "me/", "secret", "mnt", "ComfyUI", "AppData")


def read_all(data: bytes, limit: int) -> str:
    """As a page reads it: piece after piece from `next_offset`."""
    text, offset = "", 0
    while (piece := read_piece(io.BytesIO(data), offset, limit))["next_offset"] != offset:
        assert piece["offset"] == offset
        text, offset = text + piece["text"], piece["next_offset"]
    return text


def test_paths_are_shortened_to_what_tells_nothing_of_the_machine():
    assert hide_paths(TRACEBACK) == SHOWN


@pytest.mark.parametrize(
    "text",
    [
        "step 12/100  loss 0.0123  1,230 tokens/s  1.2 s/it",
        "see https://pytorch.org/docs/stable/notes/cuda.html",
        "adapters/my edit_00000002.safetensors is in 2 parts and/or 3",
        "transformer_blocks.0/attn ~ 3/4 of 'a/b/c'",
    ],
)
def test_other_slashes_are_left_alone(text):
    assert hide_paths(text) == text


@pytest.mark.parametrize("limit", [1, 7, 50, 10_000])
def test_a_log_read_piece_by_piece_shows_no_more_than_the_whole(limit):
    assert read_all(TRACEBACK.encode() * 20, limit) == SHOWN * 20


LONG_LINES = {
    "words": " ".join(f"word{i}" for i in range(700)),
    "paths": "x '/mnt/secret disk/café/a.png' " * 160,
    "bare paths": "/houses/me/x/b.png, " * 260,
    "without blanks": "=" * 5000,
}


@pytest.mark.parametrize("limit", [900, 4096, 5001])
@pytest.mark.parametrize("around", LONG_LINES)
def test_a_path_in_a_long_line_is_hidden_wherever_the_line_is_cut(around, limit):
    """Lines of more than LINE_BYTES are cut between pieces: here inside each path in turn."""
    filler = LONG_LINES[around]
    paths = " ".join(TRACEBACK.splitlines())
    line = f"{filler} {paths} {filler}\n"
    assert len(line) > 2 * LINE_BYTES
    for shift in range(0, 700, 70):
        data = f"{'y' * shift} {line}next".encode()
        assert read_all(data, limit) == hide_paths(data.decode()), shift


def test_any_piece_of_a_long_line_tells_nothing_of_its_paths():
    line = " ".join(TRACEBACK.splitlines())
    data = f"{'x' * 5000} {line} {'x' * 9000}".encode()
    for offset in range(5000, 5001 + len(line), 3):
        for given, limit in ((offset, 40), (None, len(data) - offset)):
            text = read_piece(io.BytesIO(data), given, limit)["text"]
            assert not any(secret in text for secret in SECRETS), (offset, text)


def test_a_failure_is_cut_after_its_paths_are_hidden():
    for length in range(300, 400):
        failure = JobFailure(sentence=f"{'x' * length} '/mnt/secret disk/a.png' {'y' * 100}")
        assert len(failure.sentence) <= 400
        assert not any(secret in failure.sentence for secret in SECRETS)


def test_a_piece_from_the_middle_of_a_path_shows_no_part_of_it():
    data = TRACEBACK.encode()
    for offset in range(len(data)):
        for given in (offset, None):
            limit = 5 if given is not None else len(data) - offset or 1
            piece = read_piece(io.BytesIO(data), given, limit)
            assert not any(secret in piece["text"] for secret in SECRETS), (offset, piece)


@pytest.mark.parametrize("limit", [1, 2, 4, 10, 11, 5000])
@pytest.mark.parametrize("line", ["步骤 1/6: café 日本語\n", "日本語" * LINE_BYTES])
def test_no_character_is_cut_in_two(line, limit):
    assert read_all((line * 2).encode(), max(limit, len(line) // 100)) == line * 2


def test_the_end_of_a_log_begins_with_a_whole_line_or_character():
    lines = "日本語\n" * 3
    piece = read_piece(io.BytesIO(lines.encode()), None, 14)
    assert (piece["text"], piece["offset"], piece["next_offset"]) == ("日本語\n", 20, 30)
    assert read_piece(io.BytesIO(lines.encode()), None, 20)["text"] == "日本語\n" * 2
    assert read_piece(io.BytesIO(lines.encode()), None, 5)["text"] == "語\n"
    assert read_piece(io.BytesIO(("日本語" * 9).encode()), None, 10)["text"] == "日本語"


def test_a_character_that_is_still_being_written_comes_with_the_next_piece():
    data = "step 日".encode()
    piece = read_piece(io.BytesIO(data[:-1]), 0, 100)
    assert (piece["text"], piece["next_offset"]) == ("step ", 5)
    piece = read_piece(io.BytesIO(data + b"\n"), 5, 100)
    assert (piece["text"], piece["next_offset"]) == ("日\n", len(data) + 1)


def test_bytes_that_are_no_text_are_read_to_their_end():
    data = bytes(range(128, 256)) * 100
    for limit in (50, 1000):
        assert len(read_all(data, limit)) > 6000


def test_a_job_is_shown_without_paths():
    train = {"name": "a", "output": "o", "model": {"source": "s"}, "data": {"folder": "d"}}
    failure = JobFailure(
        sentence="it stopped: '/mnt/secret disk/a.png' is no image", log_tail=TRACEBACK
    )
    state = JobState(created_at=0.0, failure=failure, notes=(TRACEBACK,), alarms=(TRACEBACK,))
    job = Job("20260131-120000-0123abcd", JobSettings(train=config_from_dict(train)), state)
    shown = job.to_dict()
    assert shown["failure"]["sentence"] == "it stopped: '…/a.png' is no image"
    assert [shown["failure"]["log_tail"], *shown["notes"], *shown["alarms"]] == [SHOWN] * 3
    assert job.state.failure.log_tail == TRACEBACK
