"""Files that another process briefly has open, which blocks access on Windows."""

from __future__ import annotations

import ast
import os
from pathlib import Path

import pytest
import torch
from qwen_edit_lora.lora_core.disk import writing
from qwen_edit_lora.lora_core.disk.writing import explain, retry_while_denied
from qwen_edit_lora.lora_core.formats.files import read_adapter, write_adapter
from qwen_edit_lora.lora_core.jobs.publication import publish
from qwen_edit_lora.lora_core.pairs.cache import link
from qwen_edit_lora.lora_core.training.run.checkpoint import CheckpointFolder

ROOT = Path(__file__).resolve().parents[3]
TIMES = 3


@pytest.fixture
def denied(monkeypatch):
    """Every name is in use for its first accesses; returns the names that were."""
    tried: list[Path] = []

    def deny(function):
        def call(source, target):
            tried.append(Path(target))
            if tried.count(Path(target)) <= TIMES:
                raise PermissionError(13, "The process cannot access the file")
            return function(source, target)

        return call

    monkeypatch.setattr(writing, "RETRY_INTERVAL_S", 0.0)
    monkeypatch.setattr(os, "replace", deny(os.replace))
    monkeypatch.setattr(os, "rename", deny(os.rename))
    return tried


@pytest.fixture
def adapter(make_state_dict, write_file):
    return read_adapter(write_file(make_state_dict()))


def refuse(*_):
    raise PermissionError(1, "Operation not permitted")


def test_an_adapter_is_written_over_one_that_is_being_read(adapter, tmp_path, denied):
    path = write_adapter(adapter, tmp_path / "out.safetensors")
    write_adapter(adapter, path)
    assert denied.count(path) == TIMES + 2
    assert read_adapter(path).modules.keys() == adapter.modules.keys()


def test_a_checkpoint_gets_its_name_and_an_old_one_loses_it(tmp_path, denied):
    folder = CheckpointFolder(tmp_path, keep=1)
    for step in (1, 2, 2):
        path = folder.write(step, {"adapter": {"a": torch.ones(2)}}, {})
        assert path in denied
    assert folder.list_steps() == [2]
    assert folder.read_latest().step == 2
    assert [one.name for one in tmp_path.iterdir()] == ["step_00000002"]


def test_an_adapter_is_published_where_there_are_no_links(adapter, tmp_path, denied, monkeypatch):
    monkeypatch.setattr(os, "link", refuse)
    path = write_adapter(adapter, tmp_path / "out.safetensors")
    assert publish([path], tmp_path / "loras", "20260131-120000-0123abcd") == ("out.safetensors",)
    assert tmp_path / "loras" / "out.safetensors" in denied


def test_an_item_is_copied_where_there_are_no_links(tmp_path, denied, monkeypatch):
    monkeypatch.setattr(Path, "hardlink_to", refuse)
    (tmp_path / "a").write_text("item")
    link(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "item"
    assert tmp_path / "b" in denied


def test_a_lasting_denial_is_raised_and_other_errors_are_not_retried():
    calls: list[type] = []

    def fail(kind: type):
        calls.append(kind)
        raise kind(13, "no")

    with pytest.raises(PermissionError):
        retry_while_denied(lambda: fail(PermissionError), 0.05)
    assert len(calls) > 1
    calls.clear()
    with pytest.raises(FileNotFoundError):
        retry_while_denied(lambda: fail(FileNotFoundError))
    assert len(calls) == 1


def test_a_file_in_use_is_distinguished_from_a_read_only_folder():
    error = PermissionError(13, "The process cannot access the file")
    assert "read-only" in explain(error)
    error.winerror = 32
    assert explain(error) == "another program has it open; close that one and save again"


def test_every_rename_in_the_package_retries():
    impatient = []
    for path in [*(ROOT / "lora_core").rglob("*.py"), *(ROOT / "nodes").rglob("*.py")]:
        if path == ROOT / "lora_core" / "disk" / "writing.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            is_os = getattr(node.func.value, "id", "") in ("os", "shutil")
            # Strings are replaced with two arguments, dataclasses with keywords.
            is_path = len(node.args) == 1 and not node.keywords
            if node.func.attr in ("replace", "rename", "renames", "move") and (is_os or is_path):
                impatient.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert impatient == []
