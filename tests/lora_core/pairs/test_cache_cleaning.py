"""The cache of encoded pairs: only what no training needs is removed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from demo_base.pair_folders import write_pairs, write_text
from qwen_edit_lora.lora_core.pairs import cache as cache_module
from qwen_edit_lora.lora_core.pairs.cache import cache_pairs, find_items
from qwen_edit_lora.lora_core.pairs.cache_cleaning import (
    clean,
    find_size,
    measure_sets,
    plan_cleaning,
)
from qwen_edit_lora.lora_core.pairs.layouts import find_pairs
from qwen_edit_lora.lora_core.pairs.preflight import CheckedPair, check_pairs
from qwen_edit_lora.lora_core.training.data.dataset import CachedItem, read_dataset


def encode(checked: CheckedPair) -> CachedItem:
    target = torch.zeros(16, checked.size[1] // 8, checked.size[0] // 8)
    return CachedItem(target, (target.clone(),), torch.ones(3, 5), torch.ones(3, 5))


def make_set(store: Path, folder: Path) -> Path:
    found = find_pairs(folder, lambda path: True)
    pairs = check_pairs(found, name="set", megapixels=0.01, max_references=3).pairs
    settings = {"clip": "a"}
    keyed = find_items(store, pairs, settings)
    return cache_pairs(store, folder.name, keyed, encode, settings).folder


@pytest.fixture(params=["links", "copies"])
def store(request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache on a disk with links, and on one without."""
    if request.param == "copies":

        def refuse(self: Path, source: Path) -> None:
            raise OSError(95, "no links")

        monkeypatch.setattr(cache_module.Path, "hardlink_to", refuse)
    return tmp_path / "store"


@pytest.fixture
def sets(store: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Two sets of the same two pairs, one of which has another caption in the second."""
    folder = write_pairs(tmp_path / "set", 2)
    first = make_set(store, folder)
    write_text(folder / "target" / "photo_1.txt", "another")
    return first, make_set(store, folder)


def measure(folder: Path) -> int:
    """Bytes on disk; links of one file count once."""
    files = {}
    for path in folder.rglob("*.safetensors"):
        files[path.stat().st_ino] = path.stat().st_size
    return sum(files.values())


def test_what_a_training_needs_stays_readable_and_the_rest_is_freed(store, sets):
    first, second = sets
    before = measure(store)
    plan = plan_cleaning(store, {second.name})
    assert plan.sets == (first,)
    assert plan.size_bytes == before
    clean(plan)
    assert plan.freed_bytes == before - measure(store) > 0
    dataset = read_dataset(second)
    assert len(dataset.items) == 2
    assert not first.exists()
    assert len(list((store / "items").iterdir())) == 2
    again = plan_cleaning(store, {second.name})
    assert (again.sets, again.items, again.freed_bytes) == ((), (), 0)


def test_without_trainings_everything_is_freed(store, sets):
    plan = plan_cleaning(store, set())
    assert plan.freed_bytes == plan.size_bytes == measure(store)
    clean(plan)
    assert measure(store) == 0


def test_what_is_not_of_the_cache_is_never_removed(store, sets, tmp_path):
    outside = write_text(tmp_path / "outside" / "items" / "a.safetensors", "x").parents[1]
    kept = [
        write_text(store / "items" / "mine.safetensors", "x"),
        write_text(store / "sets" / "mine" / "a.txt", "x"),
        write_text(store / "vaes" / "0123456789abcdef.safetensors", "x"),
        write_text(store / "notes.txt", "x"),
    ]
    (store / "sets" / "linked-0123456789ab").symlink_to(outside)
    clean(plan_cleaning(store, set()))
    assert all(path.read_text() == "x" for path in kept)
    assert (outside / "items" / "a.safetensors").read_text() == "x"
    assert (store / "sets" / "linked-0123456789ab").is_symlink()


def test_a_sets_size_counts_all_its_versions(store, sets):
    sizes = measure_sets(store)
    assert sizes.keys() == {"set"}
    assert find_size(sizes, "set") > 0
    assert find_size(sizes, "other") == 0
    shutil.rmtree(store)
    assert measure_sets(store) == {}
    assert plan_cleaning(store, set()).size_bytes == 0
