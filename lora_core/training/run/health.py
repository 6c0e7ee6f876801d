"""Whether an adapter grows as it should, from a few of its modules at a time.

The thresholds for finished adapters are in `lora_core.inspection.verdict`; the statistics here are
cheap enough to take during training.
"""

from __future__ import annotations

import math

from ...algebra.factors import Factors, compute_effective_rank, compute_singular_values
from ...injection.inject import Injection

#: Modules measured each time, in rotation.
MODULES_PER_CHECK = 8


def measure_health(injection: Injection, turn: int) -> dict[str, float]:
    """Statistics of the deltas of some modules; a DoRA's magnitudes are not included.

    Args:
        turn: how often this was called before; chooses the modules.

    Returns:
        `std`, the median over the modules of the delta's root mean square; `spectral`, the largest
        singular value found; `effective_rank`, the median of the entropy rank
        exp(H(sigma / sum(sigma))) (Roy and Vetterli 2007), 0 while the deltas are.
    """
    paths = list(injection.layers)
    count = min(MODULES_PER_CHECK, len(paths))
    stds, spectrals, ranks = [], [], []
    for i in range(count):
        # Evenly over the model, one further each turn.
        layer = injection.layers[paths[(i * len(paths) // count + turn) % len(paths)]]
        down, up = (tensor.detach().cpu().double() for tensor in (layer.down, layer.up))
        factors = Factors(down, up * layer.scale)
        values = compute_singular_values(factors)
        stds.append(values.norm().item() / math.sqrt(math.prod(factors.shape)))
        spectrals.append(values.max().item())
        ranks.append(compute_effective_rank(values))
    return {
        "std": sorted(stds)[count // 2],
        "spectral": max(spectrals),
        "effective_rank": sorted(ranks)[count // 2],
    }
