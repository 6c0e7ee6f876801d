"""The cached training set, and batches made from it."""

from __future__ import annotations

import inspect
import json
import os
import shutil
from collections import Counter
from dataclasses import replace

import pytest
import torch
from qwen_edit_lora.lora_core import ConfigError, FileError, ShapeError
from qwen_edit_lora.lora_core.training.data import latents
from qwen_edit_lora.lora_core.training.data.batches import DataOrder, Slot, load_batch
from qwen_edit_lora.lora_core.training.data.dataset import DatasetWriter, ItemInfo, read_dataset
from qwen_edit_lora.lora_core.training.data.latents import count_target_tokens
from qwen_edit_lora.lora_core.training.run.session import open_session
from safetensors.torch import save_file
from tiny import TEXT_WIDTH, make_config, make_dataset, make_item


def make_infos(*sizes: tuple[int, int]) -> list[ItemInfo]:
    return [ItemInfo(f"i{n}", size, ((8, 8),), 4) for n, size in enumerate(sizes)]


def test_what_was_written_is_read_bit_exactly(tmp_path):
    item = make_item(
        *(0, (8, 6), ((10, 4), (4, 4))),
        text_empty=torch.randn(2, TEXT_WIDTH).bfloat16(),
        mask=torch.rand(8, 6),
    )
    dataset = make_dataset(tmp_path / "set", {"a": item})
    info, loaded = dataset.items[0], dataset.load(0)
    assert (info.target, info.references, info.num_text_tokens) == ((8, 6), ((10, 4), (4, 4)), 5)
    assert info.num_tokens == 4 * 3 + 5 * 2 + 2 * 2 + 5
    assert item.tensors.keys() == loaded.tensors.keys()
    for name, tensor in item.tensors.items():
        assert torch.equal(tensor, loaded.tensors[name])
        assert tensor.dtype == loaded.tensors[name].dtype


def test_the_model_is_given_normalised_latents_of_target_and_references(tmp_path):
    from diffusers import AutoencoderKLQwenImage

    dataset = make_dataset(tmp_path / "set", 1)
    batch = load_batch(dataset, [Slot(0, 0, 0)], 0)
    parameters = inspect.signature(AutoencoderKLQwenImage.__init__).parameters
    mean, std = (torch.tensor(parameters[n].default) for n in ("latents_mean", "latents_std"))
    item = dataset.load(0)
    for raw, normal in ((item.target, batch.x_0), (item.references[0], batch.references[0])):
        expected = (raw - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
        torch.testing.assert_close(normal[0], expected)
        torch.testing.assert_close(latents.denormalize(normal[0]), raw)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": torch.randn(4, 8, 8)}, r"target is \(4, 8, 8\); expected \(16, height"),
        ({"references": (torch.randn(16, 8),)}, r"reference_0 is \(16, 8\)"),
        ({"text": torch.randn(64)}, r"text embedding is \(64,\); expected \(tokens"),
        ({"mask": torch.zeros(8, 8)}, r"the mask is \(8, 8\) with a sum of 0; .* not all of it 0"),
        ({"mask": torch.ones(8, 7)}, r"expected \(8, 8\) like the target"),
        ({"mask": torch.tensor([[-1.0] + [2.0] * 7] * 8)}, "negative weights"),
    ],
)
def test_a_tensor_of_another_shape_is_a_clear_error_with_the_item(tmp_path, change, message):
    with pytest.raises(ShapeError, match=rf"bad: .*{message}"):
        DatasetWriter(tmp_path).add("bad", replace(make_item(0), **change))
    assert list(tmp_path.iterdir()) == []


def test_an_item_with_nan_is_refused_when_it_is_written(tmp_path):
    item = make_item(0)
    item.text[1, 1] = float("nan")
    with pytest.raises(FileError, match="bad: text holds NaN or Inf"):
        DatasetWriter(tmp_path).add("bad", item)


@pytest.mark.parametrize("key", ["../a", "a/b", "", ".hidden", "é"])
def test_a_key_that_is_not_a_file_name_is_refused(tmp_path, key):
    with pytest.raises(ConfigError, match="cannot name a cached item"):
        DatasetWriter(tmp_path).add(key, make_item(0))


def test_two_text_widths_in_one_set_are_refused(tmp_path):
    writer = DatasetWriter(tmp_path)
    writer.add("a", make_item(0))
    with pytest.raises(ShapeError, match=r"expected \(tokens, 64\)"):
        writer.add("b", replace(make_item(0), text=torch.randn(3, 32)))


def test_a_folder_without_an_index_is_not_a_training_set(tmp_path):
    DatasetWriter(tmp_path).add("a", make_item(0))
    with pytest.raises(FileError, match="is not a cached training set"):
        read_dataset(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as JSON.*ake the training set again"),
        ('{"version": 1}', "is damaged"),
        ('{"version": 9}', "cached by another version"),
    ],
)
def test_an_index_that_cannot_be_read_is_a_clear_error(tmp_path, text, message):
    make_dataset(tmp_path)
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(FileError, match=message):
        read_dataset(tmp_path)


def test_a_missing_item_is_found_before_training(tmp_path):
    make_dataset(tmp_path)
    (tmp_path / "items" / "item_1.safetensors").unlink()
    with pytest.raises(FileError, match=r"lacks 1 of the 3 items .* such as item_1"):
        read_dataset(tmp_path)


def test_an_item_that_was_replaced_by_another_size_is_a_clear_error(tmp_path):
    dataset = make_dataset(tmp_path)
    DatasetWriter(tmp_path).add("item_0", make_item(0, (4, 4)))
    with pytest.raises(
        FileError, match=r"item_0\.safetensors does not fit index.json: target is \(16, 4, 4\)"
    ):
        dataset.load(0)


def test_an_item_in_place_of_another_of_the_same_sizes_is_refused(tmp_path):
    """Its caption in the index is another one's."""
    dataset = make_dataset(tmp_path / "set", {key: make_item(0, (8, 8)) for key in ("a", "b")})
    items = dataset.folder / "items"
    shutil.copy(items / "a.safetensors", items / "b.safetensors")
    for read in (dataset.check_items, lambda: dataset.load(1)):
        with pytest.raises(FileError, match=r"b.safetensors .* it holds the item a; make the"):
            read()
    dataset.load(0)


def test_the_fingerprint_follows_items_and_sizes_but_not_the_folder(tmp_path):
    a, b = make_dataset(tmp_path / "a", 2), make_dataset(tmp_path / "b", 2)
    assert a.fingerprint == b.fingerprint
    assert a.fingerprint != make_dataset(tmp_path / "c", 3).fingerprint
    other = {"item_0": make_item(0, (4, 4), num_text_tokens=4), "item_1": make_item(1)}
    assert a.fingerprint != make_dataset(tmp_path / "d", other).fingerprint


def test_every_batch_is_full_and_of_one_size_and_an_epoch_shows_every_item():
    infos = make_infos(*[(8, 8)] * 5, *[(8, 12)] * 2, (4, 4))
    order = DataOrder(infos, 2, seed=0)
    assert order.batches_per_epoch == 3 + 1 + 1
    for epoch in range(3):
        seen = Counter()
        for offset in range(order.batches_per_epoch):
            slots = order.get_slots(epoch * order.batches_per_epoch + offset)
            assert len(slots) == 2
            assert len({infos[slot.item].bucket for slot in slots}) == 1
            assert {slot.epoch for slot in slots} == {epoch}
            seen.update(slot.item for slot in slots)
        assert set(seen) == set(range(8))
        assert sum(seen.values()) == 10
        assert seen[7] == 2
    assert order.describe_repeats().startswith(
        "sizes whose items do not fill batches of 2: 2 of 3; samples shown again in each epoch: 2"
    )


def test_references_of_another_size_are_another_bucket():
    infos = [ItemInfo("a", (8, 8), ((8, 8),), 4), ItemInfo("b", (8, 8), ((8, 12),), 4)]
    assert DataOrder(infos, 2, 0).batches_per_epoch == 2


def test_the_order_is_a_function_of_seed_and_number_and_differs_by_epoch():
    infos = make_infos(*[(8, 8)] * 30)

    def list_items(order: DataOrder, epoch: int) -> list[int]:
        return [order.get_slots(30 * epoch + i)[0].item for i in range(30)]

    order = DataOrder(infos, 1, seed=3)
    late = DataOrder(infos, 1, seed=3)
    assert list_items(late, 7) == list_items(order, 7)  # without the epochs before
    assert list_items(order, 0) != list_items(order, 1)
    assert list_items(order, 0) != list_items(DataOrder(infos, 1, seed=4), 0)


def test_random_draws_belong_to_the_sample_in_any_batch(tmp_path):
    dataset = make_dataset(tmp_path, {k: make_item(i) for i, k in enumerate("abcd")})
    together = load_batch(dataset, DataOrder(dataset.items, 4, 0).get_slots(0), 0)
    slots = DataOrder(dataset.items, 4, 0).get_slots(0)
    for i, slot in enumerate(slots):
        alone = load_batch(dataset, [slot], 0)
        assert torch.equal(alone.noise[0], together.noise[i])
        assert alone.u[0] == together.u[i]
    assert len(set(together.u.tolist())) == 4


def test_text_is_padded_with_a_mask_unless_all_have_equal_length(tmp_path):
    dataset = make_dataset(tmp_path, 3)  # 4, 5 and 6 tokens
    batch = load_batch(dataset, [Slot(0, 0, 0), Slot(2, 0, 1)], 0)
    assert batch.text.shape == (2, 6, TEXT_WIDTH)
    assert batch.text_mask.tolist() == [[True] * 4 + [False] * 2, [True] * 6]
    assert load_batch(dataset, [Slot(1, 0, 0), Slot(1, 0, 1)], 0).text_mask is None


def test_caption_dropout_takes_the_items_own_empty_caption_or_the_shared_one(tmp_path):
    writer = DatasetWriter(tmp_path)
    own, shared = torch.full((2, TEXT_WIDTH), 2.0), torch.full((3, TEXT_WIDTH), 3.0)
    writer.add("own", make_item(0, text_empty=own))
    writer.add("shared", make_item(1))
    writer.set_empty_text(shared)
    dataset = read_dataset(writer.finish())
    dataset.check_captions_can_drop()
    for index, empty in enumerate((own, shared)):
        dropped = load_batch(dataset, [Slot(index, 0, 0)], 0, caption_dropout=1.0)
        assert torch.equal(dropped.text[0], empty)
        kept = load_batch(dataset, [Slot(index, 0, 0)], 0, caption_dropout=0.0)
        assert torch.equal(kept.text[0], dataset.load(index).text)


def test_captions_are_dropped_at_the_requested_rate(tmp_path):
    dataset = make_dataset(tmp_path, {"a": make_item(0, text_empty=torch.zeros(1, TEXT_WIDTH))})
    batch = load_batch(dataset, [Slot(0, 0, n) for n in range(600)], 0, caption_dropout=0.3)
    dropped = (batch.text[:, 0] == 0).all(dim=1).float().mean().item()
    assert dropped == pytest.approx(0.3, abs=0.06)


def test_caption_dropout_without_an_empty_caption_is_a_clear_error(tmp_path):
    dataset = make_dataset(tmp_path, 2)
    with pytest.raises(ConfigError, match=r"caption_dropout needs .* item_0 and 1 more"):
        dataset.check_captions_can_drop()


def test_an_item_without_a_mask_weighs_every_position_equally(tmp_path):
    items = {"a": make_item(0, mask=torch.rand(8, 8)), "b": make_item(1)}
    dataset = make_dataset(tmp_path, items)
    batch = load_batch(dataset, [Slot(0, 0, 0), Slot(1, 0, 1)], 0)
    assert torch.equal(batch.mask[0, 0], items["a"].mask)
    assert (batch.mask[1] == 1).all()
    assert load_batch(dataset, [Slot(0, 0, 0)], 0, use_masks=False).mask is None


def test_the_index_keeps_captions_and_what_it_was_made_with(tmp_path):
    writer = DatasetWriter(tmp_path)
    writer.add("a", make_item(0), caption="make it dusk")
    dataset = read_dataset(writer.finish({"vae": "qwen_image_vae"}))
    assert dataset.items[0].caption == "make it dusk"
    assert dataset.metadata == {"vae": "qwen_image_vae"}
    assert json.loads((tmp_path / "index.json").read_text())["latents"] == "raw"


# changed by the user

HUGE = 10**400


def change_index(folder, **changes):
    index = json.loads((folder / "index.json").read_text())
    for place, value in changes.items():
        table, _, key = place.rpartition("__")
        (index["items"][0] if table else index)[key] = value
    (folder / "index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("place", "values"),
    [
        ("items__target", [None, 8, "8", [8], [8, 8, 8], [0, 8], [-8, 8], [8.0, 8], ["8", 8]]),
        ("items__target", [[True, 8], [1e308, 8], [10**300, 8], [HUGE, 8], {}]),
        ("items__references", [None, 8, [8, 8], [[8, 8], None], [[0, 8]], "xy", {"a": [8, 8]}]),
        ("items__num_text_tokens", [None, "5", 0, -1, 5.0, True, HUGE, []]),
        ("items__key", [None, 5, "", "..", "../a", "a/b", "a\0", "x" * 300, ".hidden", "\ud800"]),
        ("items__caption", [None, 5, ["a"]]),
        ("items__has_mask", [None, 1, "false"]),
        ("items__has_empty_text", [None, 1, "false"]),
        ("items__more", [1]),
        ("items", [None, [], {}, "ab", [None], [[]], [{}], 5]),
        ("text_width", [None, "64", 0, -1, 64.0, True, HUGE]),
        ("has_empty_text", [None, 1, "false"]),
        ("metadata", [None, [], "x"]),
        ("version", [None, "1", [1], {}, HUGE, "x" * 3000]),
        ("latents", [None, "normalised", "x" * 3000, 1, []]),
        ("items__key", ["item_1"]),  # a second time
    ],
)
def test_sizes_and_counts_of_an_index_are_checked(tmp_path, place, values):
    make_dataset(tmp_path)
    kept = (tmp_path / "index.json").read_text()
    for value in values:
        (tmp_path / "index.json").write_text(kept)
        change_index(tmp_path, **{place: value})
        with pytest.raises(FileError, match=r"[Mm]ake the training set again") as caught:
            read_dataset(tmp_path)
        assert len(str(caught.value)) <= 400
        assert str(caught.value).isprintable()


def test_a_deeply_nested_or_invalid_index_or_a_pipe_is_refused(tmp_path):
    make_dataset(tmp_path)
    for text in ("[" * 100_000, "[]", "null", '{"version": NaN}', "\ufffe"):
        (tmp_path / "index.json").write_text(text)
        with pytest.raises(FileError, match=r"Make the training set again"):
            read_dataset(tmp_path)
    if hasattr(os, "mkfifo"):
        (tmp_path / "index.json").unlink()
        os.mkfifo(tmp_path / "index.json")
        with pytest.raises(FileError, match="is a pipe"):
            read_dataset(tmp_path)


def draw(*shape: int, dtype=torch.float32) -> torch.Tensor:
    return torch.rand(shape).to(dtype)


MASKED = {"mask": draw(8, 8), "text_empty": draw(2, TEXT_WIDTH)}


@pytest.mark.parametrize(
    ("name", "tensors"),
    [
        ("target", [draw(16, 8), draw(1, 16, 8, 8), draw(4, 8, 8), draw(16, 8, 9), draw(), None]),
        ("target", [draw(16, 8, 8, dtype=torch.int32), draw(16, 8, 8, dtype=torch.bool)]),
        ("reference_0", [draw(16, 8), draw(3, 8, 8), draw(16, 4, 8), draw(0), None]),
        ("text", [draw(5), draw(5, 32), draw(4, TEXT_WIDTH), draw(1, 5, TEXT_WIDTH), None]),
        ("text", [draw(5, TEXT_WIDTH, dtype=torch.int64)]),
        ("text_empty", [draw(2), draw(2, 32), draw(0, TEXT_WIDTH), draw(TEXT_WIDTH), None]),
        ("mask", [draw(8), draw(1, 8, 8), draw(4, 4), draw(), None]),
        ("mask", [torch.zeros(8, 8), -draw(8, 8), torch.full((8, 8), float("nan"))]),
        ("mask", [torch.full((8, 8), float("inf"))]),
        ("reference_1", [draw(16, 8, 8)]),
        ("reference_x" * 50, [draw(16, 8, 8)]),
        ("more\n", [draw(1)]),
    ],
)
def test_tensors_of_an_item_are_checked_before_they_are_trained_on(tmp_path, name, tensors):
    dataset = make_dataset(tmp_path, {"a": make_item(0, **MASKED)})
    path = tmp_path / "items" / "a.safetensors"
    for tensor in tensors:
        changed = {**make_item(0, **MASKED).tensors, name: tensor}
        save_file({key: t for key, t in changed.items() if t is not None}, path)
        with pytest.raises(FileError, match=r"ake the training set again") as caught:
            load_batch(dataset, [Slot(0, 0, 0)], 0)
        assert len(str(caught.value)) <= 400


@pytest.mark.parametrize("name", ["reference_1", "mask", "text_empty"])
@pytest.mark.parametrize("is_named", [False, True])
def test_an_item_holds_exactly_the_tensors_that_the_index_names(tmp_path, name, is_named):
    """One more was left out without a word; found before a run loads its model."""
    extra = {"reference_1": draw(16, 8, 8), "mask": draw(8, 8), "text_empty": draw(2, TEXT_WIDTH)}
    plain = make_item(0)
    both = replace(plain, references=(*plain.references, extra["reference_1"]))
    rich = both if name == "reference_1" else replace(plain, **{name: extra[name]})
    dataset = make_dataset(tmp_path, {"a": rich if is_named else plain})
    dataset.check_items()
    save_file((plain if is_named else rich).tensors, tmp_path / "items" / "a.safetensors")
    found = f"it holds {name}; expected only target, reference_0, text"
    found = f"it lacks {name}" if is_named else found
    for check in (dataset.check_items, lambda: dataset.load(0)):
        with pytest.raises(FileError, match=rf"{found}.*; make the training set again") as caught:
            check()
        assert len(str(caught.value)) <= 400
    config = make_config(tmp_path, **{"data.folder": str(tmp_path)})
    with pytest.raises(FileError, match=found):
        open_session(config)  # before it looks for a base model, which is not there


def test_the_empty_caption_is_checked_with_the_items(tmp_path):
    writer = DatasetWriter(tmp_path)
    writer.add("a", make_item(0))
    writer.set_empty_text(draw(2, TEXT_WIDTH))
    dataset = read_dataset(writer.finish())
    dataset.check_items()
    (tmp_path / "empty.safetensors").unlink()
    with pytest.raises(FileError, match="make the training set again"):
        dataset.check_items()


def test_an_item_that_is_cut_short_missing_or_no_file_says_what_to_do(tmp_path):
    dataset = make_dataset(tmp_path)
    path = tmp_path / "items" / "item_0.safetensors"
    data = path.read_bytes()
    for content in (b"", data[:-4], data[:20], b"\xff" * 100):
        path.write_bytes(content)
        with pytest.raises(FileError, match="make the training set again"):
            dataset.load(0)
    path.unlink()
    with pytest.raises(FileError, match=r"expected a cached item.*make the training set again"):
        dataset.load(0)


@pytest.mark.parametrize(
    "tensors", [{"text": draw(2, TEXT_WIDTH)}, {"text_empty": draw(2, 8)}, {"text_empty": draw(2)}]
)
def test_an_empty_caption_without_its_key_or_of_another_width_is_a_clear_error(tmp_path, tensors):
    writer = DatasetWriter(tmp_path)
    writer.add("a", make_item(0))
    writer.set_empty_text(draw(2, TEXT_WIDTH))
    dataset = read_dataset(writer.finish())
    save_file(tensors, tmp_path / "empty.safetensors")
    with pytest.raises(FileError, match=r"empty\.safetensors .* make the training set again"):
        load_batch(dataset, [Slot(0, 0, 0)], 0, caption_dropout=1.0)


def test_items_of_one_size_in_different_dtypes_make_one_batch(tmp_path):
    items = {"a": make_item(0), "b": make_item(1)}
    expected = load_batch(make_dataset(tmp_path, items), [Slot(0, 0, 0), Slot(1, 0, 1)], 0)
    items["b"] = replace(items["b"], target=items["b"].target.double())
    mixed = load_batch(make_dataset(tmp_path, items), [Slot(0, 0, 0), Slot(1, 0, 1)], 0)
    assert torch.equal(mixed.x_0, expected.x_0)


def test_sizes_of_latents_are_counted_in_whole_numbers():
    assert count_target_tokens(7, 8) == 16
    assert count_target_tokens(10**400, 2) == 10**400 // 2
