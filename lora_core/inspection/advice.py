"""What to do with an adapter after an inspection or a comparison: the reports' first sentence."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..text import format_number, format_percent
from .verdict import GOOD_STD

if TYPE_CHECKING:
    from .compare import Comparison
    from .inspection import Inspection

#: Cosine from which two deltas count as the same edit, and below which they have nothing in common.
SAME, INDEPENDENT = 0.95, 0.2
#: Departure of the norms' ratio from 1 up to which two deltas count as equally strong.
SAME_SIZE = 0.15
#: Share of the weaker delta's energy whose loss can be seen.
CONFLICT = 0.1


def advise_inspection(inspection: Inspection) -> str:
    """The strength to start with; or why not to use the adapter at all."""
    kinds = {finding.kind for finding in inspection.findings}
    if "untrained" in kinds:
        return "Do not use this file: it changes nothing at any strength."
    if "non_finite" in kinds:
        return "Do not use this file: it holds NaN or Inf."
    if not inspection.modules:
        return "Choose another file or base: there is nothing here to judge."
    size = (inspection.std**2 + inspection.mean**2) ** 0.5
    low, high = GOOD_STD
    strength = 1.0
    if size > high:
        strength = float(f"{high / size:.1g}")
    elif 0 < size < low:
        strength = float(f"{low / size:.1g}")
    known_good = f"known-good LoRAs (std {low:g} to {high:g})"
    if strength == 1:
        advice = f"Use strength 1: the delta is as large as that of {known_good}"
    else:
        than = "larger" if size > high else "smaller"
        advice = (
            f"Start with strength {format_number(strength)}: the delta is {than} than that of "
            f"{known_good}"
        )
    if "merge_noise" in kinds:
        advice += "; apply it as a side path, since a merge would drown it in rounding"
    if kinds & {"partly_trained", "dead_modules"}:
        advice += "; check the training, parts of it never learned"
    return f"{advice}."


def advise_comparison(comparison: Comparison) -> str:
    """Whether to stack the two, to use either, or which part of them is lost."""
    cosine, ratio, conflict = comparison.cosine, comparison.norm_ratio, comparison.conflict
    if cosine is None or ratio is None:
        empty = [n for n, norm in (("a", comparison.norm_a), ("b", comparison.norm_b)) if not norm]
        return f"Leave {' and '.join(empty)} out: its delta is zero, it changes nothing."
    if cosine >= SAME:
        if abs(ratio - 1) <= SAME_SIZE:
            return f"Use either: both make the same edit (cosine {cosine:.3f}), equally strong."
        weaker = "a" if ratio > 1 else "b"
        factor = format_number(max(ratio, 1 / ratio))
        return (
            f"Use either: both make the same edit (cosine {cosine:.3f}); {weaker} needs "
            f"{factor} times the strength."
        )
    if conflict is not None and conflict >= CONFLICT:
        return (
            f"Do not stack them at full strength: {format_percent(conflict)} of the weaker one is "
            "cancelled."
        )
    if abs(cosine) < INDEPENDENT:
        return f"Stack them if you like: they change different things (cosine {cosine:.2g})."
    if cosine < 0:
        return f"Stack them with care: they pull apart (cosine {cosine:.2g})."
    return (
        f"Use one of them, or stack both at lower strengths: they share part of their direction "
        f"(cosine {cosine:.2g}), which adds up."
    )
