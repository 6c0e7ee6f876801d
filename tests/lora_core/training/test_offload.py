"""Offloaded blocks compute the same numbers, with few copies alive at once."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from qwen_edit_lora.lora_core import ConfigError
from qwen_edit_lora.lora_core.injection import LoraSettings, inject
from qwen_edit_lora.lora_core.training.loading import load_transformer
from qwen_edit_lora.lora_core.training.offload import MOST_BLOCKS, BlockOffload, choose_offloaded
from qwen_edit_lora.lora_core.training.session import open_session
from qwen_edit_lora.lora_core.training.trainer import train
from small_bases import TINY, write_base
from tiny import TEXT_WIDTH, make_config, make_dataset

NUM_BLOCKS = 5
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base") / "base.safetensors", NUM_BLOCKS, **TINY)


class WatchedOffload(BlockOffload):
    """Knows which copies are alive, and what ran in which order."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.copies: list[weakref.ref] = []
        self.most_alive = 0
        self.ran: list[int] = []

    def copy(self, tensor):
        copy = super().copy(tensor)
        assert copy.data_ptr() != tensor.data_ptr()
        self.copies.append(weakref.ref(copy))
        return copy

    def run(self, index, *inputs):
        self.ran.append(index)
        out = super().run(index, *inputs)
        self.most_alive = max(self.most_alive, self.count_alive())
        return out

    def count_alive(self) -> float:
        """In blocks."""
        return sum(ref() is not None for ref in self.copies) / count_tensors(self.blocks[0])


def count_tensors(block) -> int:
    frozen = [p for p in block.parameters() if not p.requires_grad]
    return len(frozen) + len(list(block.buffers()))


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
    assert 1 <= offload.most_alive <= MOST_BLOCKS - 1  # the third only where work is queued
    assert {name: t.data_ptr() for name, t in model.named_parameters()} == places
    offload.release()
    assert offload.count_alive() == 0


def test_a_block_is_copied_once_a_pass_and_kept_where_the_passes_turn(base):
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
    assert model.offload.num_moved == 1 + 2 * 3  # one is on its way already


def test_loras_are_on_the_device_and_not_among_what_is_copied(base):
    model, _ = load(base, "bf16", (0,))
    sent, _ = model.offload.send(0)
    assert not any("lora_" in name for name in sent)
    assert "attn.to_q.base.weight" in sent
    assert "attn.norm_q.weight" in sent


@pytest.mark.parametrize(
    ("count", "expected"), [(0, ()), (1, (4,)), (2, (2, 4)), (5, (0, 1, 2, 3, 4))]
)
def test_offloaded_blocks_are_spread(count, expected):
    assert choose_offloaded(5, count) == expected


def test_more_than_there_are_is_said(base):
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
def test_on_a_gpu_the_base_takes_less_of_its_memory(tmp_path, deterministic):
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
    assert peaks[1] < peaks[0] - size * (6 - MOST_BLOCKS - 0.5) / 6
    for found, expected in zip(*results, strict=True):  # to the bit on a CPU, see above
        error = (found - expected).float().norm() / expected.float().norm().clamp_min(1e-12)
        assert error < 1e-2  # activations are in bf16
