"""What to do with an adapter after an inspection or a comparison: the reports' first sentence."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..base_model.family import Family
from ..base_model.qwen_image import QWEN_IMAGE
from ..messages import join_messages, message
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
        return message("Do not use this file: it changes nothing at any strength.")
    if "non_finite" in kinds:
        return message("Do not use this file: it holds NaN or Inf.")
    if not inspection.modules:
        return message("Choose another file or base: there is nothing here to judge.")
    size = (inspection.std**2 + inspection.mean**2) ** 0.5
    parts = [advise_strength(size, inspection.base_family)]
    if "merge_noise" in kinds:
        parts.append(message("Do not merge it: rounding would drown it; use the side path."))
    if kinds & {"partly_trained", "dead_modules"}:
        parts.append(message("Check the training: parts of it never learned."))
    return join_messages(" ", parts)


def advise_strength(size: float, family: Family | None = None) -> str:
    """The strength at which a delta of this size is as large as that of known-good LoRAs.

    Args:
        family: that of the adapter. Only LoRAs of Qwen-Image-Edit were measured.
    """
    low, high = GOOD_STD
    known = message("known-good LoRAs")
    if family not in (None, QWEN_IMAGE):
        known = message("known-good LoRAs of {family}-Edit", family=QWEN_IMAGE.title)
    strength = 1.0
    if size > high:
        strength = float(f"{high / size:.1g}")
    elif 0 < size < low:
        strength = float(f"{low / size:.1g}")
    if strength == 1:
        return message(
            "Use strength 1: the delta is as large as that of {known} (std {low:g} to {high:g}).",
            known=known,
            low=low,
            high=high,
        )
    return message(
        "Start with strength {strength}: the delta is {than} than that of {known} (std {low:g} to "
        "{high:g}).",
        known=known,
        strength=format_number(strength),
        than=message("larger") if size > high else message("smaller"),
        low=low,
        high=high,
    )


def advise_comparison(comparison: Comparison) -> str:
    """Whether to stack the two, to use either, or which part of them is lost."""
    cosine, ratio, conflict = comparison.cosine, comparison.norm_ratio, comparison.conflict
    if cosine is None or ratio is None:
        empty = [n for n, norm in (("a", comparison.norm_a), ("b", comparison.norm_b)) if not norm]
        return message(
            "Leave {names} out: its delta is zero, it changes nothing.", names=", ".join(empty)
        )
    if cosine >= SAME:
        return advise_equals(cosine, ratio)
    if conflict is not None and conflict >= CONFLICT:
        return message(
            "Do not stack them at full strength: {share} of the weaker one is cancelled.",
            share=format_percent(conflict),
        )
    if abs(cosine) < INDEPENDENT:
        return message(
            "Stack them if you like: they change different things (cosine {cosine:.2g}).",
            cosine=cosine,
        )
    if cosine < 0:
        return message(
            "Stack them with care: they pull apart (cosine {cosine:.2g}).", cosine=cosine
        )
    return message(
        "Use one of them, or stack both at lower strengths: they share part of their direction "
        "(cosine {cosine:.2g}), which adds up.",
        cosine=cosine,
    )


def advise_equals(cosine: float, ratio: float) -> str:
    if abs(ratio - 1) <= SAME_SIZE:
        return message(
            "Use either: both make the same edit (cosine {cosine:.3f}), equally strong.",
            cosine=cosine,
        )
    return message(
        "Use either: both make the same edit (cosine {cosine:.3f}); {weaker} needs {factor} times "
        "the strength.",
        cosine=cosine,
        weaker="a" if ratio > 1 else "b",
        factor=format_number(max(ratio, 1 / ratio)),
    )
