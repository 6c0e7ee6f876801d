"""What to do after a sweep or a measured effect: the first sentence of their reports."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from ..messages import message
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
    if not choices and count == 1:
        return advise_test(next(iter(verdict.adapters.values())))
    if not choices:
        return message(
            "Check the LoRAs first: none of the {count} changes the image without damage.",
            count=count,
        )
    best = min(choices, key=lambda choice: (choice.distance, choice.collapses, -choice.rms))
    limit = describe_limit(best.verdict)
    if count == 1:
        return message(
            "Use strength {strength:g}: the change is visible (RMS {rms} of 255), and {limit}.",
            strength=best.point.strength,
            rms=show(best.rms),
            limit=limit,
        )
    return message(
        "Use {name} at strength {strength:g}: {reason} (RMS {rms} of 255), and {limit}.",
        name=best.name,
        strength=best.point.strength,
        reason=describe_reason(best, choices),
        rms=show(best.rms),
        limit=limit,
    )


def describe_reason(best: Choice, choices: Sequence[Choice]) -> str:
    """Of whom `best` changes the image most; the others are farther from 1, or collapse."""
    rivals = [choice for choice in choices if choice.rms > best.rms]
    farther = any(choice.distance > best.distance for choice in rivals)
    near = any(choice.distance == best.distance for choice in rivals)
    if farther and near:
        return message("of those usable there that do not collapse, it changes the image most")
    if farther:
        return message("of those usable there, it changes the image most")
    if near:
        return message("of those that do not collapse, it changes the image most")
    return message("it changes the image most")


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
        return message(
            "nothing collapses up to {strength:g}, the highest tested", strength=even[-1].strength
        )
    limit = points[len(even)]
    if limit.damage:
        return message(
            "at {strength:g} it collapses ({damage})",
            strength=limit.strength,
            damage=limit.damage,
        )
    return message(
        "above {strength:g} the image turns into something else", strength=even[-1].strength
    )


def advise_test(verdict: AdapterVerdict) -> str:
    """For an adapter of which no tested strength can be used."""
    if verdict.kind == NO_EFFECT:
        return message("Check the LoRA first: no tested strength changes the image.")
    points = find_main_side(verdict.curve)
    if not points or not any(p.rms is not None or p.damage for p in points):
        return message("Sweep more strengths, 0 and others, such as '0, 0.5, 1'.")
    if any(p.strength == 0 and p.damage for p in verdict.curve):
        return message("Check the model first: its image is broken even without the LoRA.")
    even = list_even(verdict)
    if not even:
        return message(
            "Test strengths nearer to 0 than {strength:g}: there it collapses.",
            strength=points[0].strength,
        )
    if len(even) < len(points):
        return message(
            "Test strengths between {low:g} and {high:g}: below, no change is visible; above, it "
            "collapses.",
            low=even[-1].strength,
            high=points[len(even)].strength,
        )
    return message(
        "Test strengths beyond {strength:g}: up to there no change is visible.",
        strength=even[-1].strength,
    )


def advise_effect(effect: Effect) -> str:
    """Which strengths to render, from how far each moves the model's output."""
    active = [one for one in effect.strengths if one.strength != 0]
    if not active:
        return message("Measure a strength other than 0, such as '0, 0.5, 1'.")
    broken = [one.strength for one in active if not math.isfinite(one.change)]
    if broken:
        return message(
            "Use a strength nearer to 0 than {strength:g}: there the output is NaN or Inf.",
            strength=min(broken, key=abs),
        )
    largest = max(active, key=lambda one: one.change)
    if largest.change == 0:
        return message("Check the LoRA first: it changes the output at no strength.")
    strength, change = largest.strength, format_percent(largest.change)
    low, high = effect.find_strength(VISIBLE), effect.find_strength(LARGE)
    if largest.change < VISIBLE:
        return message(
            "Measure higher strengths: even at {strength:g} the output changes by {change} only.",
            strength=strength,
            change=change,
        )
    if low is None:  # only negative strengths were measured
        return message(
            "Use strength {strength:g}: the output changes by {change} there.",
            strength=strength,
            change=change,
        )
    if high is None:
        return message(
            "Use a strength from {low:.2g} up: a change of {visible} is seen; at {strength:g}, the "
            "highest measured, the output changes by {change}.",
            low=low,
            visible=format_percent(VISIBLE),
            strength=strength,
            change=change,
        )
    return message(
        "Use a strength from {low:.2g} to {high:.2g}: a change of {visible} is seen, one of "
        "{large} is another image.",
        low=low,
        high=high,
        visible=format_percent(VISIBLE),
        large=format_percent(LARGE),
    )
