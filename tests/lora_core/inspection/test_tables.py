"""Inspections as text, their order, and inspections on disk."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from qwen_edit_lora.lora_core import (
    Adapter,
    ConfigError,
    DiffWeights,
    FileError,
    LoraWeights,
    read_adapter,
    write_adapter,
)
from qwen_edit_lora.lora_core.inspection import saved as files
from qwen_edit_lora.lora_core.inspection.inspection import inspect_adapter
from qwen_edit_lora.lora_core.inspection.statistics import SORT_KEYS, sort_modules
from qwen_edit_lora.lora_core.inspection.tables import (
    HEADERS,
    build_table,
    describe_verdict,
    needs_attention,
)

PATHS = [f"transformer_blocks.{block}.attn.to_{x}" for block in (2, 10) for x in "qkv"]


def make_adapter(std: float = 3e-4, rank: int = 4) -> Adapter:
    """Modules whose std falls in the order of PATHS."""
    torch.manual_seed(0)
    modules = {}
    for number, path in enumerate(reversed(PATHS)):
        lora_A = torch.nn.functional.normalize(torch.randn(rank, 64), dim=1)
        modules[path] = LoraWeights(lora_A, torch.randn(64, rank) * std * 4 * (1 + number / 10))
    return Adapter(modules, name="a")


def write(path: Path, adapter: Adapter | None = None) -> Path:
    return write_adapter(adapter or make_adapter(), path)


def read_column(table: str, name: str) -> list[str]:
    _, header, *rows = table.splitlines()
    index = re.split(r"  +", header).index(name)
    return [re.split(r"  +", row)[index] for row in rows]


def test_the_worst_comes_first_and_block_is_the_models_order():
    inspection = inspect_adapter(make_adapter(), exact=True)
    by_std = read_column(build_table(inspection, "std"), "std")
    assert by_std == sorted(by_std, key=float)
    largest = read_column(build_table(inspection, "abs max"), "max")
    assert largest == sorted(largest, key=float, reverse=True)
    assert sort_modules(inspection, "block") == [
        f"transformer_blocks.{block}.attn.to_{x}" for block in (2, 10) for x in "qkv"
    ]
    assert {len(line) for line in build_table(inspection, "block").splitlines()[1:]} == {
        len(build_table(inspection).splitlines()[1])
    }


def test_full_scan_statistics_are_refused_without_a_scan_and_not_in_the_table():
    inspection = inspect_adapter(make_adapter())
    with pytest.raises(ConfigError, match=r"needs every entry, .*; turn exact on"):
        build_table(inspection, "abs max")
    with pytest.raises(ConfigError, match="unknown statistic 'size'"):
        build_table(inspection, "size")
    assert "max" not in build_table(inspection).splitlines()[1]
    assert "max" in build_table(inspect_adapter(make_adapter(), exact=True)).splitlines()[1]


@pytest.mark.parametrize("sort_by", SORT_KEYS)
def test_the_statistic_it_is_sorted_by_is_in_the_table(sort_by):
    table = build_table(inspect_adapter(make_adapter(), exact=True), sort_by)
    header = table.splitlines()[1]
    assert sort_by == "block" or HEADERS.get(sort_by, sort_by) in header
    assert max(map(len, table.splitlines())) <= 80


@pytest.mark.parametrize("sort_by", SORT_KEYS)
def test_an_adapter_without_statistics_has_a_table_too(sort_by):
    adapter = Adapter({"txt_norm": DiffWeights(torch.ones(8))}, name="norms")
    inspection = inspect_adapter(adapter, exact=True)
    assert build_table(inspection, sort_by).startswith("0 modules")
    text = describe_verdict(inspection)
    assert "nothing to judge" in text
    assert "Warning: 1 module without statistics: txt_norm: a change of a norm or bias" in text


def test_only_good_news_needs_no_attention():
    assert not needs_attention(inspect_adapter(make_adapter(), exact=True))
    assert needs_attention(inspect_adapter(make_adapter(std=0.0)))
    assert needs_attention(inspect_adapter(make_adapter(std=0.5)))
    assert needs_attention(inspect_adapter(Adapter({}, name="empty")))


# --- on disk -------------------------------------------------------------------------------------


@pytest.mark.parametrize("exact", [False, True])
def test_an_inspection_comes_back_from_disk_as_it_was(tmp_path, exact):
    inspection = inspect_adapter(make_adapter(), exact=exact)
    files.write_inspection(inspection, tmp_path / "x.json")
    again = files.read_inspection(tmp_path / "x.json", "a")
    assert again == inspection
    assert json.dumps(again.to_dict()) == json.dumps(inspection.to_dict())
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_a_damaged_or_older_file_counts_as_none(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    assert files.read_inspection(path, "a") is None
    inspection = inspect_adapter(make_adapter())
    files.write_inspection(inspection, path)
    whole = path.read_text()
    for damaged in ("", "[]", "null", whole[: len(whole) // 2], whole.replace("std", "dev")):
        path.write_text(damaged)
        assert files.read_inspection(path, "a") is None
    path.write_text(whole)
    assert files.read_inspection(path, "a") == inspection
    monkeypatch.setattr(files, "VERSION", files.VERSION + 1)
    assert files.read_inspection(path, "a") is None


def test_the_hash_covers_everything_an_inspection_depends_on(tmp_path):
    path = write(tmp_path / "a.safetensors")
    adapter = read_adapter(path)
    content_hash = files.compute_content_hash(adapter)
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(path.read_bytes())
    assert files.compute_content_hash(read_adapter(copy)) == content_hash

    weights = adapter.modules[PATHS[0]]
    louder = {**adapter.modules, PATHS[0]: weights.with_alpha(3 * weights.alpha)}
    fewer = {PATHS[0]: weights}
    other = read_adapter(write(tmp_path / "b.safetensors", make_adapter(1e-4)))
    hashes = [
        files.compute_content_hash(one)
        for one in (adapter.with_modules(louder), adapter.with_modules(fewer), other)
    ]
    assert len({content_hash, *hashes}) == 4


def test_what_is_not_all_in_one_file_has_no_hash(tmp_path):
    adapter = read_adapter(write(tmp_path / "a.safetensors"))
    assert files.compute_content_hash(make_adapter()) is None
    changed = {**adapter.modules, PATHS[0]: make_adapter().modules[PATHS[0]]}
    assert files.compute_content_hash(adapter.with_modules(changed)) is None


def test_a_file_that_was_replaced_is_refused_not_hashed(tmp_path):
    path = write(tmp_path / "a.safetensors")
    adapter = read_adapter(path)
    adapter.release()
    write(path, make_adapter(1e-3, rank=8))
    with pytest.raises(FileError, match="was changed on disk since it was opened"):
        files.compute_content_hash(adapter)
