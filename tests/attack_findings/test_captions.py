"""Attack findings: captions that are trained as something else than their author sees."""

from __future__ import annotations

import pytest
from demo_base.pair_folders import write_pairs
from qwen_edit_lora.lora_core.pairs.layouts import find_pairs
from qwen_edit_lora.lora_core.pairs.preflight import check_pairs

SMALL = 64 * 96 / 1024**2  # megapixels of the test images


def check(folder):
    found = find_pairs(folder, lambda path: True, ())
    return check_pairs(found, name=folder.name, megapixels=SMALL, max_references=3)


def find_caption_files(folder):
    return sorted(folder.rglob("*.txt"))


def test_a_caption_of_two_lines_from_windows_is_that_of_other_systems(tmp_path):
    """Other trainers read text with Python's universal newlines, and ComfyUI's text field has
    none but \\n: a LoRA trained with \\r would be prompted with other tokens."""
    captions = []
    for name, newline in (("unix", b"\n"), ("windows", b"\r\n"), ("mac", b"\r")):
        folder = tmp_path / name
        write_pairs(folder)
        first = find_caption_files(folder)[0]
        first.write_bytes(b"make it red" + newline + b"and large")
        captions.append([checked.pair.caption for checked in check(folder).pairs])
    assert captions[0] == captions[1] == captions[2]


@pytest.mark.parametrize("text", ["\0", "\u200b", "\ufeff\ufeff", "\x7f"])
def test_a_caption_of_invisible_characters_is_reported_as_empty(tmp_path, text):
    write_pairs(tmp_path / "set")
    find_caption_files(tmp_path / "set")[0].write_text(text, encoding="utf-8")
    assert any("caption" in problem.text for problem in check(tmp_path / "set").problems)
