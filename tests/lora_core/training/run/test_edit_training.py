"""Training the real `EditTransformer` on a tiny file: gradients, batches, the base, a fit."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from demo_base import dit
from qwen_edit_lora.lora_core import FileError
from qwen_edit_lora.lora_core.injection.inject import inject
from qwen_edit_lora.lora_core.training.data.batches import DataOrder, Slot, load_batch
from qwen_edit_lora.lora_core.training.model.architecture import choose_axes
from qwen_edit_lora.lora_core.training.model.loading import load_transformer
from qwen_edit_lora.lora_core.training.model.quantization import STORAGES
from qwen_edit_lora.lora_core.training.objective.objective import Objective
from qwen_edit_lora.lora_core.training.run.checkpoint import CheckpointFolder
from qwen_edit_lora.lora_core.training.run.trainer import train
from tiny import make_config, make_dataset, make_item, pack

VARIANTS = ("2509", "2511")
#: With these the base's fixed ends are trained too; random inner blocks cannot fit an image.
WIDE_TARGETS = ["full + modulation", "img_in", "proj_out", "norm_out.linear"]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("dit")
    return {
        variant: dit.write_dit(folder / f"{variant}.safetensors", variant, "fp32")
        for variant in VARIANTS
    }


def load(path: Path, config, storage: str = "fp32", dtype: torch.dtype = torch.float32):
    model = load_transformer(path, storage, compute_dtype=torch.float32)
    if dtype == torch.float64:
        model.double().compute_dtype = dtype
    return model, inject(model.transformer, config.lora, dtype=dtype, seed=config.seed)


def set_lora_B(injection) -> None:
    """Sets it away from 0, so that lora_A has gradients too."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in injection.named_parameters():
        if name.endswith("lora_B"):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = (noise / 10).to(parameter.dtype)


def widen(batch, dtype: torch.dtype = torch.float64):
    for name in ("x_0", "noise", "text"):
        object.__setattr__(batch, name, getattr(batch, name).to(dtype))
    batch.references[:] = [reference.to(dtype) for reference in batch.references]
    return batch


class Dense(torch.nn.Module):
    """diffusers' own model in float64, called with the tokens of a batch of `tiny` items."""

    def __init__(self, state_dict, zero_cond_t: bool):
        from diffusers import QwenImageTransformer2DModel

        super().__init__()
        self.transformer = QwenImageTransformer2DModel(
            num_layers=dit.NUM_BLOCKS,
            attention_head_dim=dit.HEAD_WIDTH,
            num_attention_heads=dit.NUM_HEADS,
            joint_attention_dim=dit.TEXT_WIDTH,
            axes_dims_rope=choose_axes(dit.HEAD_WIDTH),
            zero_cond_t=zero_cond_t,
        )
        weights = {key: tensor for key, tensor in state_dict.items() if tensor.numel()}
        self.transformer.load_state_dict(weights)
        self.double().requires_grad_(False)

    def forward(self, latents, references, text, text_mask, sigma):
        images = (latents, *references)
        shapes = [(1, image.shape[-2] // 2, image.shape[-1] // 2) for image in images]
        out = self.transformer(
            hidden_states=torch.cat([pack(image) for image in images], dim=1),
            encoder_hidden_states=text,
            encoder_hidden_states_mask=text_mask,
            timestep=sigma,
            img_shapes=[shapes] * len(latents),
            return_dict=False,
        )[0]
        return out[:, : math.prod(shapes[0])]


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_those_of_a_dense_float64_reference(variant, files, tmp_path):
    """diffusers with W + scale * B @ A written out, where its conventions and ComfyUI's agree."""
    config = make_config(tmp_path, **{"lora.alpha": 6, "objective.weighting": "cosmap"})
    items = {
        key: make_item(i, (8, 12), ((8, 12), (4, 8)), 3 + 4 * i, mask=torch.rand(8, 12))
        for i, key in enumerate("ab")
    }
    dataset = make_dataset(tmp_path / "data", items)
    model, injection = load(files[variant], config)
    set_lora_B(injection)
    batch = load_batch(dataset, (Slot(0, 0, 0), Slot(1, 0, 1)), 0)
    objective = Objective(config.objective)
    sigma = objective.choose_sigmas(batch).double()
    loss = objective.compute_losses(model, batch)["velocity"].mean()
    loss.backward()

    dense = Dense(dit.make_dit(variant), zero_cond_t=variant == "2511")
    factors = {
        name: p.detach().double().requires_grad_() for name, p in injection.named_parameters()
    }
    weights = {
        f"transformer.{path}.weight": dense.transformer.get_submodule(path).weight
        + 6 / 4 * factors[f"{path}.lora_B"] @ factors[f"{path}.lora_A"]
        for path in injection.layers
    }
    widen(batch)
    level = sigma.view(-1, 1, 1, 1)
    x_sigma = batch.x_0 + level * (batch.noise - batch.x_0)
    inputs = (x_sigma, batch.references, batch.text, batch.text_mask, sigma)
    velocity = torch.func.functional_call(dense, weights, inputs)
    mask = pack(batch.mask.double().expand_as(batch.x_0))
    error = (velocity - pack(batch.noise - batch.x_0)).square() * mask
    weight = 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))
    expected = (weight * error.sum((1, 2)) / mask.sum((1, 2))).mean()
    expected.backward()

    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in injection.named_parameters():
        gradient = factors[name].grad
        assert gradient.norm() > 1e-6, name  # so that something is compared
        assert (parameter.grad - gradient).norm() < 1e-4 * gradient.norm(), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_batch_with_padded_text_is_the_mean_of_its_samples_alone(variant, files, tmp_path):
    config = make_config(tmp_path)
    sizes = ((6, 10), ((8, 4), (14, 6)))
    items = {k: make_item(i, *sizes, num_text_tokens=2 + 5 * i) for i, k in enumerate("ab")}
    dataset = make_dataset(tmp_path / "data", items)
    model, injection = load(files[variant], config, dtype=torch.float64)
    set_lora_B(injection)
    objective = Objective(config.objective)
    slots = (Slot(0, 0, 0), Slot(1, 0, 1))

    def compute(*slots: Slot) -> tuple[float, list[torch.Tensor]]:
        injection.model.zero_grad()
        loss = objective.compute_losses(model, widen(load_batch(dataset, slots, 0)))["velocity"]
        loss.mean().backward()
        return loss.mean().item(), [p.grad.clone() for p in injection.parameters()]

    together, gradients = compute(*slots)
    alone = [compute(slot) for slot in slots]
    assert alone[0][0] != pytest.approx(alone[1][0], rel=1e-2)
    assert together == pytest.approx(sum(loss for loss, _ in alone) / 2, rel=1e-6)
    for gradient, one, other in zip(gradients, *(parts for _, parts in alone), strict=True):
        mean = (one + other) / 2
        assert (gradient - mean).norm() < 1e-5 * mean.norm()


def test_a_step_over_different_sizes_is_the_mean_of_its_samples_alone(files, tmp_path):
    """Another aspect, other references, another text: two buckets, so two micro-batches."""
    items = {
        "wide": make_item(0, (6, 10), ((6, 10),), 4),
        "tall": make_item(1, (12, 4), ((8, 8), (4, 6)), 9),
    }
    dataset = make_dataset(tmp_path / "data", items)
    changes = {"steps": 1, "optimizer.accumulation": 2, "optimizer.max_grad_norm": 0}
    config = make_config(tmp_path, **changes)
    model, injection = load(files["2511"], config)
    set_lora_B(injection)
    (report,) = train(config, model, injection, dataset)
    gradients = [p.grad.clone() for p in injection.parameters()]

    model, injection = load(files["2511"], config)
    set_lora_B(injection)
    order, objective = DataOrder(dataset.items, 1, config.seed), Objective(config.objective)
    losses, sums = [], [torch.zeros_like(p) for p in injection.parameters()]
    for number in range(2):
        injection.model.zero_grad()
        batch = load_batch(dataset, order.get_slots(number), config.seed)
        loss = objective.compute_losses(model, batch)["velocity"].mean()
        loss.backward()
        losses.append(loss.item())
        for total, parameter in zip(sums, injection.parameters(), strict=True):
            total += parameter.grad / 2
    assert losses[0] != pytest.approx(losses[1], rel=1e-4)
    assert report.loss == pytest.approx(sum(losses) / 2, rel=1e-6)
    for gradient, mean in zip(gradients, sums, strict=True):
        assert (gradient - mean).norm() < 1e-5 * mean.norm()


@pytest.mark.parametrize("storage", STORAGES)
def test_the_base_is_bit_identical_after_training_in_every_storage(storage, files, tmp_path):
    if storage == "nf4":
        pytest.importorskip("bitsandbytes")
    config = make_config(tmp_path, **{"data.batch_size": 2, "lora.dropout": 0.1})
    untouched = load_transformer(files["2511"], storage, compute_dtype=torch.float32)
    model, injection = load(files["2511"], config, storage)
    reports = list(train(config, model, injection, make_dataset(tmp_path / "data")))
    assert reports[-1].grad_norm > 0
    injection.eject()
    before, after = untouched.state_dict(), model.state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(get_bytes(tensor), get_bytes(after[name])), name


def get_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Raw bytes: NaN would be unequal to itself, and fp8 cannot be compared everywhere."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def test_one_pair_overfits_to_less_than_a_tenth_of_its_first_loss(files, tmp_path):
    changes = {
        "steps": 400,
        "data.batch_size": 4,
        "lora.rank": 32,
        "lora.targets": WIDE_TARGETS,
        "optimizer.learning_rate": 5e-3,
        "optimizer.schedule": "cosine",
        "saving.checkpoint_every": 1000,
    }
    config = make_config(tmp_path, **changes)
    dataset = make_dataset(tmp_path / "data", {"a": make_item(0, (4, 4), ((4, 4),), 3)})
    reports = list(train(config, *load(files["2511"], config), dataset))
    last = sum(report.loss for report in reports[-40:]) / 40
    assert last < 0.1 * reports[0].loss


def test_gradient_checkpointing_changes_no_bit_of_a_run(files, tmp_path):
    losses = {}
    for enabled in (False, True):
        config = make_config(tmp_path / str(enabled), **{"lora.dropout": 0.2})
        model, injection = load(files["2511"], config)
        model.enable_gradient_checkpointing(enabled)
        reports = train(config, model, injection, make_dataset(tmp_path / "data"))
        losses[enabled] = [(report.loss, report.grad_norm) for report in reports]
    assert losses[True] == losses[False]


def test_an_item_damaged_during_the_run_is_a_clear_error_and_repaired_the_run_continues(
    files, tmp_path
):
    config = make_config(tmp_path)
    dataset = make_dataset(tmp_path / "data", {"a": make_item(0), "b": make_item(1)})
    whole = make_config(tmp_path / "whole")
    expected = [report.loss for report in train(whole, *load(files["2511"], whole), dataset)]

    model, injection = load(files["2511"], config)
    reports = train(config, model, injection, dataset)
    losses = [next(reports).loss for _ in range(3)]
    # The next step's item is read by now; this one is read again after that.
    order = DataOrder(dataset.items, 1, config.seed)
    shown = [order.get_slots(number)[0].item for number in range(6)]
    last_good = shown.index(shown[2], 4)
    path = tmp_path / "data" / "items" / f"{dataset.items[shown[2]].key}.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    losses += [next(reports).loss for _ in range(3, last_good)]
    before = [parameter.detach().clone() for parameter in injection.parameters()]
    with pytest.raises(FileError, match=r"[ab]\.safetensors ") as caught:
        next(reports)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(p, t) for p, t in zip(injection.parameters(), before, strict=True))
    assert CheckpointFolder(tmp_path / "run" / "checkpoints").read_latest().step == 4

    path.write_bytes(content)
    rest = list(train(config, *load(files["2511"], config), dataset, resume=True))
    assert losses[:4] + [report.loss for report in rest] == expected
