"""Inputs that no widget gives but a handwritten graph may: one short error of our own family."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from qwen_edit_lora.lora_core import FileError, LoraError
from qwen_edit_lora.lora_core.base_model.module_paths import parse_block_ranges
from qwen_edit_lora.lora_core.sweep.cells import parse_label
from qwen_edit_lora.lora_core.sweep.strength_grammar import parse_seeds

pytestmark = pytest.mark.comfy

NOT_TEXT = [5, None, 1.5, [], {}, ["a"], b"a"]
NOT_NAMES = ["\0", "\ud800", "x" * 5000, "a/" * 3000, "/etc/passwd", "../../etc/passwd"]


def check_refused(call: Callable[[], Any], base: Path) -> None:
    with pytest.raises(LoraError) as refused:
        call()
    text = str(refused.value)
    assert 0 < len(text) <= 400
    assert text.isprintable()
    assert str(base) not in text


@pytest.mark.parametrize("name", [*NOT_TEXT, *NOT_NAMES], ids=lambda name: repr(name)[:20])
def test_an_invalid_name_is_refused_by_every_input_that_takes_one(
    comfyui, ours, base_directory, name
):
    host = ours.host
    for find in (host.find_lora, host.find_diffusion_model, host.find_training_base):
        check_refused(lambda find=find: find(name), base_directory)
    if not isinstance(name, str) or name in ("\0", "\ud800"):
        check_refused(lambda: host.choose_output_path(name), base_directory)


@pytest.mark.parametrize(
    "files",
    [
        *(5, "2 files", ["a"], {"files": 5}, {"files": ""}, {"files": "x" * 9000}),
        *({"files": "99 files"}, {"files": "1 file"}, {"files": {}}),
        {"files": "1 file", "lora_1": "a"},
    ],
    ids=lambda files: repr(files)[:20],
)
def test_invalid_files_of_a_stack_are_refused(comfyui, base_directory, files):
    from qwen_edit_lora.nodes.stack import QwenEditLoraStack, read_file_rows

    check_refused(lambda: read_file_rows(files), base_directory)
    assert QwenEditLoraStack.fingerprint_inputs(files) is None


@pytest.mark.parametrize("text", ["a", "0", "-1", "1.5", "1; 2", "9" * 5000, "\u00b2"], ids=repr)
def test_rows_that_are_no_numbers_are_refused(comfyui, base_directory, text):
    from qwen_edit_lora.nodes.stack import QwenEditLoraStack, read_file_rows

    check_refused(lambda: read_file_rows({}, text), base_directory)
    assert QwenEditLoraStack.fingerprint_inputs({}, text) is None


def test_numbers_of_5000_digits_are_refused(comfyui, base_directory):
    digits = "9" * 5000
    for call in (
        lambda: parse_label(f"strength=1 seed={digits}"),
        lambda: parse_label(digits),
        lambda: parse_seeds(digits, 0),
        lambda: parse_block_ranges(digits),
    ):
        check_refused(call, base_directory)


def draw_png(size: tuple[int, int], mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, "PNG")
    return buffer.getvalue()


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"


def write_bmp() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "BMP")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        EPS,
        write_bmp(),
        b"",
        b"\x89PNG\r\n\x1a\n",
        draw_png((64, 64))[:45],
        draw_png((9000, 8), "1"),
    ],
    ids=["EPS", "BMP", "empty", "only a mark", "cut", "large"],
)
def test_a_sample_is_read_only_as_a_png_of_acceptable_size(comfyui, monkeypatch, data):
    """A job's folder may come from elsewhere; Pillow's reader of EPS starts a program."""
    from PIL import EpsImagePlugin
    from qwen_edit_lora.nodes import job

    class Store:
        def read_image(self, job_id: str, name: str) -> bytes:
            return data

    started: list[Any] = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *given, **more: started.append(1))
    with pytest.raises(FileError, match="step_1"):
        job.read_image(Store(), "id", "step_1.png")
    assert started == []


def test_a_sample_is_shown_small(comfyui):
    from qwen_edit_lora.nodes import job

    class Store:
        def read_image(self, job_id: str, name: str) -> bytes:
            return draw_png((2048, 1024))

    assert job.read_image(Store(), "id", "step_1.png").shape == (256, 512, 3)
    assert np.asarray(job.read_image(Store(), "id", "step_1.png")).dtype == np.uint8
