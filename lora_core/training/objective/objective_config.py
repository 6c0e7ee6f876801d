"""Settings of the loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from ...checks import check_choice, check_number, is_number, show
from ...errors import ConfigError
from .flow import SAMPLINGS, SCHEDULES, WEIGHTINGS
from .losses import AUXILIARY_LOSSES


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    sampling: str = "shift"
    """Where noise levels are drawn from; see `flow.choose_sigmas`."""
    shift: float = 2.2
    """For "shift": about the official schedule's at 1536 x 1024."""
    logit_mean: float = 0.0
    logit_std: float = 1.0
    schedule: str = "comfyui"
    """For "inference": whose."""
    sigma_min: float = 0.0
    sigma_max: float = 1.0
    weighting: str = "none"
    auxiliary: Mapping[str, float] = field(default_factory=dict)
    """Name of an auxiliary loss -> its weight; see `lora_core.training.objective.losses`."""

    def __post_init__(self) -> None:
        check_choice(self, "sampling", SAMPLINGS)
        check_choice(self, "schedule", SCHEDULES)
        check_choice(self, "weighting", tuple(WEIGHTINGS))
        check_number(self, "shift", 0, exclusive=True)
        check_number(self, "logit_mean")
        check_number(self, "logit_std", 0, exclusive=True)
        check_number(self, "sigma_min", 0, 1)
        check_number(self, "sigma_max", 0, 1)
        if self.sigma_min >= self.sigma_max:
            raise ConfigError(
                "sigma_min is {sigma_min:g} and sigma_max {sigma_max:g}; expected the first to "
                "be smaller",
                sigma_min=self.sigma_min,
                sigma_max=self.sigma_max,
            )
        for name, weight in self.auxiliary.items():
            if name not in AUXILIARY_LOSSES:
                raise ConfigError(
                    "unknown auxiliary loss {name}; expected one of {auxiliary_losses}",
                    name=show(name),
                    auxiliary_losses=", ".join(AUXILIARY_LOSSES),
                )
            if not is_number(weight) or not 0 <= weight < math.inf:
                raise ConfigError(
                    "the weight of the auxiliary loss {name} is {weight}; expected a number "
                    "from 0, e.g. 0.1",
                    name=show(name),
                    weight=show(weight),
                )
