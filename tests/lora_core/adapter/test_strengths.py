"""Which multiplier a module gets."""

from __future__ import annotations

import math

import pytest
from qwen_edit_lora.lora_core import ConfigError
from qwen_edit_lora.lora_core.adapter.strengths import Strengths

IMAGE = "transformer_blocks.3.attn.to_q"
TEXT = "transformer_blocks.3.attn.add_q_proj"
BOTH = "time_text_embed.timestep_embedder.linear_1"


@pytest.mark.parametrize(("path", "expected"), [(IMAGE, 1.0), (TEXT, -0.5), (BOTH, 0.25)])
def test_a_module_gets_the_factor_of_its_stream(path, expected):
    strengths = Strengths(0.5, image_strength=2.0, text_strength=-1.0)
    assert strengths.resolve(path) == expected


@pytest.mark.parametrize(
    ("path", "expected"), [(IMAGE, 0.5), ("transformer_blocks.4.img_mod.1", 0.0), ("img_in", 0.0)]
)
def test_only_the_chosen_blocks_are_touched(path, expected):
    assert Strengths(0.5, blocks=frozenset({3})).resolve(path) == expected


@pytest.mark.parametrize("path", [IMAGE, TEXT, BOTH, "img_in"])
def test_no_blocks_chosen_means_every_module(path):
    assert Strengths(0.5).resolve(path) == 0.5


@pytest.mark.parametrize(
    ("strengths", "is_zero"),
    [
        (Strengths(0.0), True),
        (Strengths(1.0, 0.0, 0.0), True),
        (Strengths(1.0, 0.0, 1.0), False),
        (Strengths(-1.0), False),
    ],
)
def test_strengths_without_effect_are_recognised(strengths, is_zero):
    assert strengths.is_zero is is_zero


@pytest.mark.parametrize("name", ["strength", "image_strength", "text_strength"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_strength_must_be_finite(name, value):
    with pytest.raises(ConfigError, match=f"{name} is .*; expected a finite number such as 1.0"):
        Strengths(**{name: value})


def test_equal_strengths_are_one_key():
    assert (
        len({Strengths(1, blocks=frozenset({1, 2})), Strengths(1.0, blocks=frozenset({2, 1}))}) == 1
    )


def test_the_text_names_what_differs_from_the_default():
    strengths = Strengths(0.8, 1.0, 0.5, frozenset({0, 1, 5}))
    assert str(strengths) == "strength 0.8, image 1, text 0.5, blocks 0-1, 5"
