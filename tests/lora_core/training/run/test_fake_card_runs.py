"""Whole runs on a fake card: session, steps, optimizers, averages, resuming, estimate."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fake_cuda.bases import write_base
from fake_cuda.card import CUDA, LAZY, FakeCard
from qwen_edit_lora.lora_core import extract_adapter
from qwen_edit_lora.lora_core.injection.inject import LoraSettings, inject
from qwen_edit_lora.lora_core.jobs.picture_writer import ImageWriter
from qwen_edit_lora.lora_core.training.data.dataset import read_dataset
from qwen_edit_lora.lora_core.training.estimate import probe
from qwen_edit_lora.lora_core.training.estimate.estimate import estimate_run
from qwen_edit_lora.lora_core.training.machine.memory import MemoryMeter
from qwen_edit_lora.lora_core.training.model.loading import load_transformer
from qwen_edit_lora.lora_core.training.optimizer.ema import Ema
from qwen_edit_lora.lora_core.training.optimizer.gradients import (
    are_finite,
    clip_gradients,
    compute_grad_norm,
)
from qwen_edit_lora.lora_core.training.optimizer.optimization import (
    OPTIMIZERS,
    averaged_weights,
    build_optimizer,
    flatten_state,
    load_state,
    unflatten_state,
)
from qwen_edit_lora.lora_core.training.run.health import measure_health
from qwen_edit_lora.lora_core.training.run.session import open_session
from qwen_edit_lora.lora_core.training.run.trainer import train
from tiny import TEXT_WIDTH, make_config, make_dataset, make_item

#: What a run reads of the card: not 0, so that all is finite, and not above, as a stop would be.
ANSWER = -1.0


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base"), "bf16")


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    from diffusers import AutoencoderKLQwenImage

    folder = tmp_path_factory.mktemp("vae")
    AutoencoderKLQwenImage(base_dim=8, z_dim=16).save_pretrained(folder)
    return folder


@pytest.fixture
def configure(tmp_path, base):
    """configure(**changes) -> a run of the default settings on the card, with two pairs."""

    def make(device=LAZY, **changes):
        references = ((7, 9), (6, 4))
        items = {
            f"item_{i}": make_item(
                *(i, (7, 9), references, 4 + 3 * i),
                mask=torch.ones(7, 9),
                text_empty=torch.randn(2, TEXT_WIDTH),
            )
            for i in range(2)
        }
        for name in ("data", "prior"):
            if not (tmp_path / name).exists():
                make_dataset(tmp_path / name, items)
        defaults = {"model.source": base, "model.device": str(device)}
        defaults |= {"model.compute_dtype": "bf16", "steps": 2}
        if "data.prior" in changes:
            changes["data.prior"] = str(tmp_path / "prior")
        return make_config(tmp_path, **{**defaults, **changes})

    return make


def run(config, **more):
    """Runs to the end; weights and gradients are on the card."""
    session = open_session(config)
    more = {"decode": session.decode, "prior": session.prior, **more}
    reports = list(train(config, session.model, session.injection, session.dataset, **more))
    for parameter in session.injection.parameters():
        assert parameter.device == parameter.grad.device == LAZY
    return reports


CASES = {
    "defaults": {},
    "dora on a 2511": {"lora.use_dora": True, "model.variant": "2511"},
    "offloaded blocks": {"model.storage": "fp8", "model.offload_blocks": 1},
    "everything at once": {
        "data.batch_size": 2,
        "data.caption_dropout": 0.5,
        "data.prior": "prior",
        "lora.dropout": 0.1,
        "objective.auxiliary": {"contrastive": 0.1},
        "objective.weighting": "bell",
        "optimizer.accumulation": 2,
        "optimizer.ema_decay": 0.99,
        "saving.health_every": 1,
        "steps": 1,
    },
}


@pytest.mark.parametrize("name", CASES)
def test_a_run_goes_from_its_first_step_to_its_files_on_a_card(name, configure):
    config = configure(**CASES[name])
    with FakeCard(LAZY, ANSWER):
        *_, report = run(config)
    assert report.step == config.steps
    assert report.checkpoint is not None
    assert list(Path(config.output).rglob("*.safetensors"))


def test_an_auxiliary_loss_uses_images_decoded_on_the_card(configure, vae):
    def darkness(prediction):
        return prediction.image.flatten(1).mean(1)

    with FakeCard(LAZY, ANSWER):
        config = configure(**{"model.vae": str(vae), "steps": 1})
        (report,) = run(config, auxiliary={"darkness": (darkness, 0.1)})
    assert "darkness" in report.parts


@pytest.mark.parametrize("optimizer", ["adamw", "schedule-free"])
def test_a_run_begun_on_the_cpu_continues_on_a_card(optimizer, configure):
    changes = {"optimizer.name": optimizer, "optimizer.ema_decay": 0.9}
    config = configure("cpu", **changes, steps=1)
    session = open_session(config)
    list(train(config, session.model, session.injection, session.dataset))
    said = []
    with FakeCard(LAZY, ANSWER):
        (report,) = run(configure(**changes, steps=2), resume=True, notify=said.append)
    assert report.step == 2
    assert "resumed after step 1 of 2" in said


def make_parameters(device):
    shapes = [(64, 128), (128, 64), (4,)]
    parameters = [torch.nn.Parameter(torch.randn(*shape, device=device)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, device=device)
    return parameters


# bitsandbytes waits for the real card after a step on the type "cuda".
@pytest.mark.parametrize(
    ("name", "device"),
    [(name, d) for name in OPTIMIZERS for d in (CUDA, LAZY) if (name, d) != ("adamw8bit", CUDA)],
    ids=str,
)
def test_every_optimizer_steps_on_a_card_and_loads_a_state_from_a_file(name, device):
    pytest.importorskip(OPTIMIZERS[name].module.partition(".")[0])
    real = build_optimizer(name, make_parameters("cpu"), 1e-3)
    real.step()
    tensors, described = flatten_state(real.state_dict())
    with FakeCard(device, answer=1.0):
        parameters = make_parameters(device)
        optimizer = build_optimizer(name, parameters, 1e-3)
        optimizer.step()
        load_state(optimizer, unflatten_state(tensors, described))
        optimizer.step()
        with averaged_weights(optimizer):
            assert all(parameter.device == device for parameter in parameters)
        moved, _ = flatten_state(optimizer.state_dict())
        assert moved.keys() >= tensors.keys()


def test_gradients_are_measured_clipped_and_averaged_on_a_card():
    with FakeCard(CUDA, answer=10.0) as card:
        parameters = make_parameters(CUDA)
        with card.never_waiting():
            norm = compute_grad_norm(parameters)
        assert norm.item() == 10.0
        with card.never_waiting():
            clip_gradients(parameters, 10.0, 1.0)
            is_finite = are_finite(parameters)
        assert is_finite
        ema = Ema(((str(i), p) for i, p in enumerate(parameters)), 0.9)
        with card.never_waiting():
            ema.update()
        ema.load_state_dict({name: value.cpu() for name, value in ema.state_dict().items()})
        ema.update()
        assert {average.device for average in ema.averages.values()} == {CUDA}


def test_an_estimate_is_measured_on_a_card(configure, monkeypatch):
    monkeypatch.setattr(MemoryMeter, "find_free", lambda self: 2**34)
    monkeypatch.setattr(probe, "MAX_STEPS", 1)
    monkeypatch.setattr(probe, "CPU_PEAKS", 1)
    config = configure()
    with FakeCard(LAZY, ANSWER):
        found = estimate_run(config, read_dataset(config.data.folder))
    assert found.seconds_per_step > 0


def test_an_image_is_decoded_on_a_card_and_written(vae, tmp_path):
    said = []
    with FakeCard(LAZY):
        writer = ImageWriter(str(vae), None, LAZY, said.append)
        with writer.ready():
            writer.write(torch.randn(1, 16, 4, 6, device=LAZY), tmp_path / "picture")
    assert [path.name for path in tmp_path.glob("picture*")] == ["picture.png"]
    assert said == []


def test_health_is_measured_of_loras_on_a_card(base):
    with FakeCard(CUDA, answer=1.0):
        model = load_transformer(base, "bf16", CUDA)
        injection = inject(model.transformer, LoraSettings(rank=4), device=CUDA)
        assert measure_health(injection, 0).keys() == {"std", "spectral", "effective_rank"}
        adapter = injection.build_adapter("a")
        injection.load(adapter)
        assert {t.device for w in adapter.modules.values() for t in w.parts.values()} == {
            torch.device("cpu")
        }


def test_a_difference_of_models_is_decomposed_on_a_card(base, tmp_path):
    path = "transformer_blocks.0.attn.to_q.weight"
    weight = torch.randn(64, 64)
    with FakeCard(CUDA, answer=1.0):
        found = extract_adapter({path: weight}, {path: weight + 1}, 4, device=CUDA)
    assert len(found.adapter.modules) == 1
