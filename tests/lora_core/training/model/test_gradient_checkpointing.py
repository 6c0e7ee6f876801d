"""What "auto" keeps for the backward pass: counted correctly, within memory, bit-identical."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
import torch
from qwen_edit_lora.lora_core import OutOfMemoryError
from qwen_edit_lora.lora_core.injection.inject import inject
from qwen_edit_lora.lora_core.jobs.failure import explain_error
from qwen_edit_lora.lora_core.training.data.batches import load_repeated
from qwen_edit_lora.lora_core.training.data.dataset import read_dataset
from qwen_edit_lora.lora_core.training.machine.memory import MemoryMeter
from qwen_edit_lora.lora_core.training.model import gradient_checkpointing
from qwen_edit_lora.lora_core.training.model.gradient_checkpointing import (
    KINDS,
    TRANSIENT_BLOCKS,
    LiveBytes,
    choose_kind,
    choose_share,
    count_saved_bytes,
    measure_saved_bytes,
)
from qwen_edit_lora.lora_core.training.model.loading import load_transformer
from qwen_edit_lora.lora_core.training.run import session
from qwen_edit_lora.lora_core.training.run.session import describe_session, open_session
from qwen_edit_lora.lora_core.training.run.trainer import train
from safetensors.torch import load_file
from small_bases import TINY, write_base
from tiny import make_config, make_dataset, make_item

NUM_BLOCKS = 6
KEPT = {False: 100, "selective": 25}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base") / "base.safetensors", NUM_BLOCKS, **TINY)


def make_run(folder, base, free_bytes, monkeypatch, **changes):
    """A configuration and its session, on a machine with this much free memory."""
    monkeypatch.setattr(MemoryMeter, "find_free", lambda self: free_bytes)
    items = {f"item_{i}": make_item(i, (16, 16), ((16, 16),), 8 + i) for i in range(2)}
    make_dataset(folder / "data", items)
    changes = {"model.source": base, "model.storage": "fp32", "lora.dropout": 0.2, **changes}
    config = make_config(folder, **changes)
    return config, open_session(config)


def run(config, opened, **more):
    return list(train(config, opened.model, opened.injection, opened.dataset, **more))


@pytest.mark.parametrize(
    ("usable_bytes", "kind"),
    [
        # Beside the blocks, two computed again and 16 bytes a parameter.
        (6 * 100 + 200 + 160, False),
        (6 * 100 + 200 + 160 - 1, "selective"),
        (6 * 25 + 200 + 160, "selective"),
        (6 * 25 + 200 + 160 - 1, True),
        (0, True),
    ],
)
def test_the_fastest_kind_that_fits_is_chosen(usable_bytes, kind):
    assert choose_kind(KEPT, 6, 10, usable_bytes) == kind


def test_a_gpu_that_comfyui_uses_too_is_filled_less_than_one_for_the_run_alone():
    assert choose_share("cuda", is_shared=False) == 0.9
    assert choose_share("cuda", is_shared=True) == 0.6
    assert choose_share("cpu", is_shared=False) == choose_share("cpu", is_shared=True) == 0.5


def test_live_bytes_are_those_of_live_tensors():
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
    assert counter.peak == 8000


@pytest.mark.parametrize("kind", KINDS[:-1], ids=str)
def test_the_memory_of_a_step_is_within_its_estimate(kind, tmp_path, base, monkeypatch):
    _, opened = make_run(tmp_path, base, None, monkeypatch)
    batch = load_repeated(opened.dataset, 1, 1, 0)
    kept = measure_saved_bytes(opened.model, batch)
    opened.model.enable_gradient_checkpointing(kind)
    with LiveBytes() as counter:
        out = opened.model(
            batch.x_0, batch.references, batch.text, batch.text_mask, batch.u.float()
        )
        after_forward = counter.live
        out.float().square().mean().backward()
    assert after_forward == pytest.approx(NUM_BLOCKS * kept[kind], rel=0.15)
    reckoned = NUM_BLOCKS * kept[kind] + TRANSIENT_BLOCKS * kept[False]
    gradients = 4 * opened.injection.plan.num_parameters
    assert 0.5 * reckoned < counter.peak <= reckoned + gradients


def test_selective_keeps_a_quarter_and_the_model_is_left_as_it_was(tmp_path, base, monkeypatch):
    _, opened = make_run(tmp_path, base, None, monkeypatch)
    model = opened.model
    kept = measure_saved_bytes(model, load_repeated(opened.dataset, 1, 1, 0))
    assert 0.1 * kept[False] < kept["selective"] < 0.4 * kept[False]
    assert len(model.blocks) == NUM_BLOCKS
    assert model.gradient_checkpointing is True
    twice = measure_saved_bytes(model, load_repeated(opened.dataset, 1, 2, 0))
    assert twice[False] == pytest.approx(2 * kept[False], rel=0.1)


def test_a_block_keeps_no_more_tensors_of_the_streams_size_than_its_products_need(tmp_path):
    """Input 1, attention 7 (q, k before and after their norms, v, result, input), the stream
    after it 1, MLP 9: nothing for norms, rotation or modulation, in the dtype of the base.
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
    kept = {kind: count_saved_bytes(model, batch, kind) / stream for kind in KINDS}
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
        measure_saved_bytes(one.model, load_repeated(one.dataset, 1, 1, 0))
        for one in (whole, opened)
    )
    for kind in KINDS[:-1]:  # the activations are the same; no copy of a weight is kept
        assert found[kind] == pytest.approx(expected[kind], rel=0.1)


@pytest.mark.parametrize(("free_bytes", "kind"), [(None, True), (0, True), (2**40, False)])
def test_a_run_uses_what_the_free_memory_allows_and_reports_it(
    free_bytes, kind, tmp_path, base, monkeypatch
):
    config, opened = make_run(tmp_path, base, free_bytes, monkeypatch)
    assert opened.model.gradient_checkpointing == kind
    shown = {True: "true", False: "false"}[kind]
    said = f"gradient_checkpointing is {shown}, the fastest that the free memory allows"
    assert said in describe_session(opened, config)
    assert len(run(config, opened)) == config.steps


def test_the_configured_kind_is_not_changed(tmp_path, base, monkeypatch):
    wanted = {"model.gradient_checkpointing": "selective"}
    config, opened = make_run(tmp_path, base, 2**40, monkeypatch, **wanted)
    assert opened.model.gradient_checkpointing == "selective"
    assert not opened.model.recompute_more()
    assert not any("gradient_checkpointing" in line for line in describe_session(opened, config))
    offloaded = {"model.offload_blocks": 2}
    config, opened = make_run(tmp_path / "offloaded", base, 2**40, monkeypatch, **offloaded)
    assert opened.model.gradient_checkpointing is True


def test_the_larger_of_training_set_and_prior_determines_the_choice(tmp_path, base, monkeypatch):
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


def fail_in_calls(model, numbers, error):
    """Raises in the given calls of blocks, counted over the run."""
    calls = itertools.count()

    def fail(module, inputs):
        if next(calls) in numbers:
            raise error

    for block in model.blocks:
        block.register_forward_pre_hook(fail)


# In the second half of the second step, after gradients and random numbers; and once more where its
# repetition has got as far.
FIRST = 3 * NUM_BLOCKS + 3
SECOND = FIRST + 3 + NUM_BLOCKS


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
    ids=["torch", "cuBLAS"],
)
@pytest.mark.parametrize(
    ("calls", "kinds"),
    [((FIRST,), ['"selective"']), ((FIRST, SECOND), ['"selective"', "true"])],
    ids=["once", "twice"],
)
def test_out_of_memory_in_a_step_keeps_less_by_one_kind_and_is_the_same_run(
    calls, kinds, error, tmp_path, base, monkeypatch
):
    changes = {"optimizer.accumulation": 2, "steps": 3}
    config, opened = make_run(tmp_path / "a", base, 0, monkeypatch, **changes)
    expected = run(config, opened)
    config, opened = make_run(tmp_path / "b", base, 2**40, monkeypatch, **changes)
    fail_in_calls(opened.model, calls, error)
    said = []
    found = run(config, opened, notify=said.append)
    assert [r.loss for r in found] == [r.loss for r in expected]
    assert [r.grad_norm for r in found] == [r.grad_norm for r in expected]
    assert json.dumps(opened.model.gradient_checkpointing) == kinds[-1]
    assert said == [
        f"memory ran out in step 2; from there on gradient_checkpointing is {kind}, which is "
        "slower and gives the same LoRA"
        for kind in kinds
    ]
    ours, theirs = (load_file(tmp_path / name / "run" / "tiny.safetensors") for name in "ba")
    assert all(torch.equal(ours[key], tensor) for key, tensor in theirs.items())


def test_out_of_memory_with_the_least_kept_says_in_which_step_and_what_to_lower(
    tmp_path, base, monkeypatch
):
    changes = {"data.batch_size": 2, "lora.rank": 32}
    config, opened = make_run(tmp_path, base, 2**40, monkeypatch, **changes)
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nGPU 0 has")
    fail_in_calls(opened.model, range(2 * NUM_BLOCKS, 10**6), error)
    said = []
    sentence = (
        r"^the computer ran out of memory in step 3 \(CUDA out of memory\. Tried to .* GPU 0 has\)"
        r"\. What lowers it: set data\.batch_size to 1 .*; lower lora\.rank; .* of time\.$"
    )
    with pytest.raises(OutOfMemoryError, match=sentence) as caught:
        run(config, opened, notify=said.append)
    assert len(said) == 2  # "selective" and true were tried
    failure = explain_error(caught.value, config)
    assert "ran out of memory in step 3" in failure.sentence
    assert "lower lora.rank" in failure.advice


def test_out_of_memory_while_the_optimizer_creates_its_state_is_reported_too(
    tmp_path, base, monkeypatch
):
    config, opened = make_run(tmp_path, base, 2**40, monkeypatch)

    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.optim.AdamW, "step", fail)
    with pytest.raises(OutOfMemoryError, match=r"in step 1 .* set optimizer.name to \"adamw8bit"):
        run(config, opened)


def test_the_estimate_chooses_as_the_run_will(tmp_path, base, monkeypatch):
    from qwen_edit_lora.lora_core.training.estimate.estimate import estimate_run

    config, opened = make_run(tmp_path, base, None, monkeypatch)
    kept = measure_saved_bytes(opened.model, load_repeated(opened.dataset, 1, 1, 0))
    blocks = NUM_BLOCKS * kept["selective"] + TRANSIENT_BLOCKS * kept[False]
    needed = blocks + 16 * opened.injection.plan.num_parameters
    size = sum(p.numel() * p.itemsize for p in opened.model.blocks[0].parameters())
    size -= sum(p.numel() * 4 for p in opened.injection.parameters()) // NUM_BLOCKS
    free = round(needed / gradient_checkpointing.USABLE["cpu"] * 1.02)
    # The estimate holds three of six blocks: the others' weights have yet to come.
    monkeypatch.setattr(MemoryMeter, "find_free", lambda self: free + 3 * size)
    found = estimate_run(config, opened.dataset)
    assert found.gradient_checkpointing == "selective"
    assert 'measured with gradient_checkpointing = "selective"' in found.to_text()
    monkeypatch.setattr(MemoryMeter, "find_free", lambda self: free)
    assert open_session(config).model.gradient_checkpointing == "selective"
    assert estimate_run(config, opened.dataset).gradient_checkpointing is True
    said = replace(found, gradient_checkpointing=True).to_text()
    assert "gradient_checkpointing" not in said


def test_injection_alone_leaves_the_choice_to_the_caller(base):
    from qwen_edit_lora.lora_core.injection.plan import LoraSettings

    model = load_transformer(base, "fp32", torch.device("cpu"), torch.float32)
    inject(model.transformer, LoraSettings(rank=4), seed=0)
    assert not model.is_adaptive
    assert not model.recompute_more()
