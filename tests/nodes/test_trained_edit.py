"""A LoRA trained here, by the engine, on 16 photographs: its effect on unseen photographs.

Everything around the training is ComfyUI's: VAE, text encoder, sampler, LoRA loader.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from demo_base import edit
from demo_base.photographs import HELD_OUT_CROPS, read_crops

from .conftest import worst

pytestmark = pytest.mark.comfy

STEPS = 150
SIDE = 256  # of the photographs to edit, twice that of those trained on
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
ROUNDING = 1e-4  # of float32 latents of standard deviation 2, after eight steps
BASE = "2509_bf16"


@pytest.fixture(scope="module")
def encoders(comfyui: SimpleNamespace, demo_models: Any) -> tuple[Any, Any]:
    """The demo base's VAE and CLIP."""
    return edit.load_encoders(demo_models.root)


@pytest.fixture
def base(comfyui: SimpleNamespace, demo_models: Any) -> Any:
    """The base as loaded here by the stock UNETLoader: without a GPU in float32.

    Where weights stay bf16, a merge rounds and the side path does not, so the two differ by that.
    """
    with torch.inference_mode():
        return comfyui.sd.load_diffusion_model(str(demo_models.dit[BASE]), {})


@pytest.fixture(scope="module")
def trained(
    encoders: tuple[Any, Any], demo_models: Any, tmp_path_factory: pytest.TempPathFactory
) -> SimpleNamespace:
    """Fields: path, losses."""
    folder = tmp_path_factory.mktemp("trained_edit")
    dataset = edit.write_dataset(folder / "dataset", *encoders)
    source, output = demo_models.dit[BASE], folder / "run"
    reports = list(edit.train_edit(source, dataset, output, steps=STEPS, name="blue_hour"))
    return SimpleNamespace(
        path=output / "blue_hour.safetensors", losses=[report.loss for report in reports]
    )


@pytest.fixture(scope="module")
def held_out(encoders: tuple[Any, Any]) -> SimpleNamespace:
    """Held-out photographs: images, wanted (their grades), wanted_latents, inputs."""
    vae, clip = encoders
    pictures = read_crops(HELD_OUT_CROPS[::2], SIDE)
    wanted = edit.grade(pictures)
    with torch.inference_mode():
        images = [edit.to_image(picture[None]) for picture in pictures]
        references = [vae.encode(image) for image in images]
        wanted_latents = [vae.encode(edit.to_image(picture[None])) for picture in wanted]
        texts = [edit.encode_text(clip, image) for image in images]
    inputs = list(zip(texts, references, strict=True))
    return SimpleNamespace(
        pictures=pictures, wanted=wanted, wanted_latents=wanted_latents, inputs=inputs
    )


@pytest.fixture(scope="module")
def edit_all(
    comfyui: SimpleNamespace, encoders: tuple[Any, Any], held_out: SimpleNamespace
) -> Callable[[Any], SimpleNamespace]:
    """Eight steps of ComfyUI's sampler: MODEL -> latents and images of every held-out one."""

    def run(model: Any) -> SimpleNamespace:
        latents = []
        with torch.inference_mode():
            for text, reference in held_out.inputs:
                conditioning = [[text[0][0], {**text[0][1], "reference_latents": [reference]}]]
                (result,) = comfyui.nodes.common_ksampler(
                    *(model, 1, 8, 1.0, "euler", "simple", conditioning, conditioning),
                    {"samples": torch.zeros_like(reference)},
                )
                latents.append(result["samples"].clone())
            images = [encoders[0].decode(one).reshape(1, SIDE, SIDE, 3) for one in latents]
        pictures = torch.cat(images).movedim(-1, 1).clone() * 2 - 1
        return SimpleNamespace(latents=latents, pictures=pictures)

    return run


def measure_error(latents: list[torch.Tensor], others: list[torch.Tensor]) -> float:
    errors = [(a - b).square().mean() for a, b in zip(latents, others, strict=True)]
    return torch.stack(errors).mean().item()


def test_the_base_reproduces_the_photograph(base, edit_all, held_out):
    pictures = edit_all(base).pictures
    assert (pictures - held_out.pictures).square().mean().item() < 4 * 10**-2.4  # 24 dB


def test_training_halves_the_error_on_unseen_photographs(
    trained, base, edit_all, held_out, apply_native
):
    before, after = edit_all(base), edit_all(apply_native(base, trained.path, 1.0))
    first, last = (sum(trained.losses[part]) / 20 for part in (slice(20), slice(-20, None)))
    assert last < 0.5 * first
    error = measure_error(before.latents, held_out.wanted_latents)
    assert measure_error(after.latents, held_out.wanted_latents) < 0.5 * error
    # also in the images, where the loss of the small VAE counts on both sides
    error = (before.pictures - held_out.wanted).square().mean()
    assert (after.pictures - held_out.wanted).square().mean() < 0.5 * error


def test_the_effect_grows_evenly_with_the_strength(trained, base, edit_all, held_out, apply_ours):
    edits = [edit_all(apply_ours(base, trained.path, strength)) for strength in STRENGTHS]
    effects = [measure_error(one.latents, edits[0].latents) ** 0.5 for one in edits]
    shares = [(b - a) / effects[-1] for a, b in pairwise(effects)]
    assert all(0.1 < share < 0.4 for share in shares), shares  # a quarter each, if even
    errors = [measure_error(one.latents, held_out.wanted_latents) for one in edits]
    assert errors == sorted(errors, reverse=True)


def test_the_stock_loader_and_our_node_give_the_same_image(
    trained, base, edit_all, apply_native, apply_ours
):
    stock = edit_all(apply_native(base, trained.path, 0.8))
    merged = edit_all(apply_ours(base, trained.path, 0.8, "merge"))
    beside = edit_all(apply_ours(base, trained.path, 0.8, "side path"))
    for one in range(len(stock.latents)):
        assert torch.equal(merged.latents[one], stock.latents[one])
        assert worst(beside.latents[one], stock.latents[one]) < ROUNDING
    assert torch.equal(merged.pictures, stock.pictures)
    # at PNG precision: no value differs by more than one step of 255
    assert worst(to_bytes(beside.pictures), to_bytes(stock.pictures)) <= 1


def to_bytes(pictures: torch.Tensor) -> torch.Tensor:
    return ((pictures + 1) * 127.5).clamp(0, 255).floor()
