"""One forward pass and its losses, per sample and not yet averaged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch

from ..data.batches import Batch
from . import flow
from .losses import AUXILIARY_LOSSES, AuxiliaryLoss, CleanPrediction, Decode
from .objective_config import ObjectiveConfig

#: Name of the main part among the losses; the others are auxiliary.
VELOCITY = "velocity"


class VelocityModel(Protocol):
    """What is trained; references are normalised like the target."""

    def __call__(
        self,
        latents: torch.Tensor,
        references: list[torch.Tensor],
        text: torch.Tensor,
        text_mask: torch.Tensor | None,
        sigma: torch.Tensor,
    ) -> torch.Tensor:
        """(B, 16, H, W), [(B, 16, h, w), ...], (B, T, D), (B, T) or None, (B,) -> (B, 16, H, W)."""
        ...


class Objective:
    """The weighted losses of a run.

    Args:
        auxiliary: name -> loss and weight, besides those in the configuration.
        decode: decodes latents to images, for auxiliary losses that use them.
    """

    def __init__(
        self,
        config: ObjectiveConfig,
        auxiliary: Mapping[str, tuple[AuxiliaryLoss, float]] | None = None,
        decode: Decode | None = None,
    ):
        self.config = config
        self.decode = decode
        built_in = {name: (AUXILIARY_LOSSES[name], w) for name, w in config.auxiliary.items()}
        self.auxiliary = {**built_in, **(auxiliary or {})}

    def choose_sigmas(self, batch: Batch) -> torch.Tensor:
        """float32 (B,), on the batch's device; those of the batch where it has them."""
        if batch.sigma is not None:
            return batch.sigma
        config = self.config
        sigma = flow.choose_sigmas(
            batch.u,
            config.sampling,
            mean=config.logit_mean,
            std=config.logit_std,
            shift=config.shift,
            schedule=config.schedule,
            num_tokens=batch.num_target_tokens,
            sigma_range=(config.sigma_min, config.sigma_max),
        )
        return sigma.float().to(batch.x_0.device)

    def compute_losses(
        self, model: VelocityModel, batch: Batch, with_auxiliary: bool = True
    ) -> dict[str, torch.Tensor]:
        """Part -> weighted loss of each sample, (B,); their sum is what is minimised."""
        sigma = self.choose_sigmas(batch)
        x_sigma = flow.add_noise(batch.x_0, batch.noise, sigma)
        velocity = model(x_sigma, batch.references, batch.text, batch.text_mask, sigma).float()
        loss = flow.compute_loss(velocity, batch.x_0, batch.noise, batch.mask)
        losses = {VELOCITY: flow.weigh(sigma, self.config.weighting) * loss}
        if with_auxiliary and self.auxiliary:
            prediction = CleanPrediction(
                x_0_hat=flow.predict_x_0(x_sigma, velocity, sigma),
                x_0=batch.x_0,
                sigma=sigma,
                references=batch.references,
                mask=batch.mask,
                decode=self.decode,
            )
            for name, (auxiliary, weight) in self.auxiliary.items():
                losses[name] = weight * auxiliary(prediction)
        return losses
