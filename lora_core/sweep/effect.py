"""How far an adapter moves the model's output, per strength, noise level and block."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import ConfigError
from ..messages import join_messages, message
from ..text import format_percent
from .strength_choice import TOP_CHANGE, choose_by_change, interpolate
from .strength_grammar import parse_numbers

SIGMAS_EXAMPLE = "'0.8, 0.4' or '0.2:1:0.2'"
MAX_SIGMAS = 16
#: Changes whose strength the report names: clearly visible, and a different image.
VISIBLE, LARGE = 0.05, TOP_CHANGE
DEFAULT_POINTS = 5


def parse_sigmas(text: str) -> tuple[float, ...]:
    """Noise levels of a flow model, descending.

    Raises:
        ConfigError: no list of numbers above 0 and up to 1, or more than MAX_SIGMAS.
    """
    sigmas = sorted(
        {float(number) for number in parse_numbers(text, name="sigmas", example=SIGMAS_EXAMPLE)},
        reverse=True,
    )
    wrong = [sigma for sigma in sigmas if not 0 < sigma <= 1]
    if wrong or len(sigmas) > MAX_SIGMAS:
        found = (
            message("holds {wrong:g}", wrong=wrong[0])
            if wrong
            else message("asks for {num_sigmas} noise levels", num_sigmas=len(sigmas))
        )
        raise ConfigError(
            "sigmas {found}; expected up to {max_sigmas} numbers above 0 and up to 1, such as "
            "{sigmas_example}",
            found=found,
            max_sigmas=MAX_SIGMAS,
            sigmas_example=SIGMAS_EXAMPLE,
        )
    return tuple(sigmas)


@dataclass(frozen=True)
class StrengthEffect:
    """Relative changes at one strength; NaN where the model's output was not finite."""

    strength: float
    outputs: tuple[float, ...]
    """|output - output at 0| / |output at 0|, one per sigma; the output is the velocity."""
    blocks: tuple[float, ...]
    """The same of the image tokens after each block, root mean square over the sigmas."""

    @property
    def change(self) -> float:
        """Root mean square of `outputs`."""
        return compute_rms(self.outputs)


@dataclass(frozen=True)
class Effect:
    name: str
    sigmas: tuple[float, ...]
    strengths: tuple[StrengthEffect, ...] = field(repr=False)
    """As measured, strength 0 included."""

    def find_strength(self, change: float) -> float | None:
        """The smallest positive strength at which the output changes by this much.

        Interpolated between measured strengths; None where it is not reached.
        """
        points = sorted((e.strength, e.change) for e in self.strengths if e.strength >= 0)
        return interpolate(points, change)

    def choose_strengths(self, count: int = DEFAULT_POINTS) -> tuple[float, ...]:
        """Strengths for a sweep, by equal steps of change; those measured where none is above 0."""
        if all(effect.strength <= 0 for effect in self.strengths):
            return tuple(effect.strength for effect in self.strengths)
        return choose_by_change([(e.strength, e.change) for e in self.strengths], count)

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has no NaN: None replaces it."""
        return {
            "name": self.name,
            "sigmas": list(self.sigmas),
            "strengths": [
                {
                    "strength": effect.strength,
                    "change": drop_nan(effect.change),
                    "outputs": [drop_nan(value) for value in effect.outputs],
                    "blocks": [drop_nan(value) for value in effect.blocks],
                }
                for effect in self.strengths
            ],
            "verdict": self.judge(),
        }

    def to_text(self) -> str:
        head = ["strength", "change", *(f"sigma {sigma:g}" for sigma in self.sigmas), "largest at"]
        rows = [head]
        for effect in self.strengths:
            values = [effect.change, *effect.outputs]
            rows.append([f"{effect.strength:g}", *map(format_change, values), name_largest(effect)])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
            for row in rows
        ]
        return join_messages("\n", [self.judge(), "", *lines])

    def judge(self) -> str:
        active = [effect for effect in self.strengths if effect.strength != 0]
        broken = [effect.strength for effect in active if not math.isfinite(effect.change)]
        if broken:
            nearest = min(broken, key=abs)
            return message(
                "collapses at strength {nearest:g}: the model's output holds NaN or Inf "
                "there; use a strength nearer to 0",
                nearest=nearest,
            )
        if not active:
            return message("nothing to judge: no strength but 0 was measured")
        if all(effect.change == 0 for effect in active):
            return message(
                "no effect: with {name} the output is exactly the same at every strength; "
                "it is untrained, or nothing of it was applied",
                name=self.name,
            )
        largest = max(active, key=lambda effect: effect.change)
        parts = [
            message(
                "changes the output by {change} at strength {strength:g}",
                change=format_percent(largest.change),
                strength=largest.strength,
            )
        ]
        for level in (VISIBLE, LARGE):
            strength = self.find_strength(level)
            if strength is not None:
                parts.append(
                    message(
                        "{level} at about {strength:.2g}",
                        level=format_percent(level),
                        strength=strength,
                    )
                )
        return join_messages("; ", parts)


class ChangeMeter:
    """Sums up |b - a|^2 and |a|^2 over pairs of tensors."""

    def __init__(self) -> None:
        self.difference = self.reference = 0.0

    def add(self, reference: torch.Tensor, other: torch.Tensor) -> None:
        a, b = reference.float(), other.float()
        self.difference += (b - a).norm(dtype=torch.float64).item() ** 2
        self.reference += a.norm(dtype=torch.float64).item() ** 2

    def get_ratio(self) -> float:
        if not math.isfinite(self.difference) or not math.isfinite(self.reference):
            return math.nan
        if self.reference == 0:
            return 0.0 if self.difference == 0 else math.nan
        return (self.difference / self.reference) ** 0.5


def compute_rms(values: Sequence[float]) -> float:
    return (sum(value**2 for value in values) / len(values)) ** 0.5 if values else 0.0


def name_largest(effect: StrengthEffect) -> str:
    """The block with the largest step of change over the one before it."""
    if not effect.blocks or not any(effect.blocks) or not math.isfinite(sum(effect.blocks)):
        return "-"
    before = (0.0, *effect.blocks)
    steps = [after - earlier for earlier, after in zip(before, effect.blocks, strict=False)]
    return f"block {steps.index(max(steps))}"


def drop_nan(value: float) -> float | None:
    return value if math.isfinite(value) else None


def format_change(value: float) -> str:
    return format_percent(value) if math.isfinite(value) else "NaN"
