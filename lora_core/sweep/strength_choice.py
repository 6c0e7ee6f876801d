"""Which strengths are worth rendering, from the size of the delta or from its measured effect.

By size, the reference is the ratio |delta| / |W| over the modules an adapter reaches. Known-good
LoRAs for Qwen-Image-Edit have deltas of std 1e-4 to 1e-3 (DESIGN.md, section 5) on weights of std
about 2e-2: ratios of 0.005 to 0.05. A sweep up to the strength at which the ratio is TOP_RATIO
therefore ends where the strongest usual LoRA is at strength 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise

TOP_RATIO = 0.05
#: The largest strength of a sweep is one of these.
TOPS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 1.5, 2, 2.5, 3, 4, 5, 6, 8)
#: For an adapter whose delta is 0, of which no strength does anything.
DEFAULT_TOP = 2
#: A change of the output at which the image is a different one: where a sweep by effect ends.
TOP_CHANGE = 0.5


def choose_top(ratio: float) -> float:
    """The largest of TOPS at which strength * ratio stays within TOP_RATIO."""
    if ratio <= 0 or not math.isfinite(ratio):
        return DEFAULT_TOP
    fitting = [top for top in TOPS if top * ratio <= TOP_RATIO * (1 + 1e-9)]
    return max(fitting, default=TOPS[0])


def choose_strengths(ratio: float, count: int) -> tuple[float, ...]:
    """`count` strengths, ascending: 0, equal steps up to the top, and always 1.

    1 takes the place of the nearest point; above a top that is below 1 it is the last one.

    Args:
        ratio: |delta|_F / |W|_F at strength 1.
        count: at least 2.
    """
    top = choose_top(ratio)
    if count == 2:
        return 0.0, 1.0
    return (
        replace_nearest_with_1(spread(top, count)) if top >= 1 else (*spread(top, count - 1), 1.0)
    )


def replace_nearest_with_1(points: tuple[float, ...]) -> tuple[float, ...]:
    """1 in the place of the nearest point but the first."""
    nearest = min(range(1, len(points)), key=lambda index: abs(points[index] - 1))
    return (*points[:nearest], 1.0, *points[nearest + 1 :])


def spread(top: float, count: int) -> tuple[float, ...]:
    """From 0 to `top` in equal steps, to three decimals."""
    return tuple(round(top * index / (count - 1), 3) for index in range(count))


def choose_by_change(curve: Sequence[tuple[float, float]], count: int) -> tuple[float, ...]:
    """Up to `count` strengths, ascending, between which the change grows in equal steps.

    From 0 to TOP_CHANGE, or to the largest change that was measured; interpolated. 1 is
    among them as in `choose_strengths`, unless the output was not finite there.

    Args:
        curve: (strength, change) as measured, strength 0 included; negative ones are not used.
        count: at least 2.
    """
    measured = sorted(point for point in curve if point[0] >= 0)
    broken = [strength for strength, change in measured if not math.isfinite(change)]
    undamaged = [point for point in measured if not broken or point[0] < broken[0]]
    # A change that falls again at a higher strength counts as the highest before it.
    highest = accumulate((change for _, change in undamaged), max)
    points = [(strength, change) for (strength, _), change in zip(undamaged, highest, strict=True)]
    top = min(TOP_CHANGE, points[-1][1]) if points else 0.0
    with_1 = not broken or broken[0] > 1
    if top == 0 or count == 2:
        return (0.0, 1.0) if with_1 else (0.0, round_to_digits(broken[0] / 2))
    end = interpolate(points, top) or points[-1][0]
    ends_below_1 = with_1 and end < 1
    steps = count - 1 - ends_below_1
    found = (interpolate(points, top * step / steps) for step in range(1, steps))
    chosen = (0.0, *filter(None, found), end)
    if ends_below_1:
        chosen = (*chosen, 1.0)
    elif with_1:
        chosen = replace_nearest_with_1(chosen)
    return tuple(sorted(set(map(round_to_digits, chosen))))


def interpolate(points: Sequence[tuple[float, float]], change: float) -> float | None:
    """The smallest strength with this change; None where it is not passed."""
    for (s0, c0), (s1, c1) in pairwise(points):
        if c0 < change <= c1:
            return s0 + (s1 - s0) * (change - c0) / (c1 - c0)
    return None


def round_to_digits(strength: float) -> float:
    """To two decimals, or two digits of a small one."""
    return round(strength, 2) if strength >= 0.1 else float(f"{strength:.2g}")
