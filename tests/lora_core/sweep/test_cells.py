"""The images of a sweep, their labels, and their files and strengths."""

from __future__ import annotations

import math

import pytest
from qwen_edit_lora.lora_core import ConfigError, FileError
from qwen_edit_lora.lora_core.sweep.cells import (
    Cell,
    build_cells,
    build_label,
    name_adapters,
    parse_label,
)
from qwen_edit_lora.lora_core.sweep.lora_patterns import find_loras
from qwen_edit_lora.lora_core.sweep.strength_choice import TOP_RATIO, choose_strengths, choose_top

LABELS = {
    Cell(0.5): "strength=0.5",
    Cell(0.0, 7): "strength=0 seed=7",
    Cell(-1.25, 7, "my lora v2"): "strength=-1.25 seed=7 lora=my lora v2",
    Cell(1.0, None, "画像 seed=3"): "strength=1 lora=画像 seed=3",
    Cell(1e-05, 2**64 - 1): "strength=1e-05 seed=18446744073709551615",
    Cell(2, 1, "lora=x strength=9"): "strength=2 seed=1 lora=lora=x strength=9",
}


@pytest.mark.parametrize("cell", LABELS)
def test_a_label_says_what_the_cell_is_and_reads_back(cell):
    assert build_label(cell) == LABELS[cell]
    assert parse_label(LABELS[cell]) == cell


@pytest.mark.parametrize(("text", "strength"), [("0.5", 0.5), (" -1 ", -1.0), ("0", 0.0)])
def test_a_bare_number_is_a_strength(text, strength):
    assert parse_label(text) == Cell(strength)


@pytest.mark.parametrize(
    "text", ["", "strong", "strength=", "strength=x", "strength=nan", "inf", "seed=1", "1 2"]
)
def test_other_texts_are_not_labels(text):
    with pytest.raises(ConfigError, match="is not a sweep label; expected one such as 'strength"):
        parse_label(text)


def test_minus_zero_is_zero():
    assert build_label(Cell(-0.0)) == "strength=0"


def test_strength_0_occurs_once_per_seed_for_all_adapters():
    cells = build_cells((0.0, 0.5, 1.0), (7, 8), ["a", "b"])
    assert cells[:5] == [
        Cell(0.0, 7),
        Cell(0.5, 7, "a"),
        Cell(1.0, 7, "a"),
        Cell(0.5, 7, "b"),
        Cell(1.0, 7, "b"),
    ]
    assert [cell.seed for cell in cells] == [7] * 5 + [8] * 5
    assert len(set(cells)) == 10


def test_a_single_adapter_is_not_named():
    assert build_cells((0.0, 1.0), (7,), ["a"]) == [Cell(0.0, 7), Cell(1.0, 7)]


def test_64_images_are_the_limit_and_the_excess_is_counted():
    assert len(build_cells((0.0, 1.0, 2.0, 3.0), range(16), ["a"])) == 64
    with pytest.raises(ConfigError, match=r"has 68 images \(3 strengths and 0, 17 seeds, 1 adap"):
        build_cells((0.0, 1.0, 2.0, 3.0), range(17), ["a"])


def test_adapters_go_by_their_file_names_and_twins_get_numbers():
    names = ["run/a.safetensors", "other\\a.safetensors", "b  c.safetensors", "plain", ""]
    assert name_adapters(names) == ["a", "a (2)", "b c", "plain", "adapter"]


FILES = [
    "my_run/step-10.safetensors",
    "my_run/step-9.safetensors",
    "my_run/final.safetensors",
    "Other\\Step-1.safetensors",
    "x[1].safetensors",
]


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ("my_run/*", [FILES[2], FILES[1], FILES[0]]),
        ("my_run/step-*.safetensors", [FILES[1], FILES[0]]),
        ("MY_RUN/FINAL", [FILES[2]]),
        ("other/*", [FILES[3]]),
        ("x[1]", [FILES[4]]),
        ("my_run/step-10\n\n my_run/* ", [FILES[0], FILES[2], FILES[1]]),
        ("", []),
    ],
)
def test_patterns_find_files_with_numbers_in_their_order(patterns, expected):
    assert find_loras(patterns, FILES) == expected


def test_a_pattern_that_finds_nothing_is_named():
    with pytest.raises(FileError, match="'gone/\\*' matches none of the 5 files"):
        find_loras("my_run/*\ngone/*", FILES)
    with pytest.raises(FileError, match="matches none"):
        find_loras("../*", FILES)


@pytest.mark.parametrize("ratio", [0.0, 1e-4, 0.004, 0.015, 0.05, 0.08, 0.6, 20.0])
@pytest.mark.parametrize("count", [2, 3, 5, 12])
def test_auto_gives_as_many_points_as_asked_with_0_and_1_among_them(ratio, count):
    strengths = choose_strengths(ratio, count)
    assert len(set(strengths)) == count
    assert strengths[0] == 0
    assert 1 in strengths
    assert list(strengths) == sorted(strengths)


def test_auto_ends_where_the_delta_is_as_large_as_usual_ones_get():
    for ratio in (0.007, 0.015, 0.03, 0.2):
        assert 0.6 * TOP_RATIO < choose_top(ratio) * ratio <= TOP_RATIO
    assert choose_strengths(0.015, 5) == (0.0, 1.0, 1.5, 2.25, 3.0)
    assert choose_strengths(0.1, 5) == (0.0, 0.167, 0.333, 0.5, 1.0)


def test_auto_of_a_delta_of_zero_is_the_usual_range():
    assert choose_strengths(0.0, 5) == (0.0, 0.5, 1.0, 1.5, 2.0)
    assert choose_strengths(math.nan, 5) == (0.0, 0.5, 1.0, 1.5, 2.0)
