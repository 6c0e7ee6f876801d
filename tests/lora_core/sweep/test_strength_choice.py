"""Strengths for a sweep from a measured effect."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from qwen_edit_lora.lora_core.sweep.effect import Effect, StrengthEffect
from qwen_edit_lora.lora_core.sweep.strength_choice import TOP_CHANGE, choose_by_change


def measure(change, top=2.0, num_points=9):
    """A curve as an Effect measures it."""
    strengths = [top * index / (num_points - 1) for index in range(num_points)]
    return [(strength, change(strength)) for strength in strengths]


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("scale", [0.02, 0.2, 0.7])
@pytest.mark.parametrize("count", [3, 5, 9])
def test_the_change_grows_in_equal_steps_and_1_is_among_them(power, scale, count):
    def change(strength):
        return scale * strength**power

    strengths = choose_by_change(measure(change, num_points=401), count)
    assert len(strengths) <= count
    assert strengths[0] == 0
    assert 1 in strengths
    top = min(TOP_CHANGE, change(2.0))
    # All but 1 lie on the steps, to the digits that are kept.
    ends_below_1 = change(1.0) > top
    step = top / (count - 1 - ends_below_1)
    for strength in set(strengths) - {0, 1}:
        places = change(strength) / step
        assert places == pytest.approx(round(places), abs=0.15)


def test_a_strong_lora_ends_where_the_output_is_another_one():
    strengths = choose_by_change([(0, 0), (0.5, 1.0), (1, 2.0), (2, 4.0)], 5)
    assert strengths == (0.0, 0.083, 0.17, 0.25, 1.0)


def test_a_weak_lora_ends_where_the_measurement_did():
    assert choose_by_change([(0, 0), (1, 0.001), (2, 0.002)], 5) == (0, 0.5, 1, 1.5, 2)


def test_a_late_effect_gets_its_points_where_it_happens():
    strengths = choose_by_change([(0, 0), (1, 0.0), (1.5, 0.02), (2, 0.4)], 5)
    assert strengths[:2] == (0, 1)
    assert all(1.5 < strength <= 2 for strength in strengths[2:])


@pytest.mark.parametrize("worst", [math.nan, math.inf])
def test_nothing_beyond_a_collapse_is_chosen(worst):
    strengths = choose_by_change([(0, 0), (0.5, 0.3), (1, worst), (2, 0.4)], 5)
    assert strengths[-1] == 0.5
    assert 1 not in strengths
    assert choose_by_change([(0, 0), (1, worst)], 5) == (0, 0.5)
    assert choose_by_change([(0, 0), (1, 0.2), (2, worst)], 3) == (0, 0.5, 1)


def test_a_change_that_falls_again_counts_once():
    strengths = choose_by_change([(0, 0), (0.5, 0.3), (1, 0.1), (2, 0.4)], 5)
    assert all(a < b for a, b in pairwise(strengths))
    assert strengths == (0, 0.17, 0.33, 1, 2)


def test_no_effect_needs_two_images_at_most():
    assert choose_by_change([(0, 0), (1, 0), (2, 0)], 5) == (0, 1)
    assert choose_by_change([(0, 0), (1, 0.1), (2, 0.2)], 2) == (0, 1)


def build_effect(changes):
    return Effect("a", (0.5,), tuple(StrengthEffect(s, (c,), ()) for s, c in changes.items()))


def test_an_effect_chooses_by_its_own_curve_and_repeats_what_has_none():
    effect = build_effect({0: 0, -1: 9.0, 1: 0.1, 2: 0.2})
    assert effect.choose_strengths(5) == (0, 0.5, 1, 1.5, 2)
    assert build_effect({0: 0, -1: 0.3}).choose_strengths(5) == (0, -1)
