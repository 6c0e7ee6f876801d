"""Optimizers and schedules: the libraries and transformers as oracles, bit-exact resuming."""

from __future__ import annotations

import json
import math
import sys

import pytest
import torch
from qwen_edit_lora.lora_core import ConfigError
from qwen_edit_lora.lora_core.disk.writing import separate
from qwen_edit_lora.lora_core.training.optimizer.optimization import (
    OPTIMIZERS,
    averaged_weights,
    build_optimizer,
    flatten_state,
    load_state,
    set_learning_rate,
    unflatten_state,
)
from qwen_edit_lora.lora_core.training.optimizer.schedules import SHAPES, build_schedule
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode

RATES = {"prodigy": 1.0, "adafactor": 1e-3}


@pytest.fixture(params=OPTIMIZERS)
def name(request):
    kind = OPTIMIZERS[request.param]
    pytest.importorskip(kind.module)
    return request.param


def make_parameters(dtype=torch.float32):
    """A lora_A, a lora_B that starts at 0, a magnitude, and one too large for 32-bit states."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 6), (8, 4), (8,), (16, 512)]
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    tensors[1].zero_()
    return [torch.nn.Parameter(tensor.to(dtype)) for tensor in tensors]


def take_steps(optimizer, parameters, steps, lr):
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        for parameter in parameters:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.grad = (parameter.detach() + 0.3 * noise).to(parameter.dtype)
        set_learning_rate(optimizer, lr * (1 - step / 20))
        optimizer.step()
        optimizer.zero_grad()


def round_trip(state, tmp_path):
    """Through safetensors and JSON, as a checkpoint stores it."""
    tensors, value = flatten_state(state)
    save_file(separate(tensors), tmp_path / "state.safetensors")
    (tmp_path / "state.json").write_text(json.dumps(value))
    value = json.loads((tmp_path / "state.json").read_text())
    return unflatten_state(load_file(tmp_path / "state.safetensors"), value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stop", [0, 1, 4])
def test_a_resumed_optimizer_takes_bit_identical_steps(name, stop, dtype, tmp_path):
    lr = RATES.get(name, 1e-2)
    straight = make_parameters(dtype)
    take_steps(build_optimizer(name, straight, lr), straight, range(8), lr)

    parameters = make_parameters(dtype)
    optimizer = build_optimizer(name, parameters, lr)
    take_steps(optimizer, parameters, range(stop), lr)
    state = round_trip(optimizer.state_dict(), tmp_path)
    resumed = [torch.nn.Parameter(p.detach().clone()) for p in parameters]
    other = build_optimizer(name, resumed, lr)
    load_state(other, state)
    take_steps(other, resumed, range(stop, 8), lr)
    for a, b, start in zip(straight, resumed, make_parameters(dtype), strict=True):
        assert torch.equal(a, b)
        # Prodigy's first steps are below bfloat16's resolution
        assert not torch.equal(a, start) or (name == "prodigy" and dtype == torch.bfloat16)


@pytest.mark.parametrize("steps", [0, 3])
def test_a_state_moves_from_a_gpu_to_another_device_and_back(steps, tmp_path):
    """Counters move to the device if one kernel does a step, and back if not."""
    straight, fused = make_parameters(), make_parameters()
    take_steps(build_optimizer("adamw", straight, 1e-2), straight, range(8), 1e-2)
    theirs = torch.optim.AdamW(fused, 1e-2, fused=True)  # also available on a CPU
    take_steps(theirs, fused, range(steps), 1e-2)

    resumed = [torch.nn.Parameter(p.detach().clone()) for p in fused]
    optimizer = build_optimizer("adamw", resumed, 1e-2)
    load_state(optimizer, round_trip(theirs.state_dict(), tmp_path))
    assert not optimizer.param_groups[0]["fused"]
    take_steps(optimizer, resumed, range(steps, 8), 1e-2)
    for a, b in zip(straight, resumed, strict=True):
        torch.testing.assert_close(a, b)

    state = optimizer.state_dict()
    with FakeTensorMode(allow_non_fake_inputs=True):
        on_gpu = [torch.nn.Parameter(torch.empty(p.shape, device="cuda")) for p in resumed]
        optimizer = build_optimizer("adamw", on_gpu, 1e-2)
        load_state(optimizer, state)
        assert optimizer.param_groups[0]["fused"]
        places = {value.device.type for one in optimizer.state.values() for value in one.values()}
        assert places == {"cuda"}
        for parameter in on_gpu:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()


@pytest.mark.parametrize(("first", "count"), [("adamw", 3), ("schedule-free", 4)])
def test_a_state_of_other_parameters_or_another_optimizer_is_refused(first, count):
    pytest.importorskip("schedulefree")
    state = build_optimizer("adamw", make_parameters(), 1e-3).state_dict()
    other = build_optimizer(first, make_parameters()[:count], 1e-3)
    with pytest.raises(ConfigError, match=rf"state for 4 parameters .* over {count}; resume with"):
        load_state(other, state)


def test_every_optimizer_approaches_a_minimum(name):
    parameters = make_parameters()
    targets = [p.detach() + 0.5 for p in parameters]
    optimizer = build_optimizer(name, parameters, RATES.get(name, 1e-2), weight_decay=0.0)
    losses = []
    for _ in range(80):
        loss = sum((p - t).square().mean() for p, t in zip(parameters, targets, strict=True))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < (0.98 if name in ("adafactor", "prodigy") else 0.7) * losses[0]


def test_adafactor_moves_a_weight_that_starts_at_zero_at_the_full_rate():
    pytest.importorskip("transformers")
    parameter = torch.nn.Parameter(torch.zeros(4, 4))
    optimizer = build_optimizer("adafactor", [parameter], 1e-3)
    parameter.grad = torch.ones(4, 4)
    optimizer.step()
    torch.testing.assert_close(parameter.detach(), torch.full((4, 4), -1e-3))


def test_adamw_equals_torchs():
    ours, theirs = make_parameters(), make_parameters()
    lr = 1e-2
    take_steps(build_optimizer("adamw", ours, lr, weight_decay=0.1), ours, range(5), lr)
    take_steps(torch.optim.AdamW(theirs, lr, weight_decay=0.1), theirs, range(5), lr)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_eight_bit_states_take_a_quarter_of_the_room_of_adamw():
    pytest.importorskip("bitsandbytes")
    sizes = {}
    for name in ("adamw", "adamw8bit"):
        parameter = torch.nn.Parameter(torch.ones(64, 4096))
        optimizer = build_optimizer(name, [parameter], 1e-3)
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        tensors, _ = flatten_state(optimizer.state_dict())
        sizes[name] = sum(t.numel() * t.element_size() for t in tensors.values())
    assert sizes["adamw8bit"] < 0.27 * sizes["adamw"]


def test_reading_the_averaged_weights_changes_nothing(name):
    lr = RATES.get(name, 1e-2)
    watched, alone = make_parameters(), make_parameters()
    first, second = (build_optimizer(name, p, lr) for p in (watched, alone))
    for step in range(6):
        take_steps(first, watched, [step], lr)
        take_steps(second, alone, [step], lr)
        trained = [p.detach().clone() for p in watched]
        with averaged_weights(first):
            averaged = [p.detach().clone() for p in watched]
        assert all(torch.equal(a, b) for a, b in zip(watched, trained, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(watched, alone, strict=True))
    same = all(torch.equal(a, b) for a, b in zip(averaged, trained, strict=True))
    assert same == (name != "schedule-free")


def test_the_averaged_weights_are_those_of_the_librarys_eval_mode():
    schedulefree = pytest.importorskip("schedulefree")
    ours, theirs = make_parameters(), make_parameters()
    optimizer = build_optimizer("schedule-free", ours, 1e-2)
    reference = schedulefree.AdamWScheduleFree(theirs, 1e-2, weight_decay=0.01)
    reference.train()
    take_steps(optimizer, ours, range(5), 1e-2)
    take_steps(reference, theirs, range(5), 1e-2)
    reference.eval()
    with averaged_weights(optimizer):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    take_steps(optimizer, ours, [5], 1e-2)  # still in train mode


@pytest.mark.parametrize(
    ("name", "lr", "options", "sentence"),
    [
        ("adam", 1e-4, {}, "unknown optimizer 'adam'; expected one of adamw, adamw8bit, prodigy"),
        ("adamw", 1e-4, {"decay": 1}, "adamw has no option decay; expected betas, eps, weight"),
        ("adamw", 0, {}, "the learning rate is 0; expected a number above 0"),
        ("adamw", math.nan, {}, "the learning rate is nan"),
        ("adamw", 1e-4, {"betas": [0.9, 2.0]}, "adamw refuses its options: Invalid beta"),
    ],
)
def test_a_wrong_optimizer_is_a_clear_error(name, lr, options, sentence):
    with pytest.raises(ConfigError, match=sentence):
        build_optimizer(name, make_parameters(), lr, **options)


def test_no_parameters_are_a_clear_error():
    with pytest.raises(ConfigError, match="no parameters to train"):
        build_optimizer("adamw", [], 1e-4)


@pytest.mark.parametrize("name", ["adamw8bit", "prodigy", "schedule-free", "adafactor"])
def test_a_missing_library_is_named_with_its_command(name, monkeypatch):
    kind = OPTIMIZERS[name]
    for module in list(sys.modules):
        if module.split(".")[0] == kind.module.split(".")[0]:
            monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, kind.module, None)
    with pytest.raises(ConfigError, match=rf"needs {kind.package}.*`pip install {kind.package}`"):
        build_optimizer(name, make_parameters(), 1e-4)


def test_building_an_optimizer_prints_nothing(name, capfd):
    build_optimizer(name, make_parameters(), 1e-3)
    assert capfd.readouterr().out == ""


def test_a_state_keeps_types_keys_and_shared_tensors():
    shared = torch.arange(3)
    state = {
        "state": {0: {"step": torch.tensor(2.0), "book": shared}, 1: {"book": shared}},
        "groups": [{"betas": (0.9, 0.999), "lr": 0.1 + 0.2, "flag": True, "beta3": None}],
        "limit": math.inf,
    }
    tensors, value = flatten_state(state)
    back = unflatten_state(tensors, json.loads(json.dumps(value)))
    assert len(tensors) == 2
    assert list(back["state"]) == [0, 1]
    assert back["state"][1]["book"] is back["state"][0]["book"]
    assert back["groups"] == state["groups"]
    assert isinstance(back["groups"][0]["betas"], tuple)
    assert back["limit"] == math.inf


def test_state_that_is_not_plain_data_is_refused():
    with pytest.raises(ConfigError, match="holds a function at state/hook"):
        flatten_state({"hook": lambda: None})


def test_a_missing_tensor_is_named():
    _, value = flatten_state({"a": torch.ones(1)})
    with pytest.raises(ConfigError, match="the checkpoint lacks state/a"):
        unflatten_state({}, value)


@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize("name", SHAPES)
def test_factors_are_those_of_transformers(name, warmup):
    transformers = pytest.importorskip("transformers")
    total, lr = 40, 0.5
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    special = {"power": 2.0, "lr_end": 0.1 * lr} if name == "polynomial" else None
    scheduler = transformers.get_scheduler(
        "constant_with_warmup" if name == "constant" else name,
        optimizer,
        warmup,
        total,
        scheduler_specific_kwargs=special,
    )
    schedule = build_schedule(
        name, warmup, total, power=2.0, final_factor=0.1 if name == "polynomial" else 0.0
    )
    for step in range(total + 1):
        expected = scheduler.get_last_lr()[0] / lr
        assert schedule(step) == pytest.approx(expected, abs=1e-12), step
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("name", ["linear", "cosine", "polynomial"])
def test_a_schedule_ends_at_its_final_factor_and_stays_there(name):
    schedule = build_schedule(name, 2, 10, final_factor=0.25)
    assert [schedule(0), schedule(1), schedule(2)] == [0.0, 0.5, 1.0]
    assert schedule(10) == schedule(1000) == 0.25
    assert all(schedule(step) >= schedule(step + 1) for step in range(2, 10))


@pytest.mark.parametrize(
    ("name", "arguments", "sentence"),
    [
        ("rex", {}, "unknown schedule 'rex'; expected one of constant, linear, cosine, polyn"),
        ("linear", {"warmup": 11}, "the warm-up is 11 of 10 steps"),
        ("linear", {"warmup": -1}, "the warm-up is -1 of 10 steps"),
        ("linear", {"total": 0}, "the warm-up is 0 of 0 steps"),
        ("linear", {"final_factor": 1.5}, "final_factor is 1.5; expected 0 to 1"),
        ("polynomial", {"power": 0}, "power is 0; expected a number above 0"),
    ],
)
def test_a_wrong_schedule_is_a_clear_error(name, arguments, sentence):
    with pytest.raises(ConfigError, match=sentence):
        build_schedule(name, **{"warmup": 0, "total": 10, **arguments})
