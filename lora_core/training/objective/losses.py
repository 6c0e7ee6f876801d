"""Auxiliary losses on the clean image that a prediction implies.

An auxiliary loss is any callable `loss(prediction) -> (B,)`; give it to `train` with its weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch

from ...errors import ConfigError

Decode = Callable[[torch.Tensor], torch.Tensor]
"""Normalised latents (B, 16, H, W) -> images (B, 3, 8H, 8W) in [0, 1], differentiable."""


@dataclass(frozen=True, eq=False)
class CleanPrediction:
    """One micro-batch's predicted clean latents and what they are compared with.

    All latents are normalised, (B, 16, H, W); `references` hold one tensor per reference, of its
    own size.
    """

    x_0_hat: torch.Tensor
    """x_sigma - sigma * velocity; gradients flow through it."""
    x_0: torch.Tensor
    sigma: torch.Tensor
    """(B,)"""
    references: list[torch.Tensor]
    mask: torch.Tensor | None = None
    """(B, 1, H, W)"""
    decode: Decode | None = None

    @cached_property
    def image(self) -> torch.Tensor:
        """The decoded prediction, (B, 3, 8H, 8W) in [0, 1].

        Raises:
            ConfigError: the run has no VAE.
        """
        if self.decode is None:
            raise ConfigError(
                "an auxiliary loss needs the decoded image, but the run has no VAE; set model.vae "
                "to the VAE's file"
            )
        return self.decode(self.x_0_hat)


class AuxiliaryLoss(Protocol):
    def __call__(self, prediction: CleanPrediction) -> torch.Tensor:
        """One loss per sample, (B,)."""
        ...


#: Share of the edit's size by which the prediction must be nearer to the target.
CONTRASTIVE_MARGIN = 0.5
#: A target this near to its reference (mean square, latents have variance 1) is no edit.
SMALLEST_EDIT = 1e-4


def contrastive(prediction: CleanPrediction) -> torch.Tensor:
    """Nearer to the target than to the first reference, by a margin (a triplet loss).

    Penalises an adapter that returns its reference. With d the mean square distance and
    edit = d(x_0, reference):
    max(0, d(x_0_hat, x_0) - d(x_0_hat, reference) + margin * edit) / edit,
    so 0 at the target and 1 + margin at the reference. 0 where the sizes differ or nothing is
    edited.
    """
    x_0_hat, x_0 = prediction.x_0_hat.float(), prediction.x_0.float()
    if not prediction.references or prediction.references[0].shape != x_0.shape:
        return x_0_hat.flatten(1).sum(1) * 0
    reference = prediction.references[0].float()
    to_target, to_reference, edit = (
        (a - b).square().flatten(1).mean(1)
        for a, b in ((x_0_hat, x_0), (x_0_hat, reference), (x_0, reference))
    )
    loss = (to_target - to_reference + CONTRASTIVE_MARGIN * edit).clamp_min(0)
    return torch.where(edit > SMALLEST_EDIT, loss / edit.clamp_min(SMALLEST_EDIT), 0 * loss)


AUXILIARY_LOSSES: dict[str, AuxiliaryLoss] = {"contrastive": contrastive}
