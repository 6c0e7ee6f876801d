"""Modified cached training sets must read back as written, or be refused with one sentence.

The oracle is the set that was written; a change that is not refused must leave batches of finite,
matching shapes.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qwen_edit_lora.lora_core import LoraError, LoraWeights
from qwen_edit_lora.lora_core.checks import MAX_WHOLE
from qwen_edit_lora.lora_core.inspection.inspection import Inspection, inspect_module
from qwen_edit_lora.lora_core.inspection.saved import read_inspection, write_inspection
from qwen_edit_lora.lora_core.inspection.tables import build_table, describe_verdict
from qwen_edit_lora.lora_core.library.cache import CacheEntry, read_cache, write_cache
from qwen_edit_lora.lora_core.library.facts import AdapterFacts
from qwen_edit_lora.lora_core.library.health import Health
from qwen_edit_lora.lora_core.pairs.vae_copy import find_vae
from qwen_edit_lora.lora_core.training.data.batches import DataOrder, load_batch
from qwen_edit_lora.lora_core.training.data.dataset import (
    CachedDataset,
    CachedItem,
    DatasetWriter,
    read_dataset,
)
from safetensors.torch import load_file, save_file

MAX_MESSAGE = 400
SHARE = settings.default.max_examples
WIDTH = 6


def check_refusal(error: LoraError) -> None:
    assert 0 < len(str(error)) <= MAX_MESSAGE, str(error)
    assert str(error).isprintable(), repr(str(error))


@contextmanager
def make_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name) / "sets" / "a"


def make_item(seed: int, target=(4, 6), references=((4, 4),), **optional) -> CachedItem:
    generator = torch.Generator().manual_seed(seed)
    return CachedItem(
        target=torch.randn(16, *target, generator=generator),
        references=tuple(torch.randn(16, *size, generator=generator) for size in references),
        text=torch.randn(3 + seed, WIDTH, generator=generator),
        **optional,
    )


ITEMS = {
    "a": make_item(0, text_empty=torch.ones(2, WIDTH), mask=torch.rand(4, 6) + 0.1),
    "b": make_item(1),
}


def write_set(folder: Path, items=None) -> CachedDataset:
    writer = DatasetWriter(folder)
    for key, item in (ITEMS if items is None else items).items():
        writer.add(key, item, f"caption of {key}")
    writer.set_empty_text(torch.ones(2, WIDTH))
    return read_dataset(writer.finish({"vae": "0123456789abcdef"}))


def use(folder: Path) -> CachedDataset | None:
    """Opens the set and makes batches of it; None if that is refused, which is allowed."""
    try:
        dataset = read_dataset(folder)
        order = DataOrder(dataset.items, 2, seed=0)
        for step in range(order.batches_per_epoch):
            batch = load_batch(dataset, order.get_slots(step), 0, caption_dropout=0.5)
            assert batch.x_0.shape[:2] == (2, 16)
            assert batch.text.shape[2] == dataset.text_width
            assert batch.mask is None or batch.mask.shape == (2, 1, *batch.x_0.shape[2:])
            assert all(len(reference) == 2 for reference in batch.references)
        dataset.find_largest()
        assert dataset.fingerprint
        dataset.check_items()
        for number, info in enumerate(dataset.items):
            stored = load_file(folder / "items" / f"{info.key}.safetensors")
            assert dataset.load(number).tensors.keys() == stored.keys()  # none left out
    except LoraError as e:
        check_refusal(e)
        return None
    finally:
        assert find_vae(folder) is None
    return dataset


SIDES = st.integers(1, 9)
SIZES = st.tuples(SIDES, SIDES)


@settings(max_examples=SHARE // 4)
@given(
    st.lists(
        st.tuples(SIZES, st.lists(SIZES, max_size=3), st.booleans(), st.booleans()),
        min_size=1,
        max_size=4,
    )
)
def test_what_was_written_reads_back_bit_exactly(lines):
    items = {}
    for number, (target, references, has_mask, has_empty) in enumerate(lines):
        optional = {"mask": torch.rand(target) + 0.1} if has_mask else {}
        optional |= {"text_empty": torch.ones(2, WIDTH)} if has_empty else {}
        items[f"i{number}"] = make_item(number, target, references, **optional)
    with make_folder() as folder:
        written = write_set(folder, items)
        dataset = use(folder)
        assert dataset is not None
        assert dataset.items == written.items
        for index, item in enumerate(items.values()):
            found = dataset.load(index).tensors
            assert found.keys() == item.tensors.keys()
            assert all(torch.equal(found[name], tensor) for name, tensor in item.tensors.items())


VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.integers(-(10**320), 10**320),
        st.floats(),
        st.text(max_size=12),
        st.sampled_from(["a", "b", "../a", "/a", "a\0", "a" * 999, 4, 6, 3, [4, 6], [[4, 4]]]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=9), inner, max_size=3)
    ),
    max_leaves=6,
)
PLACES = st.sampled_from(
    [
        *("version", "text_width", "has_empty_text", "metadata", "items", "latents"),
        *("items.0", "items.0.key", "items.0.target", "items.0.references", "items.0.caption"),
        *("items.0.num_text_tokens", "items.0.has_mask", "items.0.has_empty_text", "items.0.x"),
        *("items.0.target.0", "items.0.references.0", "items.1.references.0.1", "metadata.vae"),
    ]
)


def put(index: dict, place: str, value: object) -> None:
    *path, last = (int(part) if part.isdecimal() else part for part in place.split("."))
    table = index
    try:
        for part in path:
            table = table[part]
        table[last] = value
    except (KeyError, IndexError, TypeError, AttributeError):
        return  # an earlier change removed this path


@settings(max_examples=SHARE)
@given(st.lists(st.tuples(PLACES, VALUES), min_size=1, max_size=3))
def test_a_changed_index_is_read_as_is_or_refused(changes):
    with make_folder() as folder:
        write_set(folder)
        index = json.loads((folder / "index.json").read_text())
        for place, value in changes:
            put(index, place, value)
        (folder / "index.json").write_text(json.dumps(index))
        dataset = use(folder)
        if dataset is not None:
            assert [info.key for info in dataset.items] == [line["key"] for line in index["items"]]
            for number, info in enumerate(dataset.items):
                item = dataset.load(number)
                assert tuple(item.target.shape[1:]) == info.target
                assert len(item.text) == info.num_text_tokens


DTYPES = st.sampled_from(
    [
        *(torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn),
        *(torch.int8, torch.uint8, torch.int64, torch.bool),
    ]
)
SHAPES = st.one_of(
    st.sampled_from([(16, 4, 6), (16, 4, 4), (3, WIDTH), (2, WIDTH), (4, 6)]),
    st.lists(st.integers(0, 17), max_size=4).map(tuple),
)
NAMES = ("target", "reference_0", "reference_1", "text", "text_empty", "mask", "more")


@settings(max_examples=SHARE)
@given(
    st.lists(
        st.tuples(st.sampled_from(NAMES), st.none() | SHAPES, DTYPES, st.floats(width=32)),
        min_size=1,
        max_size=3,
    ),
    st.sampled_from(["items/a", "items/b", "empty"]),
)
def test_changed_tensors_are_trained_on_as_is_or_refused(changes, name):
    with make_folder() as folder:
        write_set(folder)
        path = folder / f"{name}.safetensors"
        tensors = load_file(path)
        for key, shape, dtype, value in changes:
            tensors.pop(key, None)
            if shape is not None:
                tensors[key] = torch.full(shape, value).to(dtype)
        path.unlink()
        save_file(tensors, path)
        use(folder)


@settings(max_examples=SHARE // 2)
@given(
    st.sampled_from(["index.json", "items/a.safetensors", "items/b.safetensors"]),
    st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), max_size=4),
    st.floats(0, 2),
)
def test_flipped_and_missing_bytes_are_a_set_or_an_error(name, flips, share):
    with make_folder() as folder:
        write_set(folder)
        path = folder / name
        data = bytearray(path.read_bytes())
        for place, value in flips:
            data[place % len(data)] = value
        path.unlink()
        path.write_bytes(data[: round(min(share, 1) * len(data))])
        use(folder)


# --- caches of statistics: anything unreadable counts as missing ---

PARTS = st.sampled_from(
    ["version", "fields", "modules", "skipped", "non_finite", "misfits", "adapters"]
)


@settings(max_examples=SHARE)
@given(st.dictionaries(PARTS, VALUES) | VALUES)
def test_any_cache_of_statistics_is_read_or_ignored(values):
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "cache.json"
        path.write_text(json.dumps(values))
        assert read_inspection(path, "a") is None
        assert read_cache(path) == {}


INSPECTION = Inspection(
    "a",
    {"img_in": inspect_module(LoraWeights(torch.ones(2, 4), torch.ones(6, 2)), exact=True)},
    {"txt_in": "an OFT"},
)


@st.composite
def places(draw, tree: object) -> tuple:
    """A path into a JSON tree, one list or table per level."""
    path = []
    while isinstance(tree, list | dict) and tree and (not path or draw(st.booleans())):
        step = draw(st.sampled_from(range(len(tree)) if isinstance(tree, list) else sorted(tree)))
        path.append(step)
        tree = tree[step]
    return tuple(path)


@settings(max_examples=SHARE)
@given(st.data(), VALUES)
def test_a_changed_inspection_is_read_completely_or_ignored(data, value):
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "cache.json"
        write_inspection(INSPECTION, path)
        assert read_inspection(path, "a") == INSPECTION
        tree = json.loads(path.read_text())
        *way, last = data.draw(places(tree))
        table = tree
        for step in way:
            table = table[step]
        table[last] = value
        path.write_text(json.dumps(tree))
        found = read_inspection(path, "a")
        if found is not None:
            json.dumps(found.to_dict(), allow_nan=False)
            build_table(found)
            describe_verdict(found)


KNOWN = {
    "a.safetensors": CacheEntry(
        (1, 2, 3),
        AdapterFacts(kinds=("LoRA",), ranks=(4,), alphas=(4.0,), num_modules=3),
        Health("healthy", "fine", ("fine",), ({"name": "attn.to_q"},)),
    )
}


@settings(max_examples=SHARE // 2)
@given(st.data(), VALUES)
def test_a_changed_cache_of_facts_is_read_completely_or_ignored(data, value):
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "cache.json"
        write_cache(path, KNOWN)
        assert read_cache(path) == KNOWN
        tree = json.loads(path.read_text())
        *way, last = data.draw(places(tree))
        table = tree
        for step in way:
            table = table[step]
        table[last] = value
        path.write_text(json.dumps(tree))
        for known in read_cache(path).values():
            assert all(type(part) is int for part in known.stamp)
            if known.facts is not None:
                assert all(type(rank) is int for rank in known.facts.ranks)
                assert abs(known.facts.num_parameters) <= MAX_WHOLE
                assert isinstance(known.facts.title, str)
            json.dumps(asdict(known), allow_nan=False)
