"""Effect: its metrics, verdict, text and plot."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from qwen_edit_lora.lora_core import ConfigError
from qwen_edit_lora.lora_core.sweep.effect import ChangeMeter, Effect, StrengthEffect, parse_sigmas
from qwen_edit_lora.lora_core.sweep.effect_plot import draw_effect


def build(changes: dict[float, float], name: str = "a.safetensors") -> Effect:
    found = [
        StrengthEffect(strength, (change, change), (change / 3, change))
        for strength, change in changes.items()
    ]
    return Effect(name, (0.8, 0.4), tuple(found))


def test_the_meter_measures_in_float64_over_all_pairs():
    generator = torch.Generator().manual_seed(0)
    pairs = [torch.randn(2, 3, 5, generator=generator) for _ in range(4)]
    meter = ChangeMeter()
    difference = reference = 0.0
    for a, b in zip(pairs[::2], pairs[1::2], strict=True):
        meter.add(a, b)
        difference += np.square(b.double() - a.double()).sum()
        reference += np.square(a.double()).sum()
    assert meter.get_ratio() == pytest.approx(float(np.sqrt(difference / reference)), rel=1e-6)


def test_equal_tensors_have_no_change_and_nan_has_an_unknown_one():
    meter = ChangeMeter()
    meter.add(torch.zeros(3), torch.zeros(3))
    assert meter.get_ratio() == 0.0
    meter.add(torch.ones(3), torch.tensor([1.0, math.nan, 1.0]))
    assert math.isnan(meter.get_ratio())


def test_the_change_is_the_root_mean_square_over_the_sigmas():
    assert StrengthEffect(1.0, (0.3, 0.4), ()).change == pytest.approx((0.25 / 2) ** 0.5)


def test_the_strength_of_a_change_lies_between_the_measured_ones():
    effect = build({0: 0, -1: 9.0, 1: 0.1, 2: 0.5})
    assert effect.find_strength(0.05) == pytest.approx(0.5)
    assert effect.find_strength(0.3) == pytest.approx(1.5)
    assert effect.find_strength(0.6) is None
    assert "5 % at about 0.5" in build({0: 0, 1: 0.1, 2: 0.5}).judge()


def test_the_verdict_names_no_effect_and_collapse():
    assert build({0: 0, 1: 0, 2: 0}).judge().startswith("no effect: with a.safetensors the output")
    collapsing = build({0: 0, 1: 0.2, 2: math.nan, 3: math.nan})
    assert collapsing.judge().startswith("collapses at strength 2:")
    assert build({0: 0}).judge().startswith("nothing to judge")


def test_json_has_no_nan_and_every_metric():
    effect = build({0: 0, 1: math.nan})
    found = json.loads(json.dumps(effect.to_dict(), allow_nan=False))
    assert found["strengths"][0] == {
        "strength": 0,
        "change": 0.0,
        "outputs": [0.0, 0.0],
        "blocks": [0.0, 0.0],
    }
    assert found["strengths"][1]["change"] is None


def test_the_text_is_a_table_with_the_block_of_the_largest_step():
    lines = build({0: 0, 1: 0.25}).to_text().splitlines()
    assert lines[2].split() == "strength change sigma 0.8 sigma 0.4 largest at".split()
    assert lines[4].split() == ["1", *("25", "%") * 3, "block", "1"]


@pytest.mark.parametrize(
    ("text", "expected"), [("0.8, 0.4", (0.8, 0.4)), ("0.4,1,0.4", (1.0, 0.4)), ("1", (1.0,))]
)
def test_sigmas_descend(text, expected):
    assert parse_sigmas(text) == expected


@pytest.mark.parametrize("text", ["0", "1.1", "-0.5", "a", "", "nan", "0.02:1:0.02"])
def test_invalid_sigmas_are_a_one_sentence_error(text):
    with pytest.raises(ConfigError, match=r"^sigmas .* such as '0.8, 0.4' or '0.2:1:0.2'$"):
        parse_sigmas(text)


@pytest.mark.parametrize(
    "changes",
    [{0: 0, 1: 0.1, 2: 0.4, -1: 0.1}, {0: 0, 1: 0}, {0: 0}, {0: 0, 1: math.nan}],
    ids=str,
)
def test_the_plot_is_an_image_for_any_result(changes):
    picture = draw_effect(build(changes))
    assert picture.shape == (1024, 1024, 3)
    assert picture.dtype == np.uint8
    assert picture.std() > 5


def test_a_stronger_effect_is_another_image():
    assert not np.array_equal(draw_effect(build({0: 0, 1: 0.1})), draw_effect(build({0: 0, 1: 1})))
