"""Prefetched batches: identical, errors at their own step, no thread that outlives its run."""

from __future__ import annotations

import math
import threading
from dataclasses import fields

import pytest
import torch
from qwen_edit_lora.lora_core import FileError, NonFiniteLossError
from qwen_edit_lora.lora_core.training.data.batches import DataOrder, load_batch
from qwen_edit_lora.lora_core.training.data.prefetch import Prefetcher
from qwen_edit_lora.lora_core.training.run.trainer import train
from tiny import make_config, make_dataset, make_injected, make_item

GPU = torch.device("cuda:0")


def list_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("prefetch")]


def start(folder, should_stop=None, **changes):
    config = make_config(folder, **changes)
    dataset = make_dataset(folder / "data")
    model, injection = make_injected(config)
    return train(config, model, injection, dataset, should_stop=should_stop), model, dataset


def test_each_number_is_loaded_once_and_ahead_of_time():
    loaded: list[int] = []
    threads: set[int] = set()

    def load(number: int) -> int:
        loaded.append(number)
        threads.add(threading.get_ident())
        return number**2

    batches = Prefetcher(load, 5)
    assert [batches.take(number) for number in range(5)] == [0, 1, 4, 9, 16]
    assert loaded == [0, 1, 2, 3, 4]
    assert len(threads) == 2
    batches.close()
    assert list_threads() == []


def test_the_next_batch_is_loaded_while_the_last_is_used():
    is_loading = threading.Event()

    def load(number: int) -> int:
        if number == 1:
            is_loading.set()
        return number

    batches = Prefetcher(load, 2)
    batches.take(0)
    assert is_loading.wait(30)
    batches.close()


def test_numbers_out_of_turn_are_loaded_too():
    batches = Prefetcher(lambda number: number, 4)
    assert [batches.take(number) for number in (0, 1, 0, 1, 2, 3)] == [0, 1, 0, 1, 2, 3]
    batches.close()
    assert batches.take(2) == 2
    batches.close()


def test_an_error_comes_with_the_number_that_it_belongs_to():
    def load(number: int) -> int:
        if number == 2:
            raise FileError("the third is gone")
        return number

    batches = Prefetcher(load, 5)
    assert [batches.take(0), batches.take(1)] == [0, 1]
    with pytest.raises(FileError, match="the third is gone"):
        batches.take(2)
    batches.close()


def test_a_single_number_needs_no_thread(tmp_path):
    batches = Prefetcher(lambda number: number, 1)
    assert batches.take(0) == 0
    assert list_threads() == []
    reports, *_ = start(tmp_path, steps=1)
    next(reports)
    assert list_threads() == []


def test_a_file_that_is_gone_ends_the_run_at_its_own_step(tmp_path):
    reports, _, dataset = start(tmp_path)
    third = DataOrder(dataset.items, 1, 0).get_slots(2)[0]
    (tmp_path / "data" / "items" / f"{dataset.items[third.item].key}.safetensors").unlink()
    assert [next(reports).step, next(reports).step] == [1, 2]
    with pytest.raises(FileError, match="item_"):
        next(reports)
    assert list_threads() == []


@pytest.mark.parametrize("end", ["last step", "stop", "closed", "forgotten", "error"])
def test_no_thread_outlives_its_run(end, tmp_path):
    asked: list[bool] = []
    reports, model, _ = start(tmp_path, lambda: bool(asked))
    next(reports)
    assert len(list_threads()) == 1
    if end == "last step":
        assert len(list(reports)) == 5
    elif end == "stop":
        asked.append(True)
        assert list(reports) == []
    elif end == "closed":
        reports.close()
    elif end == "forgotten":
        del reports
    else:
        model.transformer.proj_out.bias.data[0] = math.nan
        with pytest.raises(NonFiniteLossError):
            next(reports)
    assert list_threads() == []


def test_what_a_gpu_gets_is_the_same_where_no_memory_can_be_locked(tmp_path, monkeypatch):
    def refuse(tensor):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch.Tensor, "pin_memory", refuse)
    items = {f"item_{i}": make_item(i, mask=torch.rand(8, 8)) for i in range(2)}
    dataset = make_dataset(tmp_path, items)
    batch = load_batch(dataset, DataOrder(dataset.items, 2, 0).get_slots(0), 0)
    kept = batch.pin(GPU)
    for name in (field.name for field in fields(batch)):
        assert getattr(kept, name) is getattr(batch, name) or name == "references", name
    assert kept.references == batch.references


def test_everything_a_gpu_gets_is_locked_and_a_cpu_gets_no_copies(tmp_path, monkeypatch):
    locked: list[tuple[int, ...]] = []

    def lock(tensor):
        locked.append(tuple(tensor.shape))
        return tensor.clone()

    monkeypatch.setattr(torch.Tensor, "pin_memory", lock)
    items = {f"i{i}": make_item(i, (8, 8), ((6, 4),), 4 + i, mask=torch.ones(8, 8)) for i in (0, 1)}
    dataset = make_dataset(tmp_path, items)
    batch = load_batch(dataset, DataOrder(dataset.items, 2, 0).get_slots(0), 0)
    assert batch.pin(torch.device("cpu")) is batch
    assert locked == []
    batch.pin(GPU)
    sizes = [(2, 16, 8, 8), (2, 16, 6, 4), (2, 5, 64), (2, 5), (2, 16, 8, 8), (2, 1, 8, 8)]
    assert locked == sizes
