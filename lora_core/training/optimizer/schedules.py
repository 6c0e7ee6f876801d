"""Learning rate schedules as pure functions: step -> factor on the base rate.

A step is an optimizer update, counted from 0. They are stateless, so a resumed run cannot get
out of step. Values are those of transformers' `get_scheduler`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from ...errors import ConfigError

Schedule = Callable[[int], float]

#: Progress after the warm-up, from 0 to 1, and the power -> remaining share of the decay.
SHAPES: dict[str, Callable[[float, float], float]] = {
    "constant": lambda progress, power: 1.0,
    "linear": lambda progress, power: 1.0 - progress,
    "cosine": lambda progress, power: 0.5 * (1.0 + math.cos(math.pi * progress)),
    "polynomial": lambda progress, power: (1.0 - progress) ** power,
}


def build_schedule(
    name: str, warmup: int, total: int, *, final_factor: float = 0.0, power: float = 2.0
) -> Schedule:
    """The factor rises linearly from 0 over `warmup` steps, then follows the shape to the end.

    Args:
        name: one of SHAPES.
        warmup: steps; step 0 has factor 0 unless it is 0.
        total: steps of the whole run; afterwards the factor stays at the last value.
        final_factor: where linear, cosine and polynomial end.
        power: of "polynomial".

    Raises:
        ConfigError: unknown name, or a value outside its range.
    """
    if name not in SHAPES:
        raise ConfigError(
            "unknown schedule {name!r}; expected one of {shapes}",
            name=name,
            shapes=", ".join(SHAPES),
        )
    if not 0 <= warmup <= total or total < 1:
        raise ConfigError(
            "the warm-up is {warmup} of {total} steps; expected 0 up to the number of steps",
            warmup=warmup,
            total=total,
        )
    if not 0 <= final_factor <= 1:
        raise ConfigError(
            "final_factor is {final_factor!r}; expected 0 to 1", final_factor=final_factor
        )
    if not power > 0:
        raise ConfigError("power is {power!r}; expected a number above 0", power=power)
    shape = SHAPES[name]

    def compute_factor(step: int) -> float:
        if step < warmup:
            return step / warmup
        progress = min((step - warmup) / max(1, total - warmup), 1.0)
        return final_factor + (1.0 - final_factor) * shape(progress, power)

    return compute_factor
