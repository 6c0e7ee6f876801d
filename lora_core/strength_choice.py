"""Which strengths are worth rendering, from the size of the delta beside the weights.

The reference is the ratio |delta| / |W| over the modules an adapter reaches. Known-good LoRAs for
Qwen-Image-Edit have deltas of std 1e-4 to 1e-3 (DESIGN.md, section 5) on weights of std about
2e-2: ratios of 0.005 to 0.05. A sweep up to the strength at which the ratio is TOP_RATIO therefore
ends where the strongest usual LoRA is at strength 1.
"""

from __future__ import annotations

import math

TOP_RATIO = 0.05
#: The largest strength of a sweep is one of these.
TOPS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 1.5, 2, 2.5, 3, 4, 5, 6, 8)
#: For an adapter whose delta is 0, of which no strength does anything.
DEFAULT_TOP = 2


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
    if top < 1:
        return (*spread(top, count - 1), 1.0)
    points = spread(top, count)
    nearest = min(range(1, count), key=lambda index: abs(points[index] - 1))
    return (*points[:nearest], 1.0, *points[nearest + 1 :])


def spread(top: float, count: int) -> tuple[float, ...]:
    """From 0 to `top` in equal steps, to three decimals."""
    return tuple(round(top * index / (count - 1), 3) for index in range(count))
