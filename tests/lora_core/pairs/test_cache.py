"""Items named by content, sets that never change."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from demo_base.pair_folders import write_pairs, write_text
from qwen_edit_lora.lora_core import FileError
from qwen_edit_lora.lora_core.disk.safetensors_file import SafetensorsFile
from qwen_edit_lora.lora_core.pairs import cache as cache_module
from qwen_edit_lora.lora_core.pairs.cache import (
    CachedPairs,
    cache_pairs,
    check_disk,
    compute_key,
    find_items,
    slug,
)
from qwen_edit_lora.lora_core.pairs.layouts import find_pairs
from qwen_edit_lora.lora_core.pairs.preflight import CheckedPair, check_pairs
from qwen_edit_lora.lora_core.training.data import dataset as dataset_module
from qwen_edit_lora.lora_core.training.data.dataset import CachedItem, read_dataset
from safetensors.torch import load_file, save_file

SETTINGS = {"clip": "a", "vae": "b", "stock_code": "c", "reference_megapixels": 1.0}


class Encoder:
    """Numbers in place of latents, derived from the target's digest; counts its calls."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def __call__(self, checked: CheckedPair) -> CachedItem:
        self.names.append(checked.pair.name)
        generator = torch.Generator().manual_seed(int(checked.facts.target.digest[:8], 16))
        width, height = checked.size
        target = torch.randn(16, height // 8, width // 8, generator=generator)
        text = torch.full((3 + len(checked.pair.caption), 5), float(len(checked.pair.caption)))
        return CachedItem(target, (target.clone(),), text, torch.ones(3, 5))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_pairs(tmp_path / "set", 4)


def check(folder: Path) -> tuple[CheckedPair, ...]:
    found = find_pairs(folder, lambda path: True)
    return check_pairs(found, name="set", megapixels=0.01, max_references=3).pairs


def cache(folder: Path, encoder: Encoder, settings: dict | None = None, **options) -> CachedPairs:
    settings, store = settings or SETTINGS, folder.parent / "store"
    keyed = find_items(store, check(folder), settings)
    cached = cache_pairs(store, "set", keyed, encoder, settings, **options)
    assert cached.keys == tuple(info.key for info in read_dataset(cached.folder).items)
    return cached


def list_files(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*.*")}


def test_a_second_run_encodes_nothing_and_writes_nothing(folder):
    first = cache(folder, Encoder())
    assert (first.num_encoded, first.num_reused) == (4, 0)
    files = list_files(folder.parent / "store")
    encoder = Encoder()
    assert cache(folder, encoder) == CachedPairs(first.folder, first.keys, 0, 4)
    assert encoder.names == []
    assert list_files(folder.parent / "store") == files


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes on this system")
def test_a_pipe_in_place_of_an_item_is_replaced(folder):
    first = cache(folder, Encoder())
    path = next((folder.parent / "store" / "items").glob("*.safetensors"))
    shutil.rmtree(first.folder)
    path.unlink()
    os.mkfifo(path)
    assert cache(folder, Encoder()).num_encoded == 1
    assert path.is_file()


def test_one_changed_caption_encodes_one_pair_into_another_set(folder):
    first = cache(folder, Encoder())
    files = list_files(folder.parent / "store")
    write_text(folder / "target" / "photo_1.txt", "other")
    encoder = Encoder()
    second = cache(folder, encoder)
    assert encoder.names == ["photo_1"]
    assert second.folder != first.folder
    now = list_files(folder.parent / "store")
    assert {name: now[name] for name in files} == files
    assert read_dataset(first.folder).items[1].caption == "exchange red and blue, number 1"
    assert read_dataset(second.folder).items[1].caption == "other"
    assert read_dataset(second.folder).metadata["clip"] == "a"


@pytest.mark.parametrize("name", [*SETTINGS, "another"])
def test_every_setting_is_part_of_the_key(name, folder):
    (pair, *_) = check(folder)
    assert compute_key(pair, SETTINGS) != compute_key(pair, {**SETTINGS, name: 2.0})


def test_every_image_and_the_size_are_part_of_the_key(folder):
    (pair, *_) = check(folder)
    facts = pair.facts
    other = replace(facts.target, digest="x")
    changed = [
        replace(pair, size=(16, 16)),
        replace(pair, facts=replace(facts, target=other)),
        replace(pair, facts=replace(facts, references=(other,))),
        replace(pair, facts=replace(facts, references=(*facts.references, other))),
        replace(pair, facts=replace(facts, mask=other)),
        replace(pair, pair=replace(pair.pair, caption="")),
    ]
    keys = {compute_key(one, SETTINGS) for one in [pair, *changed]}
    assert len(keys) == 7
    renamed = replace(pair, pair=replace(pair.pair, name="other"))
    assert compute_key(renamed, SETTINGS) in keys  # a name changes nothing


def test_an_interrupted_run_keeps_what_it_finished(folder):
    encoder = Encoder()
    with pytest.raises(InterruptedError):
        cache(folder, encoder, should_stop=lambda: len(encoder.names) == 2)
    assert len(encoder.names) == 2
    assert not (folder.parent / "store" / "sets").exists()
    again = Encoder()
    assert cache(folder, again).num_reused == 2
    assert again.names == ["photo_2", "photo_3"]


def test_a_damaged_item_is_encoded_again_and_a_damaged_set_made_again(folder):
    first = cache(folder, Encoder())
    key = compute_key(check(folder)[2], SETTINGS)
    path = folder.parent / "store" / "items" / f"{key}.safetensors"
    path.unlink()
    path.write_bytes(b"\0" * 50)
    encoder = Encoder()
    assert cache(folder, encoder).num_encoded == 1
    assert encoder.names == ["photo_2"]
    next((first.folder / "items").iterdir()).unlink()
    encoder = Encoder()
    assert cache(folder, encoder) == CachedPairs(first.folder, first.keys, 0, 4)
    assert len(read_dataset(first.folder)) == 4


def add_reference(path: Path) -> None:
    tensors = load_file(path)
    path.unlink()
    save_file({**tensors, "reference_1": tensors["reference_0"].clone()}, path)


def test_a_set_whose_item_holds_another_reference_is_made_again(folder):
    """As the refusal of training tells the user to do."""
    first = cache(folder, Encoder())
    add_reference(next((first.folder / "items").iterdir()))
    with pytest.raises(FileError, match="make the training set again"):
        read_dataset(first.folder).check_items()
    assert cache(folder, Encoder()) == replace(first, num_encoded=0, num_reused=4)
    read_dataset(first.folder).check_items()


def test_an_item_with_more_references_than_its_pair_is_encoded_again(folder):
    first = cache(folder, Encoder())
    store, pairs = folder.parent / "store", check(folder)
    add_reference(find_items(store, pairs, SETTINGS)[2].path)
    shutil.rmtree(first.folder)
    missing = [one.tensors is None for one in find_items(store, pairs, SETTINGS)]
    assert missing == [False, False, True, False]
    encoder = Encoder()
    assert cache(folder, encoder).num_encoded == 1
    assert encoder.names == ["photo_2"]
    assert [len(info.references) for info in read_dataset(first.folder).items] == [1] * 4


def test_an_item_is_opened_once_for_another_set_of_it(folder, monkeypatch):
    store, pairs = folder.parent / "store", check(folder)
    shutil.rmtree(cache(folder, Encoder()).folder)
    opened = []

    class Counting(SafetensorsFile):
        def __init__(self, path, *options):
            opened.append(Path(path).parent)
            super().__init__(path, *options)

    for module in (cache_module, dataset_module):
        monkeypatch.setattr(module, "SafetensorsFile", Counting)
    keyed = find_items(store, pairs, SETTINGS)
    assert cache_pairs(store, "set", keyed, Encoder(), SETTINGS).num_reused == 4
    assert opened == [store / "items"] * 4


def test_sets_take_no_extra_space_where_the_disk_has_links(folder):
    first = cache(folder, Encoder())
    for path in (first.folder / "items").iterdir():
        assert path.stat().st_nlink == 2


def test_a_disk_without_links_gets_copies(folder, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    first = cache(folder, Encoder())
    dataset = read_dataset(first.folder)
    assert [path.stat().st_nlink for path in (first.folder / "items").iterdir()] == [1] * 4
    assert torch.equal(dataset.load(0).target, Encoder()(check(folder)[0]).target)


def test_too_little_space_is_reported_before_the_work(folder, tmp_path):
    pairs = check(folder)
    store = tmp_path / "store"
    missing = [one.checked for one in find_items(store, pairs, SETTINGS) if one.tensors is None]
    assert len(missing) == 4
    check_disk(store, missing, 64, 1.0)
    assert list(store.iterdir()) == []
    too_wide = shutil.disk_usage(store).free
    with pytest.raises(
        FileError, match=r"encoding 4 pairs takes about .* [kMGT]B, but the disk of"
    ):
        check_disk(store, missing, too_wide, 1.0)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(FileError, match=r"the cache folder .* cannot be written"):
        check_disk(tmp_path / "file" / "store", missing, 64, 1.0)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("🐈 photo", "photo"),
        ("🐈", "pair"),
        ("a/b c", "a_b_c"),
        ("..", "pair"),
        ("x" * 99, "x" * 60),
    ],
)
def test_names_become_safe_file_names(name, expected):
    assert slug(name) == expected


@pytest.mark.parametrize("place", ["items", "sets", "sets/NAME", "sets/NAME/items"])
def test_nothing_is_written_through_a_linked_folder_of_the_cache(folder, tmp_path, place):
    store = folder.parent / "store"
    name = cache(folder, Encoder()).folder.name
    shutil.rmtree(store)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept.txt").write_text("the user's")
    link = store / place.replace("NAME", name)
    link.parent.mkdir(parents=True)
    link.symlink_to(outside, target_is_directory=True)
    with pytest.raises(FileError, match=rf"{link.name} in {link.parent.name} is a link"):
        cache(folder, Encoder())
    assert [path.name for path in outside.iterdir()] == ["kept.txt"]


@pytest.mark.parametrize("place", ["items", "sets/*/items"])
def test_items_that_changed_places_are_put_right(folder, place):
    """Two of the same sizes: training would give each the other's caption."""
    first = cache(folder, Encoder())
    dataset = read_dataset(first.folder)
    expected = [dataset.load(index).target for index in range(4)]
    store = folder.parent / "store"
    a, b = sorted(path for path in store.glob(f"{place}/*.safetensors"))[:2]
    c = a.with_name("c")
    for old, new in ((a, c), (b, a), (c, b)):
        old.rename(new)
    encoder = Encoder()
    second = cache(folder, encoder)
    assert len(encoder.names) == (2 if place == "items" else 0)
    dataset = read_dataset(second.folder)
    dataset.check_items()
    for index in range(4):
        assert torch.equal(dataset.load(index).target, expected[index])


def test_an_item_without_its_key_is_taken_as_before(folder):
    """Of a cache that an earlier version made."""
    cache(folder, Encoder())
    for path in (folder.parent / "store").rglob("*.safetensors"):
        save_file(load_file(path), path)
    encoder = Encoder()
    cache(folder, encoder)
    assert encoder.names == []
