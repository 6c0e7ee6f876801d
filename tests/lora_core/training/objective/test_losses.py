from __future__ import annotations

import pytest
import torch
from qwen_edit_lora.lora_core import ConfigError
from qwen_edit_lora.lora_core.training.objective.losses import (
    CONTRASTIVE_MARGIN,
    CleanPrediction,
    contrastive,
)


def predict(x_0_hat, x_0, reference=None, **others):
    references = [] if reference is None else [reference]
    return CleanPrediction(x_0_hat, x_0, torch.full((len(x_0),), 0.5), references, **others)


@pytest.fixture
def pictures():
    torch.manual_seed(0)
    return torch.randn(2, 2, 16, 4, 4).unbind()


def test_contrastive_is_0_at_the_target_and_1_and_the_margin_at_the_reference(pictures):
    target, reference = pictures
    assert contrastive(predict(target, target, reference)).tolist() == [0, 0]
    at_reference = contrastive(predict(reference, target, reference))
    assert at_reference.tolist() == pytest.approx([1 + CONTRASTIVE_MARGIN] * 2)


def test_contrastive_pulls_from_the_reference_to_the_target(pictures):
    target, reference = pictures
    x_0_hat = reference.clone().requires_grad_()
    contrastive(predict(x_0_hat, target, reference)).sum().backward()
    assert ((target - reference) * -x_0_hat.grad).sum() > 0


@pytest.mark.parametrize("size", [None, (4, 6)], ids=["no reference", "another size"])
def test_contrastive_without_a_comparable_reference_is_0_but_keeps_the_graph(pictures, size):
    target, _ = pictures
    reference = None if size is None else torch.randn(2, 16, *size)
    x_0_hat = torch.randn_like(target).requires_grad_()
    loss = contrastive(predict(x_0_hat, target, reference))
    assert loss.tolist() == [0, 0]
    loss.sum().backward()
    assert not x_0_hat.grad.any()


def test_contrastive_of_a_pair_that_edits_nothing_is_0_and_finite(pictures):
    target, other = pictures
    x_0_hat = other.clone().requires_grad_()
    loss = contrastive(predict(x_0_hat, target, target))
    loss.sum().backward()
    assert loss.tolist() == [0, 0]
    assert not x_0_hat.grad.any()


def test_an_image_without_a_vae_is_a_clear_error_and_with_one_is_decoded_once(pictures):
    target, reference = pictures
    with pytest.raises(ConfigError, match=r"no VAE; set model\.vae"):
        _ = predict(target, target, reference).image
    calls = []

    def decode(latents):
        calls.append(latents)
        return latents[:, :3]

    prediction = predict(target, target, reference, decode=decode)
    assert prediction.image is prediction.image
    assert len(calls) == 1
