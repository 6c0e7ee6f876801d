"""What "auto" keeps for the backward pass: counted right, within the memory, to the same bits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from qwen_edit_lora.lora_core.injection import inject
from qwen_edit_lora.lora_core.training import gradient_checkpointing, session
from qwen_edit_lora.lora_core.training.batches import load_repeated
from qwen_edit_lora.lora_core.training.dataset import read_dataset
from qwen_edit_lora.lora_core.training.gradient_checkpointing import (
    KINDS,
    PASSING_BLOCKS,
    LiveBytes,
    choose_kind,
    count_kept_bytes,
    measure_kept_bytes,
)
from qwen_edit_lora.lora_core.training.loading import load_transformer
from qwen_edit_lora.lora_core.training.memory import MemoryMeter
from qwen_edit_lora.lora_core.training.session import describe_session, open_session
from qwen_edit_lora.lora_core.training.trainer import train
from small_bases import TINY, write_base
from tiny import make_config, make_dataset, make_item

NUM_BLOCKS = 6
KEPT = {False: 100, "selective": 25}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base") / "base.safetensors", NUM_BLOCKS, **TINY)


def make_run(folder, base, free_bytes, monkeypatch, **changes):
    """A configuration and its session, on a machine with so much free memory."""
    monkeypatch.setattr(MemoryMeter, "find_free", lambda self: free_bytes)
    items = {f"item_{i}": make_item(i, (16, 16), ((16, 16),), 8 + i) for i in range(2)}
    make_dataset(folder / "data", items)
    changes = {"model.source": base, "model.storage": "fp32", "lora.dropout": 0.2, **changes}
    config = make_config(folder, **changes)
    return config, open_session(config)


def run(config, opened, **more):
    return list(train(config, opened.model, opened.injection, opened.dataset, **more))


@pytest.mark.parametrize(
    ("free_bytes", "kind"),
    [
        # Half of a CPU's free memory, less two blocks computed again and 16 bytes a parameter.
        (2 * (6 * 100 + 200 + 160), False),
        (2 * (6 * 100 + 200 + 160) - 2, "selective"),
        (2 * (6 * 25 + 200 + 160), "selective"),
        (2 * (6 * 25 + 200 + 160) - 2, True),
        (0, True),
    ],
)
def test_the_fastest_kind_that_fits_is_chosen(free_bytes, kind):
    assert choose_kind(KEPT, 6, 10, free_bytes, "cpu") == kind


def test_a_gpu_may_be_filled_further_than_a_cpu():
    assert choose_kind(KEPT, 6, 10, 1600, "cuda") is False
    assert choose_kind(KEPT, 6, 10, 1600, "cpu") == "selective"


def test_live_bytes_are_those_of_what_lives():
    with LiveBytes() as counter:
        x = torch.zeros(1000)
        view = x[10:]
        y = x + 1
        assert counter.live == 8000
        del x
        assert counter.live == 8000  # the view holds it
        del view
        assert counter.live == 4000
        y.add_(1)
        assert counter.live == 4000
        z = torch.zeros(500)
        del y, z
    assert counter.live == 0
    assert counter.most == 8000


@pytest.mark.parametrize("kind", KINDS[:-1], ids=str)
def test_what_a_step_needs_is_within_what_is_reckoned_for_it(kind, tmp_path, base, monkeypatch):
    _, opened = make_run(tmp_path, base, None, monkeypatch)
    batch = load_repeated(opened.dataset, 1, 1, 0)
    kept = measure_kept_bytes(opened.model, batch)
    opened.model.enable_gradient_checkpointing(kind)
    with LiveBytes() as counter:
        out = opened.model(
            batch.x_0, batch.references, batch.text, batch.text_mask, batch.u.float()
        )
        after_forward = counter.live
        out.float().square().mean().backward()
    assert after_forward == pytest.approx(NUM_BLOCKS * kept[kind], rel=0.15)
    reckoned = NUM_BLOCKS * kept[kind] + PASSING_BLOCKS * kept[False]
    gradients = 4 * opened.injection.plan.num_parameters
    assert 0.5 * reckoned < counter.most <= reckoned + gradients


def test_selective_keeps_a_quarter_and_the_model_is_left_as_it_was(tmp_path, base, monkeypatch):
    _, opened = make_run(tmp_path, base, None, monkeypatch)
    model = opened.model
    kept = measure_kept_bytes(model, load_repeated(opened.dataset, 1, 1, 0))
    assert 0.1 * kept[False] < kept["selective"] < 0.4 * kept[False]
    assert len(model.blocks) == NUM_BLOCKS
    assert model.gradient_checkpointing is True
    twice = measure_kept_bytes(model, load_repeated(opened.dataset, 1, 2, 0))
    assert twice[False] == pytest.approx(2 * kept[False], rel=0.1)


def test_a_block_keeps_no_more_tensors_of_the_streams_size_than_its_products_need(tmp_path):
    """Of its input 1, the attention 7 (q, k before and after their norms, v, result, input), the
    stream after it 1, the MLP 9: nothing of norms, rotation or modulation, in the type of the base.
    """
    sizes = {"attention_head_dim": 64, "num_attention_heads": 4, "joint_attention_dim": 64}
    path = write_base(tmp_path / "base.safetensors", 2, **sizes)
    make_dataset(tmp_path / "data", {"one": make_item(0, (32, 32), ((32, 32),), 64)})
    config = make_config(tmp_path, **{"lora.rank": 1, "lora.targets": ["full"]})
    model = load_transformer(path, "bf16")
    injection = inject(model.transformer, config.lora)
    assert injection.plan.num_parameters
    batch = load_repeated(read_dataset(tmp_path / "data"), 0, 1, 0)
    stream = (2 * 16 * 16 + 64) * 4 * 64 * 2
    kept = {kind: count_kept_bytes(model, batch, kind) / stream for kind in KINDS}
    assert 17 < kept[False] < 18.5
    assert 5.9 < kept["selective"] < 6.5
    assert 0.9 < kept[True] < 1.5


@pytest.mark.parametrize("storage", ["bf16", "fp8", "int8", "nf4"])
def test_bases_of_every_storage_are_counted(storage, tmp_path, base, monkeypatch):
    if storage == "nf4":
        pytest.importorskip("bitsandbytes")
    _, whole = make_run(tmp_path, base, None, monkeypatch)
    changes = {"model.storage": storage}
    _, opened = make_run(tmp_path / storage, base, None, monkeypatch, **changes)
    expected, found = (
        measure_kept_bytes(one.model, load_repeated(one.dataset, 1, 1, 0))
        for one in (whole, opened)
    )
    for kind in KINDS[:-1]:  # the activations are the same; no copy of a weight is kept
        assert found[kind] == pytest.approx(expected[kind], rel=0.1)


@pytest.mark.parametrize(("free_bytes", "kind"), [(None, True), (0, True), (2**40, False)])
def test_a_run_takes_what_the_free_memory_allows_and_says_so(
    free_bytes, kind, tmp_path, base, monkeypatch
):
    config, opened = make_run(tmp_path, base, free_bytes, monkeypatch)
    assert opened.model.gradient_checkpointing == kind
    shown = {True: "true", False: "false"}[kind]
    said = f"gradient_checkpointing is {shown}, the fastest that the free memory allows"
    assert said in describe_session(opened, config)
    assert len(run(config, opened)) == config.steps


def test_what_the_configuration_asks_for_is_not_changed(tmp_path, base, monkeypatch):
    wanted = {"model.gradient_checkpointing": "selective"}
    config, opened = make_run(tmp_path, base, 2**40, monkeypatch, **wanted)
    assert opened.model.gradient_checkpointing == "selective"
    assert not opened.model.recompute_more()
    assert not any("gradient_checkpointing" in line for line in describe_session(opened, config))
    offloaded = {"model.offload_blocks": 2}
    config, opened = make_run(tmp_path / "offloaded", base, 2**40, monkeypatch, **offloaded)
    assert opened.model.gradient_checkpointing is True


def test_the_larger_of_training_set_and_prior_decides(tmp_path, base, monkeypatch):
    seen = []

    def note(model, batch, *rest):
        seen.append(tuple(batch.x_0.shape))

    monkeypatch.setattr(session, "adapt_to_memory", note)
    make_dataset(tmp_path / "prior", {"large": make_item(0, (20, 16), (), 8)})
    changes = {"data.prior": str(tmp_path / "prior"), "data.batch_size": 3}
    make_run(tmp_path, base, 2**40, monkeypatch, **changes)
    assert seen == [(3, 16, 16, 16)]  # its reference counts
    make_dataset(tmp_path / "prior", {"large": make_item(0, (30, 30), (), 8)})
    make_run(tmp_path / "again", base, 2**40, monkeypatch, **changes)
    assert seen[1:] == [(3, 16, 30, 30)]


def test_out_of_memory_in_a_step_keeps_less_and_is_the_same_run(tmp_path, base, monkeypatch):
    config, opened = make_run(tmp_path / "a", base, 0, monkeypatch)
    expected = run(config, opened)
    config, opened = make_run(tmp_path / "b", base, 2**40, monkeypatch)
    model = opened.model
    number = 0

    def fail_once(module, inputs):
        nonlocal number
        number += 1
        if number == 3 * NUM_BLOCKS - 2:  # within the third step, after random numbers were drawn
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    for block in model.blocks:
        block.register_forward_pre_hook(fail_once)
    said = []
    found = run(config, opened, notify=said.append)
    assert [r.loss for r in found] == [r.loss for r in expected]
    assert [r.grad_norm for r in found] == [r.grad_norm for r in expected]
    assert model.gradient_checkpointing is True
    assert len(said) == 1
    assert said[0].startswith("memory ran out in step 3; from there on gradient_checkpointing is")


def test_out_of_memory_with_nothing_left_to_lower_is_raised(tmp_path, base, monkeypatch):
    config, opened = make_run(tmp_path, base, 0, monkeypatch)

    def fail(module, inputs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    opened.model.blocks[0].register_forward_pre_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        run(config, opened)


def test_the_estimate_chooses_as_the_run_will(tmp_path, base, monkeypatch):
    from qwen_edit_lora.lora_core.training.estimate import estimate_run

    config, opened = make_run(tmp_path, base, None, monkeypatch)
    kept = measure_kept_bytes(opened.model, load_repeated(opened.dataset, 1, 1, 0))
    blocks = NUM_BLOCKS * kept["selective"] + PASSING_BLOCKS * kept[False]
    needed = blocks + 16 * opened.injection.plan.num_parameters
    size = sum(p.numel() * p.itemsize for p in opened.model.blocks[0].parameters())
    size -= sum(p.numel() * 4 for p in opened.injection.parameters()) // NUM_BLOCKS
    free = round(needed / gradient_checkpointing.USABLE["cpu"] * 1.02)
    # The estimate holds three of six blocks: the others' weights have yet to come.
    monkeypatch.setattr(MemoryMeter, "find_free", lambda self: free + 3 * size)
    found = estimate_run(config, opened.dataset)
    assert found.gradient_checkpointing == "selective"
    assert 'gradient_checkpointing is "selective"' in found.to_text()
    monkeypatch.setattr(MemoryMeter, "find_free", lambda self: free)
    assert open_session(config).model.gradient_checkpointing == "selective"
    assert estimate_run(config, opened.dataset).gradient_checkpointing is True
    said = replace(found, gradient_checkpointing=True).to_text()
    assert "gradient_checkpointing" not in said


def test_injection_alone_leaves_the_choice_to_who_calls(base):
    from qwen_edit_lora.lora_core.injection_plan import LoraSettings

    model = load_transformer(base, "fp32", torch.device("cpu"), torch.float32)
    inject(model.transformer, LoraSettings(rank=4), seed=0)
    assert not model.is_adaptive
    assert not model.recompute_more()
