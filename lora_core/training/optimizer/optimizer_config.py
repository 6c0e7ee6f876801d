"""Settings of the update."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...checks import check_choice, check_number
from ...errors import ConfigError
from .optimization import OPTIMIZERS
from .schedules import SHAPES


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    name: str = "adamw"
    learning_rate: float = 1e-4
    """For "prodigy" a factor on the rate it finds, usually 1."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further options of the optimizer, such as weight_decay; see `optimization.OPTIMIZERS`."""
    schedule: str = "constant"
    warmup_steps: int = 0
    final_factor: float = 0.0
    """Share of the learning rate at which linear, cosine and polynomial schedules end."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 leaves them alone."""
    accumulation: int = 1
    """Micro-batches whose gradients are averaged into one step."""
    ema_decay: float = 0.0
    """Also keep an exponential moving average of the LoRA, e.g. 0.999; 0 keeps none."""

    def __post_init__(self) -> None:
        check_choice(self, "name", tuple(OPTIMIZERS))
        check_choice(self, "schedule", tuple(SHAPES))
        check_number(self, "learning_rate", 0, exclusive=True)
        check_number(self, "warmup_steps", 0)
        check_number(self, "final_factor", 0, 1)
        check_number(self, "max_grad_norm", 0)
        check_number(self, "accumulation", 1)
        check_number(self, "ema_decay", 0, 1)
        if self.ema_decay == 1:
            raise ConfigError(
                "ema_decay is 1, which would never change the average; expected e.g. 0.999"
            )
