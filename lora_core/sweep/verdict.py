"""Judging a sweep: sentences with values and thresholds, and a range of strengths to use."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..findings import NOTE, WARNING, Finding, mark_warnings
from ..messages import join_messages, message
from ..text import format_percent, shorten_list
from .cells import Cell, build_label
from .damage import describe_damage, find_damage
from .image_metrics import STEP, VISIBLE_STEPS
from .measures import INSIDE, OUTSIDE, WHOLE, CellMeasures, SweepMeasures

NO_EFFECT, SMOOTH, UNEVEN, COLLAPSES, UNKNOWN = (
    *("no effect", "smooth", "uneven", "collapses"),
    "unknown",
)
#: Half a step of an 8-bit display: a change of this RMS mostly rounds to none.
NO_EFFECT_RMS = 0.5 * STEP
#: A change that small on average may still be a small spot: 1e-4 of a megapixel is 10 x 10 pixels.
NO_EFFECT_VISIBLE = 1e-4
#: Where a change of the whole image becomes visible when the two are shown in turn.
VISIBLE_RMS = 2 * STEP
#: Share by which a change may fall at a higher strength and still be called smooth.
DIP = 0.2
#: Departure from proportional growth that is still called linear.
LINEAR = 0.25


@dataclass(frozen=True)
class CurvePoint:
    """All seeds of one adapter at one strength; those with NaN or Inf count as damaged only."""

    strength: float
    rms: float | None
    """Mean over the seeds, of the full scale 1; None if no seed has a value."""
    rms_low: float | None
    rms_high: float | None
    ssim: float | None
    num_seeds: int
    damage: str
    """Of the first seed that has any; "" if none has."""
    num_damaged: int


@dataclass(frozen=True)
class AdapterVerdict:
    """The verdict on one adapter."""

    kind: str
    """NO_EFFECT, SMOOTH, UNEVEN, COLLAPSES or UNKNOWN."""
    sentences: tuple[str, ...]
    curve: tuple[CurvePoint, ...]
    """By strength, strength 0 included."""
    suggested: tuple[float, float] | None = None
    collapses_at: tuple[float, ...] = ()
    """The strength next to 0 that is damaged, on each side."""


@dataclass(frozen=True)
class SweepVerdict:
    """The verdict on a sweep."""

    adapters: Mapping[str, AdapterVerdict]
    damages: Mapping[Cell, str]
    """Only damaged images."""
    warnings: tuple[str, ...] = ()
    thresholds: Mapping[str, float] = field(
        default_factory=lambda: {
            "no_effect_rms": NO_EFFECT_RMS,
            "no_effect_visible": NO_EFFECT_VISIBLE,
            "visible_rms": VISIBLE_RMS,
        }
    )

    @property
    def sentences(self) -> tuple[str, ...]:
        """Of all adapters, each named where there are several."""
        named = len(self.adapters) > 1
        return tuple(
            message("{name}: {sentence}", name=name, sentence=sentence)
            if named and name
            else sentence
            for name, verdict in self.adapters.items()
            for sentence in verdict.sentences
        )

    @property
    def needs_attention(self) -> bool:
        kinds = {verdict.kind for verdict in self.adapters.values()}
        return bool(self.warnings) or not kinds <= {SMOOTH, UNEVEN}

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What was not measured, then the verdict on each adapter."""
        left_out = [Finding("not_measured", WARNING, text) for text in self.warnings]
        return (*left_out, *map(build_finding, self.adapters.values()))

    def to_text(self) -> str:
        return join_messages("\n", [*self.sentences, *mark_warnings(self.warnings)])

    def to_dict(self) -> dict[str, Any]:
        return {
            "verdict": list(self.sentences),
            "warnings": list(self.warnings),
            "findings": [asdict(finding) for finding in self.findings],
            "thresholds": dict(self.thresholds),
            "adapters": {name: asdict(verdict) for name, verdict in self.adapters.items()},
        }


def build_finding(verdict: AdapterVerdict) -> Finding:
    is_fine = verdict.kind in (SMOOTH, UNEVEN)
    kind = f"sweep_{verdict.kind.replace(' ', '_')}"
    return Finding(kind, NOTE if is_fine else WARNING, verdict.sentences[0])


def judge_sweep(sweep: SweepMeasures) -> SweepVerdict:
    damages = {}
    for cell, measures in sweep.cells.items():
        damage = find_damage(measures, find_reference(sweep, cell))
        if damage:
            damages[cell] = damage
    warnings = [*sweep.notes]
    lonely = [c for c in sweep.cells if find_reference(sweep, c) is None]
    if lonely:
        warnings.append(
            message(
                "without strength 0 of the same seed there is no change to measure: {lonely}",
                lonely=shorten_list([build_label(cell) for cell in lonely], 3),
            )
        )
    adapters = {name: judge_adapter(sweep, name, damages) for name in sweep.adapters}
    return SweepVerdict(adapters, damages, tuple(warnings))


def find_reference(sweep: SweepMeasures, cell: Cell) -> CellMeasures | None:
    return sweep.find(0.0, cell.seed, cell.adapter)


def judge_adapter(
    sweep: SweepMeasures, adapter: str, damages: Mapping[Cell, str]
) -> AdapterVerdict:
    cells = [
        m for s in sweep.strengths for seed in sweep.seeds if (m := sweep.find(s, seed, adapter))
    ]
    curve = build_curve(cells, damages)
    zero = [m for m in cells if m.cell.strength == 0]
    broken = next((m for m in zero if m.cell in damages), None)
    if broken is not None:
        text = describe_damage(damages[broken.cell], broken, None)
        sentence = message(
            "strength 0 is broken: {text}; that is the base model, not the LoRA", text=text
        )
        return AdapterVerdict(UNKNOWN, (sentence,), curve)
    others = [m for m in cells if m.cell.strength != 0]
    if not any(m.change or m.cell in damages for m in others):
        return AdapterVerdict(
            UNKNOWN, (message("nothing to judge: no image at a strength other than 0"),), curve
        )
    collapses_at = tuple(filter(None, (find_collapse(curve, side) for side in (-1, 1))))
    if collapses_at:
        suggested = suggest_range(curve)
        sentences = [
            describe_collapse(sweep, adapter, damages, curve, strength)
            for strength in reversed(collapses_at)
        ]
        kind = COLLAPSES
    elif is_without_effect(others):
        return AdapterVerdict(NO_EFFECT, (describe_no_effect(others),), curve)
    else:
        suggested = suggest_range(curve)
        kind, sentence = judge_growth(curve)
        sentences = [sentence]
    sentences.append(describe_range(curve, suggested))
    sentences += describe_regions(cells, damages)
    return AdapterVerdict(kind, tuple(sentences), curve, suggested, collapses_at)


def build_curve(
    cells: Sequence[CellMeasures], damages: Mapping[Cell, str]
) -> tuple[CurvePoint, ...]:
    points = []
    for strength in sorted({m.cell.strength for m in cells}):
        here = [m for m in cells if m.cell.strength == strength]
        changes = [m.change[WHOLE] for m in here if m.change]
        rms = [change.rms for change in changes]
        broken = [damages[m.cell] for m in here if m.cell in damages]
        points.append(
            CurvePoint(
                strength=strength,
                rms=sum(rms) / len(rms) if rms else None,
                rms_low=min(rms, default=None),
                rms_high=max(rms, default=None),
                ssim=sum(c.ssim for c in changes) / len(changes) if changes else None,
                num_seeds=len(here),
                damage=broken[0] if broken else "",
                num_damaged=len(broken),
            )
        )
    return tuple(points)


def find_side(curve: Sequence[CurvePoint], side: int) -> list[CurvePoint]:
    """The points on one side of 0, the nearest first."""
    return sorted((p for p in curve if p.strength * side > 0), key=lambda p: abs(p.strength))


def find_collapse(curve: Sequence[CurvePoint], side: int) -> float | None:
    return next((p.strength for p in find_side(curve, side) if p.damage), None)


def is_without_effect(others: Sequence[CellMeasures]) -> bool:
    changes = [m.change[WHOLE] for m in others if m.change]
    return all(c.rms < NO_EFFECT_RMS and c.visible < NO_EFFECT_VISIBLE for c in changes)


def describe_no_effect(others: Sequence[CellMeasures]) -> str:
    changes = {m.cell: m.change[WHOLE] for m in others if m.change}
    cell, worst = max(changes.items(), key=lambda item: item[1].rms)
    images = (
        message("the image")
        if len(changes) == 1
        else message("all {num_changes} images", num_changes=len(changes))
    )
    if worst.largest == 0:
        return message(
            "no effect: {images} at other strengths equal strength 0 bit for bit; the LoRA "
            "was not applied (see the report of Load or Apply for its matched keys) or is "
            "untrained (lora_B is 0; Inspect Qwen Edit LoRA shows it)",
            images=images,
        )
    return message(
        "no effect: the largest change is RMS {rms} of 255 at strength {strength:g}, under "
        "{limit}, and {pixels} changes by more than {steps} of 255: no display shows that; the "
        "LoRA is hardly trained, or reaches few modules (Inspect Qwen Edit LoRA shows it), or "
        "needs far higher strengths",
        rms=show(worst.rms),
        strength=cell.strength,
        limit=show(NO_EFFECT_RMS),
        pixels=message("no pixel") if worst.visible == 0 else message("hardly any pixel"),
        steps=VISIBLE_STEPS,
    )


def describe_collapse(
    sweep: SweepMeasures,
    adapter: str,
    damages: Mapping[Cell, str],
    curve: Sequence[CurvePoint],
    strength: float,
) -> str:
    here = [sweep.find(strength, seed, adapter) for seed in sweep.seeds]
    first = next(m for m in here if m is not None and m.cell in damages)
    text = describe_damage(damages[first.cell], first, find_reference(sweep, first.cell))
    point = next(p for p in curve if p.strength == strength)
    seeds = ""
    if point.num_seeds > 1:
        seeds = message(
            ", in {num_damaged} of {num_seeds} seeds",
            num_damaged=point.num_damaged,
            num_seeds=point.num_seeds,
        )
    return message(
        "collapses at {strength:g}: {text}{seeds}", strength=strength, text=text, seeds=seeds
    )


def judge_growth(curve: Sequence[CurvePoint]) -> tuple[str, str]:
    """Smooth or uneven, on the side with more strengths."""
    points = [p for p in find_main_side(curve) if p.rms is not None]
    last = points[-1]
    for low, high in itertools.pairwise(points):
        if (high.rms or 0) < (1 - DIP) * (low.rms or 0):
            return UNEVEN, (
                message(
                    "uneven: the change falls from RMS {rms} of 255 at strength {strength:g} to "
                    "{other_rms} at {other_strength:g} (more than {dip}); nothing collapses, but "
                    "the image turns into something else there",
                    rms=show(low.rms),
                    strength=low.strength,
                    other_rms=show(high.rms),
                    other_strength=high.strength,
                    dip=format_percent(DIP),
                )
            )
    first = points[0]
    text = message(
        "smooth: RMS {rms} of 255 at strength {strength:g}, nothing collapses",
        rms=show(last.rms),
        strength=last.strength,
    )
    if first is last or not first.rms or last.rms is None:
        return SMOOTH, text
    text = message(
        "smooth: the change grows from RMS {rms} of 255 at strength {strength:g} to {other_rms} "
        "at {other_strength:g}",
        rms=show(first.rms),
        strength=first.strength,
        other_rms=show(last.rms),
        other_strength=last.strength,
    )
    growth = (last.rms / last.strength) / (first.rms / first.strength)
    shape = (
        message("in proportion to it")
        if abs(growth - 1) <= LINEAR
        else (
            message("faster than in proportion")
            if growth > 1
            else message("slower than in proportion")
        )
    )
    return SMOOTH, message("{text}, {shape}, and nothing collapses", text=text, shape=shape)


def find_main_side(curve: Sequence[CurvePoint]) -> list[CurvePoint]:
    return find_side(curve, 1) or find_side(curve, -1)


def suggest_range(curve: Sequence[CurvePoint]) -> tuple[float, float] | None:
    """From where the change is seen to the last tested strength before a collapse."""
    points = find_main_side(curve)
    undamaged = []
    for point in points:
        if point.damage:
            break
        undamaged.append(point)
    before, low = (0.0, 0.0), None
    for point in undamaged:
        if point.rms is None:
            continue
        if point.rms >= VISIBLE_RMS:
            share = (VISIBLE_RMS - before[1]) / (point.rms - before[1])
            low = before[0] + share * (point.strength - before[0])
            break
        before = (point.strength, point.rms)
    if low is None:
        return None
    low = float(f"{low:.1g}")  # an interpolation is no more precise than that
    high = undamaged[-1].strength
    return (high, high) if abs(low) > abs(high) else (low, high)


def describe_range(curve: Sequence[CurvePoint], suggested: tuple[float, float] | None) -> str:
    points = find_main_side(curve)
    damaged = next((p for p in points if p.damage), None)
    if suggested is None:
        if damaged is points[0]:
            return message(
                "suggested range: between 0 and {strength:g}, where none was tested",
                strength=damaged.strength,
            )
        best = max(p.rms or 0 for p in points if not p.damage)
        return message(
            "suggested range: none; the strengths that do not collapse change RMS {best} of "
            "255 at most, and a change is visible from {visible_rms}",
            best=show(best),
            visible_rms=show(VISIBLE_RMS),
        )
    low, high = suggested
    end = message("the last before the collapse") if damaged else message("the highest tested")
    return message(
        "suggested range: {low:g} (RMS {visible_rms} of 255, where a change becomes "
        "visible) to {high:g} ({end})",
        low=low,
        visible_rms=show(VISIBLE_RMS),
        high=high,
        end=end,
    )


def describe_regions(cells: Sequence[CellMeasures], damages: Mapping[Cell, str]) -> list[str]:
    """What happens inside and outside the mask, and to the source, at the strength next to 1."""
    undamaged = [m for m in cells if m.cell not in damages]
    candidates = [m for m in undamaged if m.cell.strength != 0 and m.change]
    if not candidates:
        return []
    chosen = min(candidates, key=lambda m: abs(m.cell.strength - 1))
    at, found = message("at strength {strength:g}", strength=chosen.cell.strength), []
    if INSIDE in chosen.change:
        inside, outside = chosen.change[INSIDE], chosen.change[OUTSIDE]
        found.append(
            message(
                "mask: {at} RMS {rms} of 255 inside and {other_rms} outside",
                at=at,
                rms=show(inside.rms),
                other_rms=show(outside.rms),
            )
        )
    zero = next((m for m in undamaged if is_zero_of(m, chosen)), None)
    if chosen.kept is not None:
        where = message("outside the mask") if INSIDE in chosen.change else message("as a whole")
        beside = (
            message(" ({ssim:.3f} at strength 0)", ssim=zero.kept.ssim)
            if zero and zero.kept
            else ""
        )
        found.append(
            message(
                "source {where}: SSIM {ssim:.3f} {at}{beside}, RMS {rms} of 255",
                where=where,
                ssim=chosen.kept.ssim,
                at=at,
                beside=beside,
                rms=show(chosen.kept.rms),
            )
        )
    return found


def is_zero_of(measures: CellMeasures, other: CellMeasures) -> bool:
    return measures.cell.strength == 0 and measures.cell.seed == other.cell.seed


def show(value: float | None) -> str:
    """A value of the full scale, in steps of 255."""
    return "-" if value is None else f"{value / STEP:.3g}"
