"""How often a step waits for the device: once, for its metrics.

A fake CUDA device shows every copy between it and the host, and refuses to mix the two; only a real
one or a CPU can run a backward pass.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext

import pytest
import torch
from qwen_edit_lora.lora_core import NonFiniteLossError
from qwen_edit_lora.lora_core.injection.inject import inject
from qwen_edit_lora.lora_core.jobs.job import SampleSettings
from qwen_edit_lora.lora_core.jobs.samples import Sampler
from qwen_edit_lora.lora_core.training.model.architecture import Architecture
from qwen_edit_lora.lora_core.training.model.gradient_checkpointing import KINDS
from qwen_edit_lora.lora_core.training.model.transformer import EditTransformer
from qwen_edit_lora.lora_core.training.objective.objective import Objective
from qwen_edit_lora.lora_core.training.optimizer import optimization
from qwen_edit_lora.lora_core.training.run import micro_steps, run, trainer
from qwen_edit_lora.lora_core.training.run.checkpoint import CheckpointFolder
from qwen_edit_lora.lora_core.training.run.processes import Processes
from qwen_edit_lora.lora_core.training.run.session import open_session
from qwen_edit_lora.lora_core.training.run.trainer import train
from small_bases import TINY, write_base
from tiny import make_config, make_dataset, make_injected
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CUDA = torch.device("cuda:0")
#: Every feature of a step.
CHANGES = {
    "optimizer.ema_decay": 0.9,
    "optimizer.accumulation": 2,
    "optimizer.max_grad_norm": 0.5,
    "objective.auxiliary": {"contrastive": 0.1},
    "lora.dropout": 0.1,
    "data.prior_weight": 0.5,
    "saving.checkpoint_every": 100,
    "steps": 5,
}
READS = {"item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__float__", "__int__"}


class Copies(TorchDispatchMode):
    """Records copies between the devices that the host waits for, and reads of values."""

    def __init__(self) -> None:
        super().__init__()
        self.waited_for: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        devices = {leaf.device.type for leaf in tree_leaves((args, kwargs, out)) if is_tensor(leaf)}
        crosses = devices == {"cpu", "cuda"} and "copy" in name
        is_async = kwargs.get("non_blocking") or (name == "copy_" and args[2:] == (True,))
        if (crosses and not is_async) or name in ("_local_scalar_dense", "nonzero"):
            self.waited_for.append(name)
        return out


class Reads(TorchFunctionMode):
    """Calls of Python that need a tensor's values."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in READS:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def is_tensor(leaf: object) -> bool:
    return isinstance(leaf, torch.Tensor)


def build_fake_model() -> EditTransformer:
    transformer = Architecture(num_layers=2, axes_dims_rope=(4, 14, 14), **TINY).build_empty()
    for module in transformer.modules():
        for name, parameter in module.named_parameters(recurse=False):
            empty = torch.empty(parameter.shape, dtype=torch.bfloat16, device=CUDA)
            setattr(module, name, torch.nn.Parameter(empty, requires_grad=False))
    return EditTransformer(transformer.eval(), torch.bfloat16)


@pytest.fixture
def fake_reports(tmp_path, monkeypatch) -> Iterator:
    """Reports of a run on a fake device, and how many values each read of it returned, all 1.

    Any other read of a value there raises an error.
    """
    reads: list[int] = []

    def read(tensor) -> list[float]:
        reads.append(tensor.numel())
        return [1.0] * tensor.numel()

    load_batches = micro_steps.MicroSteps.load_batches
    with ThreadPoolExecutor(1) as elsewhere:  # where tensors are real
        monkeypatch.setattr(
            micro_steps.MicroSteps,
            "load_batches",
            lambda self, number: elsewhere.submit(load_batches, self, number).result(),
        )
        monkeypatch.setattr(run, "measure_memory", lambda device: 0)
        monkeypatch.setattr(FakeTensor, "tolist", read)
        config = make_config(tmp_path, **CHANGES)
        dataset, prior = (make_dataset(tmp_path / name, 1) for name in ("data", "prior"))
        with FakeTensorMode(allow_non_fake_inputs=True):
            model = build_fake_model()
            injection = inject(model.transformer, config.lora, device=CUDA)

            def backward(loss):
                assert loss.device == CUDA
                for parameter in injection.parameters():
                    parameter.grad = torch.zeros_like(parameter)

            monkeypatch.setattr(torch.Tensor, "backward", backward)
            reports = train(config, model, injection, dataset, prior=prior)
            yield reports, reads
            reports.close()


def test_a_step_on_a_gpu_waits_for_no_copy_but_its_metrics(fake_reports):
    reports, reads = fake_reports
    next(reports)  # makes the optimizer's state, and the positions of these sizes
    for _ in range(2):
        reads.clear()
        with Copies() as copies:
            report = next(reports)
        assert copies.waited_for == []
        assert reads == [5]  # three parts of the loss, the norm, whether all is finite
    assert report.parts.keys() == {"velocity", "contrastive", "prior"}


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_step_with_its_backward_pass_reads_values_once(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(optimization, "can_fuse", lambda params: True)  # as on a GPU
    base = write_base(tmp_path / "base.safetensors", 2, **TINY)
    changes = {"model.source": base, "model.storage": "fp8", "model.gradient_checkpointing": kind}
    config = make_config(tmp_path, **CHANGES, **changes)
    dataset, prior = (make_dataset(tmp_path / name, 1) for name in ("data", "prior"))
    opened = open_session(config)
    reports = train(config, opened.model, opened.injection, dataset, prior=prior)
    next(reports)
    for _ in range(2):
        with Copies() as copies, Reads() as reads:
            next(reports)
        assert copies.waited_for == []
        assert reads.names == ["tolist"]
    reports.close()


class TwoProcesses(Processes):
    """This process and an identical one that is asked to stop at its own time."""

    def __init__(self, is_other_asked) -> None:
        super().__init__()
        self.count = 2
        self.is_other_asked = is_other_asked

    def prepare(self, model, parameters):
        return model

    def without_sync(self, model):
        return nullcontext()

    def average(self, tensor: torch.Tensor) -> torch.Tensor:
        other = tensor.clone()
        other[-1] = float(self.is_other_asked())
        return (tensor + other) / 2

    def sum(self, number: float, device: torch.device) -> float:
        return number + self.is_other_asked()

    def gather(self, value):
        return [value, value]

    def wait(self) -> None:
        pass


@pytest.mark.parametrize("who", ["this", "the other"])
@pytest.mark.parametrize("last", [0, 2])
def test_several_processes_stop_after_the_same_step_without_extra_waits(
    who, last, tmp_path, monkeypatch
):
    monkeypatch.setattr(optimization, "can_fuse", lambda params: True)
    monkeypatch.setattr(trainer, "Processes", lambda accelerator: processes)
    numbers = {"this": itertools.count(), "the other": itertools.count()}

    def is_asked(name: str) -> bool:
        """Before the first step, and then within each."""
        return next(numbers[name]) >= last and name == who

    processes = TwoProcesses(lambda: is_asked("the other"))
    config = make_config(tmp_path, **{"saving.checkpoint_every": 100})
    model, injection = make_injected(config)
    dataset = make_dataset(tmp_path / "data")
    reports = train(config, model, injection, dataset, should_stop=lambda: is_asked("this"))
    for step in range(1, last + 1):
        with Reads() as reads:
            report = next(reports)
        assert report.step == step
        tokens = report.tokens_per_s * report.seconds
        assert 2 * (2 * 16 + 4) <= tokens <= 2 * (2 * 16 + 6)  # two samples of 4 to 6 text tokens
        assert step == 1 or reads.names == ["tolist"]  # the first batch is made here
    assert list(reports) == []
    assert CheckpointFolder(tmp_path / "run" / "checkpoints").list_steps() == [last][:last]


@contextmanager
def infinite_updates(injection) -> Iterator[None]:
    """Inside this context, an optimizer's step leaves an infinite weight."""

    def spoil(*_) -> None:
        with torch.no_grad():
            injection.parameters()[0].view(-1)[0] = math.inf

    handle = register_optimizer_step_post_hook(spoil)
    try:
        yield
    finally:
        handle.remove()


def test_infinite_weights_are_reported_with_their_step_before_the_next_one(tmp_path):
    config = make_config(tmp_path, **{"saving.checkpoint_every": 100})
    model, injection = make_injected(config)
    reports = train(config, model, injection, make_dataset(tmp_path / "data"))
    next(reports)
    with infinite_updates(injection):
        assert next(reports).step == 2  # not known yet
    with pytest.raises(NonFiniteLossError, match=r"finite gradients at step 2, so that nothing"):
        next(reports)
    assert list((tmp_path / "run").rglob("*.safetensors")) == []


def test_no_sample_is_made_of_infinite_weights(tmp_path):
    base = write_base(tmp_path / "base.safetensors", 2, **TINY)
    changes = {"model.source": base, "model.storage": "fp32", "saving.checkpoint_every": 100}
    config = make_config(tmp_path, **changes)
    make_dataset(tmp_path / "data")
    (tmp_path / "run").mkdir()
    opened = open_session(config)
    objective, notes = Objective(config.objective), []
    started = run.Run(
        config=config,
        model=opened.model,
        injection=opened.injection,
        dataset=opened.dataset,
        prior=None,
        objective=objective,
        variant=None,
        processes=Processes(),
        notify=notes.append,
        resume=False,
    )
    reports = started.take_steps(lambda: False)
    samples = SampleSettings(every=1, steps=1)
    sampler = Sampler(samples, opened, started, tmp_path / "samples", notes.append)
    next(reports)
    sampler.make(1, lambda: False)
    assert len(list((tmp_path / "samples").iterdir())) == 1
    with infinite_updates(opened.injection):
        next(reports)
    with pytest.raises(NonFiniteLossError, match="finite gradients at step 2"):
        sampler.make(2, lambda: False)
    assert len(list((tmp_path / "samples").iterdir())) == 1


@pytest.mark.parametrize("by", ["stop", "checkpoint", "adapter", "health"])
def test_weights_are_checked_to_be_finite_before_they_are_used(by, tmp_path):
    asked: list[bool] = []
    changes = {"saving.checkpoint_every": 2 if by == "checkpoint" else 100}
    changes["saving.adapter_every"] = 2 if by == "adapter" else 0
    changes["saving.health_every"] = 2 if by == "health" else 0
    config = make_config(tmp_path, **changes)
    model, injection = make_injected(config)
    dataset = make_dataset(tmp_path / "data")
    reports = train(config, model, injection, dataset, should_stop=lambda: bool(asked))
    steps = [next(reports).step]

    def go_on() -> None:
        with infinite_updates(injection):
            steps.append(next(reports).step)
        asked.append(True)
        next(reports)

    with pytest.raises(NonFiniteLossError, match="finite gradients at step 2, so that nothing"):
        go_on()
    assert steps == ([1, 2] if by == "stop" else [1])
    assert list((tmp_path / "run").rglob("*.safetensors")) == []
