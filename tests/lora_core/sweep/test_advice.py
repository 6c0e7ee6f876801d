"""The first sentence of a sweep's report: which strength to use, or what to test instead."""

from __future__ import annotations

import math

import pytest
from qwen_edit_lora.lora_core.sweep.advice import advise_effect, advise_sweep
from qwen_edit_lora.lora_core.sweep.effect import Effect, StrengthEffect
from qwen_edit_lora.lora_core.sweep.image_metrics import STEP
from qwen_edit_lora.lora_core.sweep.verdict import (
    COLLAPSES,
    NO_EFFECT,
    SMOOTH,
    UNEVEN,
    UNKNOWN,
    AdapterVerdict,
    CurvePoint,
    SweepVerdict,
    suggest_range,
)


def build_curve(changes: dict[float, float | str]) -> tuple[CurvePoint, ...]:
    """From strength -> RMS in steps of 255, or the damage."""
    points = []
    for strength, value in {0.0: 0.0, **changes}.items():
        damage = value if isinstance(value, str) else ""
        rms = None if isinstance(value, str) else value * STEP
        points.append(CurvePoint(strength, rms, rms, rms, None, 1, damage, bool(damage)))
    return tuple(sorted(points, key=lambda point: point.strength))


def judge(kind: str, changes: dict[float, float | str]) -> AdapterVerdict:
    curve = build_curve(changes)
    return AdapterVerdict(kind, (kind,), curve, suggest_range(curve))


def advise(kind: str, changes: dict[float, float | str]) -> str:
    return advise_sweep(SweepVerdict({"": judge(kind, changes)}, {}))


@pytest.mark.parametrize(
    ("kind", "changes", "expected"),
    [
        (
            SMOOTH,
            {0.5: 10, 1.0: 20, 2.0: 40},
            "Use strength 1: the change is visible (RMS 20 of 255), and nothing collapses up to 2, "
            "the highest tested.",
        ),
        (
            COLLAPSES,
            {0.4: 10, 0.8: 20, 1.3: "noise"},
            "Use strength 0.8: the change is visible (RMS 20 of 255), and at 1.3 it collapses "
            "(noise).",
        ),
        (
            UNEVEN,
            {0.5: 10, 0.9: 30, 1.0: 12, 1.5: 13},
            "Use strength 0.9: the change is visible (RMS 30 of 255), and above 0.9 the image "
            "turns into something else.",
        ),
        (SMOOTH, {-1.0: 5, -0.5: 3}, "Use strength -1: "),
        (SMOOTH, {1.0: 0.5, 4.0: 5, 8.0: 9}, "Use strength 4: "),
        (NO_EFFECT, {1.0: 0}, "Check the LoRA first: no tested strength changes the image."),
        (UNKNOWN, {}, "Sweep more strengths, 0 and others, such as '0, 0.5, 1'."),
        (
            COLLAPSES,
            {0.5: "black"},
            "Test strengths nearer to 0 than 0.5: there it collapses.",
        ),
        (
            COLLAPSES,
            {0.5: 1, 1.0: "black"},
            "Test strengths between 0.5 and 1: below, no change is visible; above, it collapses.",
        ),
        (SMOOTH, {1.0: 1}, "Test strengths beyond 1: up to there no change is visible."),
    ],
)
def test_the_advice_names_the_usable_strength_nearest_to_1_or_what_to_test(kind, changes, expected):
    assert advise(kind, changes).startswith(expected)


def test_a_base_that_is_broken_is_to_be_checked_before_the_lora():
    verdict = AdapterVerdict(UNKNOWN, (UNKNOWN,), build_curve({0.0: "black", 1.0: 3}))
    advice = advise_sweep(SweepVerdict({"": verdict}, {}))
    assert advice == "Check the model first: its image is broken even without the LoRA."


RUN = {
    "run-100": judge(SMOOTH, {0.5: 3, 1.0: 6, 1.5: 9}),
    "run-200": judge(SMOOTH, {0.5: 9, 1.0: 18, 1.5: 27}),
    "run-300": judge(COLLAPSES, {0.5: 15, 1.0: 30, 1.5: "burnt colours"}),
    "run-400": judge(COLLAPSES, {0.5: 25, 1.0: "noise", 1.5: "noise"}),
}


def test_of_several_checkpoints_one_is_named_by_change_without_damage():
    assert advise_sweep(SweepVerdict(RUN, {})) == (
        "Use run-200 at strength 1: of those usable there that do not collapse, it changes the "
        "image most (RMS 18 of 255), and nothing collapses up to 1.5, the highest tested."
    )
    without_400 = {name: RUN[name] for name in ("run-100", "run-200", "run-300")}
    assert "of those that do not collapse, it" in advise_sweep(SweepVerdict(without_400, {}))
    smooth = {name: RUN[name] for name in ("run-100", "run-200")}
    assert advise_sweep(SweepVerdict(smooth, {})).startswith(
        "Use run-200 at strength 1: it changes the image most (RMS 18 of 255)"
    )
    burnt = {name: RUN[name] for name in ("run-300", "run-400")}
    assert advise_sweep(SweepVerdict(burnt, {})).startswith("Use run-300 at strength 1: it changes")


def test_of_several_without_a_usable_strength_none_is_named():
    broken = {name: judge(COLLAPSES, {1.0: "noise"}) for name in "ab"}
    assert advise_sweep(SweepVerdict(broken, {})) == (
        "Check the LoRAs first: none of the 2 changes the image without damage."
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({0.5: 0.05, 2.0: 0.2}, "Use a strength from 0.5 up: a change of 5 % is seen; at 2, the"),
        ({1.0: 0.1, 2.0: 0.9}, "Use a strength from 0.5 to 1.5: a change of 5 % is seen, one of"),
        ({2.0: 0.01}, "Measure higher strengths: even at 2 the output changes by 1 % only."),
        ({-1.0: 0.3}, "Use strength -1: the output changes by 30 % there."),
        ({1.0: 0.0}, "Check the LoRA first: it changes the output at no strength."),
        ({}, "Measure a strength other than 0, such as '0, 0.5, 1'."),
        (
            {1.0: 0.1, 2.0: math.nan},
            "Use a strength nearer to 0 than 2: there the output is NaN or Inf.",
        ),
    ],
)
def test_the_advice_of_an_effect_names_a_range_of_strengths(changes, expected):
    measured = [StrengthEffect(s, (change,), ()) for s, change in {0.0: 0.0, **changes}.items()]
    assert advise_effect(Effect("a", (0.5,), tuple(measured))).startswith(expected)
