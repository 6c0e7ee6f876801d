"""Runs on a real device: always the CPU, and a GPU if there is one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from fake_cuda.bases import KINDS as FILES
from fake_cuda.bases import write_base as write_stored
from qwen_edit_lora.lora_core.training.data.batches import load_repeated
from qwen_edit_lora.lora_core.training.machine.memory import MemoryMeter
from qwen_edit_lora.lora_core.training.model.gradient_checkpointing import measure_saved_bytes
from qwen_edit_lora.lora_core.training.model.quantization import AS_STORED, STORAGES
from qwen_edit_lora.lora_core.training.run.session import open_session
from qwen_edit_lora.lora_core.training.run.trainer import train
from qwen_edit_lora.lora_core.training.sampling.sampling import sample
from small_bases import TINY, write_base
from tiny import make_config, make_dataset, make_item

STORED = [
    *(("bf16", storage) for storage in STORAGES if storage != AS_STORED),
    *((kind, AS_STORED) for kind in (*FILES, "gguf")),
]


def configure(folder, device, source, steps=3, **changes):
    """The default settings, in bf16."""
    defaults = {"model.source": source, "model.device": str(device), "steps": steps}
    return make_config(folder, **{**defaults, "model.compute_dtype": "bf16", **changes})


def run(config, **more):
    session = open_session(config)
    reports = list(train(config, session.model, session.injection, session.dataset, **more))
    return session, reports


@pytest.mark.parametrize(("kind", "storage"), STORED)
def test_a_run_with_default_settings_takes_steps_in_every_storage(kind, storage, device, tmp_path):
    if storage == "nf4":
        pytest.importorskip("bitsandbytes")
    items = {"a": make_item(0, (8, 8), ((8, 8),)), "b": make_item(1, (9, 7), ((6, 10), (4, 4)))}
    dataset = make_dataset(tmp_path / "data", items)
    source = write_stored(tmp_path, kind)
    session, reports = run(configure(tmp_path, device, source, **{"model.storage": storage}))
    assert len(reports) == 3
    assert {p.device.type for p in session.injection.parameters()} == {device.type}
    assert any(p.grad.abs().max() > 0 for p in session.injection.parameters())
    latents = sample(session.model, dataset, 1, num_steps=2, device=device)
    assert latents.shape == (1, 16, 9, 7)
    assert latents.isfinite().all()


@pytest.mark.parametrize(
    "changes",
    [
        {"data.batch_size": 2},  # captions of two lengths: attention with a mask
        {"lora.use_dora": True, "model.variant": "2511"},
        {"lora.dropout": 0.2, "model.gradient_checkpointing": "selective"},
        {"model.offload_blocks": 2, "model.storage": "fp8"},
        {"optimizer.name": "adamw8bit", "optimizer.ema_decay": 0.9},
    ],
    ids=str,
)
def test_a_run_resumed_in_the_middle_is_the_same_run(changes, device, deterministic, tmp_path):
    make_dataset(tmp_path / "data", 4)
    source = write_base(tmp_path / "base.safetensors", 2, **TINY)
    weights = []
    for name in ("whole", "halves"):
        output = {"output": str(tmp_path / name), "saving.checkpoint_every": 2, **changes}
        if name == "halves":
            stopped = configure(tmp_path, device, source, 2, **output)
            run(stopped)
        config = configure(tmp_path, device, source, 4, **output)
        session, _ = run(config, resume=name == "halves")
        weights.append([p.detach().cpu() for p in session.injection.parameters()])
    assert all(map(torch.equal, *weights))


@contextmanager
def short_of_memory(model, device: torch.device, extra_bytes: int) -> Iterator[None]:
    """A GPU on which `extra_bytes` are left; simulated on the CPU while everything is kept."""
    if device.type == "cpu":

        def fail(module, inputs):
            if not model.gradient_checkpointing:
                raise torch.OutOfMemoryError("CUDA out of memory")

        hook = model.blocks[-1].register_forward_pre_hook(fail)
        yield
        hook.remove()
        return
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info(device)[0]
    filler = torch.empty(free - extra_bytes, dtype=torch.uint8, device=device)
    yield
    del filler
    torch.cuda.empty_cache()


def test_a_step_that_runs_out_of_memory_is_retried_with_less_kept(device, tmp_path, monkeypatch):
    # On a GPU large enough that its allocator's blocks, up to 20 MB, are negligible.
    side, num_blocks = (192, 8) if device.type == "cuda" else (8, 3)
    monkeypatch.setattr(MemoryMeter, "find_free", lambda self: 2**45)
    make_dataset(tmp_path / "data", {"a": make_item(0, (side, side), ((side, side),))})
    source = write_base(tmp_path / "base.safetensors", num_blocks, **TINY)
    config = configure(tmp_path, device, source, 2)
    session = open_session(config)
    model, said = session.model, []
    assert model.gradient_checkpointing is False
    kept = measure_saved_bytes(model, load_repeated(session.dataset, 0, 1, 0).to(device))[False]
    with short_of_memory(model, device, num_blocks // 2 * kept):
        losses = [
            report.loss
            for report in train(
                config, model, session.injection, session.dataset, notify=said.append
            )
        ]
    # One kind at a time; which one fits depends on the card.
    kind = model.gradient_checkpointing
    assert kind == "selective" or (kind is True and device.type == "cuda")
    assert len(said) == (1 if kind == "selective" else 2)
    assert all(sentence.startswith("memory ran out in step 1") for sentence in said)
    assert all(map(torch.isfinite, map(torch.tensor, losses)))
