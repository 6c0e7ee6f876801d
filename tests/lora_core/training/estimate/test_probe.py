"""The estimate's own steps, as far as they run, on a fake GPU."""

from __future__ import annotations

import pytest
import torch
from qwen_edit_lora.lora_core.base_model.base_files import open_base_file
from qwen_edit_lora.lora_core.training.data.batches import load_repeated
from qwen_edit_lora.lora_core.training.estimate import probe as probe_module
from qwen_edit_lora.lora_core.training.estimate.probe import Probe, load_blocks
from qwen_edit_lora.lora_core.training.model.gradient_checkpointing import (
    KINDS,
    adapt_to_memory,
    measure_saved_bytes,
)
from small_bases import TINY, write_base
from tiny import make_config, make_dataset, make_item
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

GPU = torch.device("cuda:0")


def write_run(folder, storage):
    """A configuration that uses every feature of a step, and its training set."""
    changes = {
        "model.source": write_base(folder / "base.safetensors", 2, **TINY),
        "model.storage": storage,
        "model.gradient_checkpointing": "auto",
        "data.batch_size": 2,
        "lora.dropout": 0.1,
        "lora.use_dora": True,
        "optimizer.ema_decay": 0.9,
    }
    dataset = make_dataset(folder / "data", {"a": make_item(0, (8, 8), ((8, 8),))})
    return make_config(folder, **changes), dataset


def move(model: nn.Module) -> None:
    """Moves to the GPU as loading would, but without data."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            moved = torch.empty_like(parameter, device=GPU)
            setattr(module, name, nn.Parameter(moved, requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty_like(buffer, device=GPU))


@pytest.mark.parametrize("storage", ["bf16", "fp8", "int8"])
def test_a_probe_on_a_gpu_moves_everything_there(storage, tmp_path, monkeypatch):
    config, dataset = write_run(tmp_path, storage)
    base = open_base_file(config.model.source)
    model = load_blocks(config, base, torch.device("cpu"), 2, offloaded=False)
    batch = load_repeated(dataset, 0, 2, 0)  # no file can be read in the mode
    monkeypatch.setattr(probe_module, "load_repeated", lambda *arguments: batch)
    with FakeTensorMode(allow_non_fake_inputs=True):
        move(model)
        probe = Probe(config, model, dataset, 0, GPU, (1, 2), offloaded=False)
        kept = measure_saved_bytes(probe.model, probe.batch)
        assert kept[False] > kept["selective"] > 0
        sizes = {"num_blocks": 3, "num_parameters": 1000, "free_bytes": 2**40}
        adapt_to_memory(probe.model, probe.batch, **sizes, is_shared=True)
        for kind in KINDS:
            probe.model.enable_gradient_checkpointing(kind)
            assert probe.compute_loss().device == GPU
        for parameter in probe.parameters:  # autograd's own pass needs the driver
            parameter.grad = torch.zeros_like(parameter)
        probe.optimizer.step()
        probe.ema.update()
        assert probe.count_trained_bytes() > 3 * sum(4 * p.numel() for p in probe.parameters)
        places = {p.device for p in (*probe.model.parameters(), *probe.model.buffers())}
        assert places == {GPU}
