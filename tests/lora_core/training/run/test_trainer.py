"""The training loop: its arithmetic against plain PyTorch, and what stops it."""

from __future__ import annotations

import math
import os
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch
from qwen_edit_lora.lora_core import (
    FileError,
    NonFiniteLossError,
    compute_delta,
    read_adapter,
)
from qwen_edit_lora.lora_core.training.data.batches import DataOrder, load_batch
from qwen_edit_lora.lora_core.training.data.dataset import DatasetWriter, read_dataset
from qwen_edit_lora.lora_core.training.objective import flow
from qwen_edit_lora.lora_core.training.objective.objective import Objective
from qwen_edit_lora.lora_core.training.run.checkpoint import CheckpointFolder
from qwen_edit_lora.lora_core.training.run.trainer import train
from safetensors.torch import load_file
from tiny import make_config, make_dataset, make_injected, make_item


def run(folder: Path, dataset=None, **changes):
    config = make_config(folder, **changes)
    dataset = dataset or make_dataset(folder / "data")
    return list(train(config, *make_injected(config), dataset))


def set_lora_B(injection) -> None:
    """Sets it away from 0, so that lora_A has gradients too."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in injection.named_parameters():
        if name.endswith("lora_B"):
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.data = noise / 10


def test_a_step_is_that_of_a_dense_float64_reference(tmp_path):
    """W + scale * B @ A written out, autograd by hand, torch's AdamW: the same weights after."""
    changes = {
        "steps": 2,
        "lora.alpha": 6,
        "optimizer.accumulation": 2,
        "optimizer.max_grad_norm": 0.02,
        "objective.weighting": "bell",
        "saving.checkpoint_every": 2,
    }
    config = make_config(tmp_path, **changes)
    items = {k: make_item(i, num_text_tokens=5, mask=torch.rand(8, 8)) for i, k in enumerate("ab")}
    dataset = make_dataset(tmp_path / "data", items)

    model, injection = make_injected(config)
    set_lora_B(injection)
    start = {name: p.detach().clone() for name, p in injection.named_parameters()}
    reports = list(train(config, model, injection, dataset))
    trained = {name: p.detach() for name, p in injection.named_parameters()}

    reference = make_injected(config, torch.float64)
    reference[1].eject()
    base = reference[0]
    factors = {name: t.double().requires_grad_() for name, t in start.items()}
    optimizer = torch.optim.AdamW(factors.values(), lr=1e-2, weight_decay=0.01)
    paths = [name.removesuffix(".lora_A") for name in start if name.endswith(".lora_A")]
    order = DataOrder(dataset.items, 1, 0)
    for step, report in enumerate(reports):
        optimizer.zero_grad()
        losses = []
        for number in (2 * step, 2 * step + 1):
            dense = {
                f"transformer.{path}.weight": base.transformer.get_submodule(path).weight.detach()
                + 6 / 4 * factors[f"{path}.lora_B"] @ factors[f"{path}.lora_A"]
                for path in paths
            }
            batch = load_batch(dataset, order.get_slots(number), 0)
            z = torch.special.ndtri(batch.u)
            odds = 2.2 * torch.exp(z)
            sigma = (odds / (1 + odds)).double()
            x_0, noise = batch.x_0.double(), batch.noise.double()
            x_sigma = x_0 + sigma * (noise - x_0)
            inputs = (x_sigma, [r.double() for r in batch.references], batch.text.double())
            velocity = torch.func.functional_call(base, dense, (*inputs, None, sigma))
            error = (velocity - (noise - x_0)).square()
            mask = batch.mask.double()
            weight = flow.weigh(sigma, "bell")
            loss = weight * (error * mask).sum() / (mask.sum() * 16)
            (loss / 2).sum().backward()
            losses.append(loss.item())
        assert report.loss == pytest.approx(sum(losses) / 2, rel=1e-5)
        norm = math.sqrt(sum(f.grad.square().sum().item() for f in factors.values()))
        assert report.grad_norm == pytest.approx(norm, rel=1e-4)
        assert norm > 0.02  # so that clipping takes part
        for factor in factors.values():
            factor.grad *= 0.02 / norm
        optimizer.step()
    for name, factor in factors.items():
        moved = (factor - start[name]).norm()
        assert (trained[name] - factor).norm() < 2e-3 * moved, name


def test_accumulating_two_micro_batches_takes_their_mean(tmp_path):
    config = make_config(tmp_path, steps=1, **{"optimizer.accumulation": 2})
    dataset = make_dataset(tmp_path / "data")
    report, *_ = train(config, *make_injected(config), dataset)
    model, injection = make_injected(config)
    order, objective = DataOrder(dataset.items, 1, 0), Objective(config.objective)
    losses = [
        objective.compute_losses(model, load_batch(dataset, order.get_slots(n), 0))["velocity"]
        for n in range(2)
    ]
    mean = torch.cat(losses).mean()
    mean.backward()
    norm = torch.stack([p.grad.norm() for p in injection.parameters()]).norm()
    assert report.loss == pytest.approx(mean.item(), rel=1e-6)
    assert report.grad_norm == pytest.approx(norm.item(), rel=1e-5)


def test_prior_preservation_adds_the_weighted_loss_of_the_second_set(tmp_path):
    dataset = make_dataset(tmp_path / "data", 1)
    prior = make_dataset(tmp_path / "prior", {"p": make_item(7, (4, 8))})
    losses = {}
    for weight in (0.0, 0.5, 2.0):
        config = make_config(tmp_path / str(weight), steps=1, **{"data.prior_weight": weight})
        losses[weight], *_ = train(config, *make_injected(config), dataset, prior=prior)
    plain, half, double = losses.values()
    assert plain.parts is None
    assert half.parts["velocity"] == plain.loss
    assert double.parts["prior"] == pytest.approx(4 * half.parts["prior"])
    assert half.loss == pytest.approx(plain.loss + half.parts["prior"])
    # The gradients are summed, not only the numbers.
    assert half.grad_norm != plain.grad_norm


def test_a_custom_auxiliary_loss_is_weighted_and_reported(tmp_path):
    def brightness(prediction):
        return prediction.x_0_hat.flatten(1).mean(1).square()

    config = make_config(tmp_path, steps=1, **{"objective.auxiliary": {"contrastive": 0.1}})
    report, *_ = train(
        *(config, *make_injected(config), make_dataset(tmp_path / "data")),
        auxiliary={"brightness": (brightness, 3.0)},
    )
    assert report.parts.keys() == {"velocity", "contrastive", "brightness"}
    assert report.loss == pytest.approx(sum(report.parts.values()))


def test_the_learning_rate_follows_the_schedule(tmp_path):
    changes = {"optimizer.schedule": "linear", "optimizer.warmup_steps": 2, "steps": 6}
    rates = [report.learning_rate for report in run(tmp_path, **changes)]
    assert rates == pytest.approx([0, 5e-3, 1e-2, 7.5e-3, 5e-3, 2.5e-3])


def test_the_finished_file_is_the_trained_adapter_with_alpha_and_metadata(tmp_path):
    config = make_config(
        *(tmp_path,), **{"lora.alpha": 8, "optimizer.ema_decay": 0.5, "saving.dtype": "fp32"}
    )
    model, injection = make_injected(config)
    dataset = make_dataset(tmp_path / "data")
    list(train(config, model, injection, dataset, variant="2511"))
    adapter = read_adapter(tmp_path / "run" / "tiny.safetensors")
    for path, weights in adapter.modules.items():
        layer = injection.layers[path]
        assert (weights.rank, weights.alpha) == (4, 8)
        expected = 2 * layer.lora_B @ layer.lora_A
        torch.testing.assert_close(compute_delta(weights), expected.detach())
    metadata = adapter.metadata
    assert metadata["modelspec.architecture"] == "Qwen-Image-Edit-2511/lora"
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("4", "8")
    assert (metadata["ss_steps"], metadata["ss_num_train_images"]) == ("6", "3")
    assert metadata["modelspec.resolution"] == "64x64"
    assert '"rank": 4' in metadata["qwen_edit_lora.config"]
    assert str(tmp_path) not in str(metadata)
    keys = load_file(tmp_path / "run" / "tiny.safetensors").keys()
    assert "diffusion_model.transformer_blocks.0.attn.to_q.alpha" in keys
    average = read_adapter(tmp_path / "run" / "tiny_ema.safetensors")
    assert average.metadata["modelspec.title"] == "tiny (EMA)"
    path = next(iter(average.modules))
    raw, mean = (compute_delta(a.modules[path]).norm() for a in (adapter, average))
    assert 0 < mean < raw


def test_reports_and_metrics_agree(tmp_path):
    from qwen_edit_lora.lora_core.training.run.metrics import read_metrics

    reports = run(tmp_path, **{"saving.health_every": 3})
    lines = list(read_metrics(tmp_path / "run" / "metrics.jsonl"))
    assert [line["loss"] for line in lines] == [report.loss for report in reports]
    assert ["health" in line for line in lines] == [False, False, True] * 2
    assert set(lines[-1]["health"]) == {"std", "spectral", "effective_rank"}
    assert lines[-1]["health"]["std"] > 0
    assert all(line["tokens_per_s"] > 0 and line["memory_bytes"] > 0 for line in lines)


def test_the_smoothed_loss_starts_at_the_first_and_lies_between(tmp_path):
    reports = run(tmp_path)
    losses = [report.loss for report in reports]
    assert reports[0].smoothed_loss == pytest.approx(losses[0])
    assert min(losses) < reports[-1].smoothed_loss < max(losses)


@pytest.mark.parametrize("spoilt", ["loss", "gradient"])
def test_a_non_finite_step_is_not_applied_and_names_item_and_checkpoint(tmp_path, spoilt):
    config = make_config(tmp_path)
    model, injection = make_injected(config)
    dataset = make_dataset(tmp_path / "data", {"a": make_item(0)})
    reports = train(config, model, injection, dataset)
    for _ in range(3):
        next(reports)
    before = [parameter.detach().clone() for parameter in injection.parameters()]
    layer = model.transformer.proj_out
    if spoilt == "loss":
        layer.bias.data[0] = math.nan
    else:
        injection.parameters()[0].register_hook(lambda gradient: gradient * math.inf)
    what = "the loss is nan" if spoilt == "loss" else "the gradients are (nan|inf)"
    message = rf"^{what} at step 4 \(a\); .* not applied and the last checkpoint is of step 2\. "
    with pytest.raises(NonFiniteLossError, match=message):
        next(reports)
    for parameter, tensor in zip(injection.parameters(), before, strict=True):
        assert torch.equal(parameter, tensor)
    assert CheckpointFolder(tmp_path / "run" / "checkpoints").read_latest().step == 2


def test_weights_that_a_step_makes_infinite_are_never_saved(tmp_path):
    options = {"weight_decay": 1e300}
    changes = {"optimizer.options": options, "saving.checkpoint_every": 1}
    changes["saving.adapter_every"] = 1
    message = "made NaN or Inf of finite gradients at step 1, .* there is no checkpoint; lower the"
    with pytest.raises(NonFiniteLossError, match=message):
        run(tmp_path, **changes)
    assert CheckpointFolder(tmp_path / "run" / "checkpoints").list_steps() == []
    assert list((tmp_path / "run").rglob("*.safetensors")) == []


def test_stopping_writes_a_checkpoint_of_the_last_step_and_no_finished_adapter(tmp_path):
    asked = iter([False] * 3 + [True])
    config = make_config(tmp_path)
    dataset = make_dataset(tmp_path / "data")
    reports = list(train(config, *make_injected(config), dataset, should_stop=lambda: next(asked)))
    assert len(reports) == 3
    folder = tmp_path / "run"
    assert CheckpointFolder(folder / "checkpoints").read_latest().step == 3
    assert not (folder / "tiny.safetensors").exists()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no read-only folders")
def test_a_read_only_output_folder_is_a_clear_error_before_the_first_step(
    tmp_path, read_only_folder
):
    config = make_config(tmp_path, output=str(read_only_folder / "run"))
    dataset = make_dataset(Path(tempfile.mkdtemp()) / "data")
    with pytest.raises(
        FileError, match="run cannot be used for checkpoints: the folder is read-only; "
    ):
        train(config, *make_injected(config), dataset)
    assert list(read_only_folder.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path):
    """A separate disk of 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2M", "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs the right to mount a disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_a_clear_error_and_the_last_good_checkpoint_is_kept(tmp_path, small_disk):
    config = make_config(
        *(tmp_path,),
        output=str(small_disk / "run"),
        **{"lora.rank": 8, "saving.checkpoint_every": 1},
    )
    reports = train(config, *make_injected(config), make_dataset(tmp_path / "data"))
    assert next(reports).checkpoint == "step_00000001"
    taken = sum(path.stat().st_size for path in small_disk.rglob("*") if path.is_file())
    (small_disk / "other").write_bytes(b"x" * (2**21 - taken - 2**17))
    message = (
        "the checkpoint of step 2 cannot be written: the disk is full; free some space and save "
        "again; the last good one is of step 1."
    )
    with pytest.raises(FileError, match=message):
        next(reports)
    folder = CheckpointFolder(small_disk / "run" / "checkpoints")
    assert folder.read_latest().step == 1
    assert [path.name for path in folder.folder.iterdir()] == ["step_00000001"]


def test_mixed_sizes_with_padded_text_train_in_full_batches(tmp_path):
    items = {f"s{i}": make_item(i, num_text_tokens=3 + i) for i in range(3)}
    items |= {f"w{i}": make_item(i, (4, 8), ((8, 4), (6, 6)), 2 + i) for i in range(2)}
    items["t2i"] = make_item(5, (8, 8), ())
    writer = DatasetWriter(tmp_path / "data")
    for key, item in items.items():
        writer.add(key, item)
    reports = run(tmp_path, read_dataset(writer.finish()), **{"data.batch_size": 2, "steps": 8})
    assert [report.epoch for report in reports] == [1, 1, 1, 1, 2, 2, 2, 2]
    assert all(math.isfinite(report.loss) for report in reports)
