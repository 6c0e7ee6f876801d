"""Offloaded blocks compute identical results, with few copies alive at once."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch
from qwen_edit_lora.lora_core import ConfigError
from qwen_edit_lora.lora_core.injection.inject import LoraSettings, inject
from qwen_edit_lora.lora_core.training.machine.page_locks import PageLocks
from qwen_edit_lora.lora_core.training.model.host_blocks import HostBlocks
from qwen_edit_lora.lora_core.training.model.loading import load_transformer
from qwen_edit_lora.lora_core.training.model.offload import (
    MAX_COPIED_BLOCKS,
    BlockOffload,
    choose_offloaded,
)
from qwen_edit_lora.lora_core.training.run.session import describe_session, open_session
from qwen_edit_lora.lora_core.training.run.trainer import train
from small_bases import TINY, write_base
from tiny import TEXT_WIDTH, make_config, make_dataset
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef

NUM_BLOCKS = 5
CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base") / "base.safetensors", NUM_BLOCKS, **TINY)


class WatchedOffload(BlockOffload):
    """Records which copies are alive, and what ran in which order."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.copies: list[StorageWeakRef] = []
        self.most_alive = 0
        self.ran: list[int] = []

    def copy(self, buffer):
        copy = super().copy(buffer)
        assert copy.data_ptr() != buffer.data_ptr()
        self.copies.append(StorageWeakRef(copy.untyped_storage()))
        return copy

    def run(self, index, *inputs):
        self.ran.append(index)
        out = super().run(index, *inputs)
        self.most_alive = max(self.most_alive, self.count_alive())
        return out

    def count_alive(self) -> int:
        """Number of blocks whose copy's memory is still referenced, even by a single view."""
        return sum(not ref.expired() for ref in self.copies)


def load(base, storage, indices=None, settings=None):
    model = load_transformer(base, storage)
    model.enable_gradient_checkpointing()
    if indices is not None:
        model.offload = WatchedOffload(model.blocks, indices, CPU)
    settings = settings or LoraSettings(rank=4, init="gaussian")
    injection = inject(model.transformer, settings, device=CPU)
    torch.manual_seed(0)
    with torch.no_grad():
        for layer in injection.layers.values():
            layer.lora_B.normal_(std=0.02)
    return model, injection


def take_step(model, injection, num_steps=1):
    torch.manual_seed(1)
    for parameter in injection.parameters():
        parameter.grad = None
    for _ in range(num_steps):
        out = model(
            torch.randn(2, 16, 8, 8),
            [torch.randn(2, 16, 6, 10)],
            torch.randn(2, 7, TEXT_WIDTH),
            None,
            torch.tensor([0.3, 0.8]),
        )
        out.float().square().mean().backward()
    return out.detach(), [parameter.grad for parameter in injection.parameters()]


@pytest.mark.parametrize("indices", [(4,), (0, 2, 4), tuple(range(NUM_BLOCKS))], ids=str)
@pytest.mark.parametrize("storage", ["bf16", "fp8", "int8", "nf4"])
def test_every_bit_is_the_same(storage, indices, base):
    expected, expected_grads = take_step(*load(base, storage), num_steps=2)
    model, injection = load(base, storage, indices)
    found, grads = take_step(model, injection, num_steps=2)
    assert torch.equal(found, expected)
    assert all(map(torch.equal, grads, expected_grads))
    assert any(grad.abs().max() > 0 for grad in grads)


@pytest.mark.parametrize(
    "settings",
    [
        LoraSettings(rank=4, use_dora=True),
        LoraSettings(rank=4, init="pissa"),
        LoraSettings(rank=4, dropout=0.3),
    ],
    ids=["dora", "pissa", "dropout"],
)
def test_every_kind_of_lora_trains_on_offloaded_blocks(settings, base):
    expected = take_step(*load(base, "bf16", settings=settings))
    found = take_step(*load(base, "bf16", (1, 3), settings))
    assert torch.equal(found[0], expected[0])
    assert all(map(torch.equal, found[1], expected[1]))


def test_few_copies_are_alive_at_once_and_the_weights_never_move(base):
    model, injection = load(base, "fp8", range(NUM_BLOCKS))
    places = {name: t.data_ptr() for name, t in model.named_parameters()}
    take_step(model, injection, num_steps=3)
    offload = model.offload
    assert 1 <= offload.most_alive <= MAX_COPIED_BLOCKS - 1  # the third only where work is queued
    assert {name: t.data_ptr() for name, t in model.named_parameters()} == places
    offload.release()
    assert offload.count_alive() == 0


def test_a_block_is_copied_once_per_pass_and_kept_between_the_passes(base):
    model, injection = load(base, "bf16", (0, 2, 4))
    take_step(model, injection)
    order = [*range(NUM_BLOCKS), *reversed(range(NUM_BLOCKS))]
    assert model.offload.ran == order
    assert model.offload.num_moved == 3 + 2
    take_step(model, injection)
    assert model.offload.num_moved == 5 + 2 + 2


def test_without_gradients_the_first_block_follows_the_last(base):
    model, _ = load(base, "bf16", (1, 3))
    inputs = torch.randn(1, 16, 8, 8), [], torch.randn(1, 3, TEXT_WIDTH), None, torch.tensor([0.5])
    with torch.no_grad():
        for _ in range(3):
            model(*inputs)
    assert model.offload.num_moved == 1 + 2 * 3  # one is already in transit


def test_loras_are_on_the_device_and_not_copied(base):
    model, _ = load(base, "bf16", (0,))
    sent = model.offload.send(0).copies
    assert not any("lora_" in name for name in sent)
    assert "attn.to_q.base.weight" in sent
    assert "attn.norm_q.weight" in sent


@pytest.mark.parametrize("storage", ["bf16", "fp8", "int8", "nf4"])
def test_a_block_arrives_in_one_copy_with_every_tensor_as_it_was(storage, base):
    expected = load_transformer(base, storage).blocks[1]
    expected = {name: t.clone() for name, t in list_tensors(expected)}
    model = load_transformer(base, storage, num_offloaded=NUM_BLOCKS)
    sent = model.offload.send(1)
    assert sent.copies.keys() == expected.keys()
    places = set()
    for name, tensor in sent.copies.items():
        assert (tensor.dtype, tensor.shape) == (expected[name].dtype, expected[name].shape)
        assert tensor.stride() == expected[name].stride()
        assert torch.equal(as_bytes(tensor), as_bytes(expected[name]))
        assert tensor.data_ptr() % 64 == 0
        places.add(tensor.untyped_storage().data_ptr())
    assert places == {sent.buffer.untyped_storage().data_ptr()}


def list_tensors(block):
    return [*block.named_parameters(), *block.named_buffers()]


def as_bytes(tensor):
    return tensor.detach().reshape(-1).view(torch.uint8)


def test_an_offloaded_blocks_weights_are_in_memory_once(base):
    model = load_transformer(base, "fp8", num_offloaded=NUM_BLOCKS)
    for block in model.blocks:
        (storage,) = {t.untyped_storage().data_ptr() for _, t in list_tensors(block)}
        assert storage == model.offload.host[block].buffer.untyped_storage().data_ptr()


class Driver:
    """Locks pages up to a limit, and records its calls."""

    def __init__(self, room: int):
        self.room = room
        self.locked: dict[int, int] = {}
        self.num_asked = 0

    def register(self, address, num_bytes, device):
        self.num_asked += 1
        assert device == CUDA
        if num_bytes > self.room:
            return False
        self.room -= num_bytes
        self.locked[address] = num_bytes
        return True

    def unregister(self, address, device):
        self.room += self.locked.pop(address)


def wait_for_gpu(model, driver) -> HostBlocks:
    host = HostBlocks(CUDA, PageLocks(CUDA, driver.register, driver.unregister))
    for block in model.blocks:
        host.add(block)
    return host


def test_only_the_blocks_pages_are_locked(base):
    model = load_transformer(base, "fp8")
    size = sum(t.numel() * t.dtype.itemsize for b in model.blocks for _, t in list_tensors(b))
    num_tensors = sum(len(list_tensors(block)) for block in model.blocks)
    driver = Driver(2**40)
    host = wait_for_gpu(model, driver)
    model.offload_blocks(range(NUM_BLOCKS), CUDA, host)
    assert driver.num_asked == host.num_locked == NUM_BLOCKS
    assert sum(driver.locked.values()) == host.locked_bytes == host.num_bytes
    assert size <= host.locked_bytes <= size + 512 * num_tensors + 4096 * NUM_BLOCKS
    assert model.notes == []
    for block in model.blocks:
        start, length = host[block].buffer.data_ptr(), len(host[block].buffer)
        assert start % 4096 == length % 4096 == 0
        assert driver.locked[start] == length


def test_blocks_beyond_the_systems_lock_limit_stay_unlocked_and_are_reported(base, tmp_path):
    model = load_transformer(base)
    (size,) = {len(packed.buffer) for packed in wait_for_gpu(model, Driver(0)).blocks.values()}
    driver = Driver(3 * size - 1)
    host = wait_for_gpu(model, driver)
    assert host.num_locked == 2
    assert driver.num_asked == 3  # and not again
    assert host.locked_bytes == 2 * size
    assert host.num_bytes == NUM_BLOCKS * size
    model.offload_blocks(range(NUM_BLOCKS), CUDA, host)
    (sentence,) = model.notes
    assert f"of the {NUM_BLOCKS} blocks" in sentence
    assert "locks only 2 " in sentence
    make_dataset(tmp_path / "data")
    config = make_config(tmp_path, **{"model.source": base})
    session = replace(open_session(config), model=model)
    assert sentence in describe_session(session, config)
    with FakeTensorMode(allow_non_fake_inputs=True):  # unlocked pages are sent too
        assert model.offload.take(4).buffer.device == CUDA


def test_pages_are_unlocked_once_the_model_is_freed(base):
    model = load_transformer(base)
    driver = Driver(2**40)
    model.offload_blocks(range(NUM_BLOCKS), CUDA, wait_for_gpu(model, driver))
    assert len(driver.locked) == NUM_BLOCKS
    del model
    gc.collect()
    assert driver.locked == {}
    assert driver.room == 2**40


def test_without_a_gpu_locking_pages_fails_without_an_error():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    locks = PageLocks(CUDA)
    assert not locks.lock(torch.empty(4096, dtype=torch.uint8))
    assert locks.was_refused
    locks.release()


@pytest.mark.parametrize("storage", ["bf16", "fp8", "int8", "nf4"])
def test_a_block_is_sent_to_a_gpu_that_is_not_there(storage, base):
    model = load_transformer(base, storage)
    model.offload_blocks(range(NUM_BLOCKS), CUDA, wait_for_gpu(model, Driver(2**40)))
    with FakeTensorMode(allow_non_fake_inputs=True):
        sent = model.offload.take(3)
        assert sent.buffer.device == CUDA
        here = dict(list_tensors(model.blocks[3]))
        assert sent.copies.keys() == here.keys()
        for name, tensor in sent.copies.items():
            assert tensor.device == CUDA
            assert (tensor.dtype, tensor.shape) == (here[name].dtype, here[name].shape)


def test_a_full_size_block_takes_the_memory_of_its_weights():
    # The README's rows of main memory: 54 blocks in fp8 are 17.1 GiB.
    from qwen_edit_lora.lora_core.training.model.architecture import Architecture
    from qwen_edit_lora.lora_core.training.model.host_blocks import ALIGNMENT

    block = Architecture(num_layers=1).build_empty().transformer_blocks[0]
    sizes = [p.numel() * (1 if p.ndim == 2 else 2) for p in block.parameters()]
    sizes += [4 * p.shape[0] for p in block.parameters() if p.ndim == 2]  # a scale by row
    places = sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)
    assert sum(sizes) <= places <= 1.0001 * sum(sizes)
    assert round(54 * places / 2**30, 1) == 17.1


@pytest.mark.parametrize(
    ("count", "expected"), [(0, ()), (1, (4,)), (2, (2, 4)), (5, (0, 1, 2, 3, 4))]
)
def test_offloaded_blocks_are_spread(count, expected):
    assert choose_offloaded(5, count) == expected


def test_offloading_more_blocks_than_exist_is_reported(base):
    with pytest.raises(ConfigError, match="offload_blocks is 6, but the model has 5 blocks"):
        load_transformer(base, num_offloaded=6)


def test_offloading_without_checkpointing_is_refused(base):
    model = load_transformer(base, num_offloaded=1)
    with pytest.raises(ConfigError, match="offload_blocks needs gradient_checkpointing"):
        model.enable_gradient_checkpointing(False)
    with pytest.raises(ConfigError, match="set gradient_checkpointing to true"):
        model.enable_gradient_checkpointing("selective")


def test_an_offloaded_model_is_not_moved_by_others(base):
    model = load_transformer(base, num_offloaded=1)
    with pytest.raises(ConfigError, match="set offload_blocks to 0"):
        model.to("cpu")


def test_a_run_with_offloaded_blocks_is_the_same_run(base, tmp_path):
    weights = []
    for count in (0, 3):
        changes = {"model.source": base, "model.storage": "fp8", "model.offload_blocks": count}
        config = make_config(tmp_path / str(count), **changes)
        make_dataset(tmp_path / str(count) / "data")
        session = open_session(config)
        assert len(list(train(config, session.model, session.injection, session.dataset))) == 6
        weights.append([p.detach().clone() for p in session.injection.parameters()])
    assert all(map(torch.equal, *weights))


@pytest.mark.gpu
def test_offloading_reduces_the_bases_gpu_memory(tmp_path, deterministic):
    base = write_base(tmp_path / "base.safetensors", 6)
    inputs = (torch.randn(1, 16, 64, 64), [], torch.randn(1, 64, 3584), None, torch.tensor([0.5]))
    inputs = [x.cuda() if isinstance(x, torch.Tensor) else x for x in inputs]
    peaks, results = [], []
    for count in (0, 6):
        torch.cuda.empty_cache()
        model = load_transformer(base, "bf16", "cuda", num_offloaded=count)
        model.enable_gradient_checkpointing()
        injection = inject(model.transformer, LoraSettings(rank=4), device=torch.device("cuda"))
        torch.cuda.reset_peak_memory_stats()
        for _ in range(2):
            out = model(*inputs)
            out.float().square().mean().backward()
        results.append([out.detach(), *(p.grad for p in injection.parameters())])
        peaks.append(torch.cuda.max_memory_allocated())
        del model, injection, out
        gc.collect()
    size = sum(t.numel() * 2 for t in load_transformer(base).blocks.parameters())
    assert peaks[1] < peaks[0] - size * (6 - MAX_COPIED_BLOCKS - 0.5) / 6
    for found, expected in zip(*results, strict=True):  # to the bit on a CPU, see above
        error = (found - expected).float().norm() / expected.float().norm().clamp_min(1e-12)
        assert error < 1e-2  # activations are in bf16
