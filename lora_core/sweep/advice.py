"""What to do after a sweep or a measured effect: the first sentence of their reports."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from ..text import format_percent
from .effect import LARGE, VISIBLE
from .verdict import (
    COLLAPSES,
    DIP,
    NO_EFFECT,
    VISIBLE_RMS,
    AdapterVerdict,
    CurvePoint,
    find_main_side,
    show,
)

if TYPE_CHECKING:
    from .effect import Effect
    from .verdict import SweepVerdict

#: The strength that adapters are trained for: the tested one nearest to it is recommended.
USUAL_STRENGTH = 1.0


class Choice(NamedTuple):
    """The tested strength to use of one adapter."""

    name: str
    verdict: AdapterVerdict
    point: CurvePoint

    @property
    def distance(self) -> float:
        return abs(abs(self.point.strength) - USUAL_STRENGTH)

    @property
    def collapses(self) -> bool:
        return self.verdict.kind == COLLAPSES

    @property
    def rms(self) -> float:
        return self.point.rms or 0.0


def advise_sweep(verdict: SweepVerdict) -> str:
    """Which strength to use, and of several adapters which one; or what to test instead.

    Of several: those usable nearest to strength 1, then those that collapse nowhere, then the one
    that changes the image most.
    """
    choices = [
        Choice(name, one, point)
        for name, one in verdict.adapters.items()
        if (point := choose_point(one)) is not None
    ]
    count = len(verdict.adapters)
    if not choices:
        if count > 1:
            return f"Check the LoRAs first: none of the {count} changes the image without damage."
        return advise_test(next(iter(verdict.adapters.values())))
    best = min(choices, key=lambda choice: (choice.distance, choice.collapses, -choice.rms))
    use = f"Use strength {best.point.strength:g}"
    reason = f"the change is visible (RMS {show(best.rms)} of 255)"
    if count > 1:
        use = f"Use {best.name} at strength {best.point.strength:g}"
        reason = f"it changes the image most (RMS {show(best.rms)} of 255)"
        rivals = [choice for choice in choices if choice.rms > best.rms]
        if rivals:
            # As in the order above: a rival is farther from strength 1, or collapses somewhere.
            farther = any(choice.distance > best.distance for choice in rivals)
            near = any(choice.distance == best.distance for choice in rivals)
            others = ["usable there"] * farther + ["that do not collapse"] * near
            reason = f"of those {' '.join(others)}, {reason}"
    return f"{use}: {reason}, and {describe_limit(best.verdict)}."


def choose_point(verdict: AdapterVerdict) -> CurvePoint | None:
    """The undamaged, visibly changed point nearest to strength 1; None if there is none."""
    if verdict.suggested is None:
        return None
    usable = [p for p in list_even(verdict) if p.rms is not None and p.rms >= VISIBLE_RMS]
    return min(usable, key=lambda p: abs(abs(p.strength) - USUAL_STRENGTH), default=None)


def list_even(verdict: AdapterVerdict) -> list[CurvePoint]:
    """Points on the main side, the nearest to 0 first, up to any damage or fall of the change."""
    points: list[CurvePoint] = []
    for point in find_main_side(verdict.curve):
        falls = points and (point.rms or 0.0) < (1 - DIP) * (points[-1].rms or 0.0)
        if point.damage or falls:
            break
        points.append(point)
    return points


def describe_limit(verdict: AdapterVerdict) -> str:
    even, points = list_even(verdict), find_main_side(verdict.curve)
    if len(even) == len(points):
        return f"nothing collapses up to {even[-1].strength:g}, the highest tested"
    limit = points[len(even)]
    if limit.damage:
        return f"at {limit.strength:g} it collapses ({limit.damage})"
    return f"above {even[-1].strength:g} the image turns into something else"


def advise_test(verdict: AdapterVerdict) -> str:
    """For an adapter of which no tested strength can be used."""
    if verdict.kind == NO_EFFECT:
        return "Check the LoRA first: no tested strength changes the image."
    points = find_main_side(verdict.curve)
    if not points or not any(p.rms is not None or p.damage for p in points):
        return "Sweep more strengths, 0 and others, such as '0, 0.5, 1'."
    if any(p.strength == 0 and p.damage for p in verdict.curve):
        return "Check the model first: its image is broken even without the LoRA."
    even = list_even(verdict)
    if not even:
        return f"Test strengths nearer to 0 than {points[0].strength:g}: there it collapses."
    if len(even) < len(points):
        return (
            f"Test strengths between {even[-1].strength:g} and {points[len(even)].strength:g}: "
            "below, no change is visible; above, it collapses."
        )
    return f"Test strengths beyond {even[-1].strength:g}: up to there no change is visible."


def advise_effect(effect: Effect) -> str:
    """Which strengths to render, from how far each moves the model's output."""
    active = [one for one in effect.strengths if one.strength != 0]
    if not active:
        return "Measure a strength other than 0, such as '0, 0.5, 1'."
    broken = [one.strength for one in active if not math.isfinite(one.change)]
    if broken:
        nearest = min(broken, key=abs)
        return f"Use a strength nearer to 0 than {nearest:g}: there the output is NaN or Inf."
    largest = max(active, key=lambda one: one.change)
    if largest.change == 0:
        return "Check the LoRA first: it changes the output at no strength."
    low, high = effect.find_strength(VISIBLE), effect.find_strength(LARGE)
    changes = f"the output changes by {format_percent(largest.change)}"
    if largest.change < VISIBLE:
        return f"Measure higher strengths: even at {largest.strength:g} {changes} only."
    if low is None:  # only negative strengths were measured
        return f"Use strength {largest.strength:g}: {changes} there."
    if high is None:
        return (
            f"Use a strength from {low:.2g} up: a change of {format_percent(VISIBLE)} is seen; at "
            f"{largest.strength:g}, the highest measured, {changes}."
        )
    return (
        f"Use a strength from {low:.2g} to {high:.2g}: a change of {format_percent(VISIBLE)} is "
        f"seen, one of {format_percent(LARGE)} is another image."
    )
