"""What a user may write for strengths and seeds, and the errors for anything else."""

from __future__ import annotations

import pytest
from qwen_edit_lora.lora_core import ConfigError
from qwen_edit_lora.lora_core.sweep.cells import MAX_CELLS
from qwen_edit_lora.lora_core.sweep.strength_grammar import (
    MAX_SEED,
    AutoStrengths,
    parse_seeds,
    parse_strengths,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0, 0.5, 1, 2", (0, 0.5, 1, 2)),
        ("0:2:0.5", (0, 0.5, 1, 1.5, 2)),
        ("0:1:0.4", (0, 0.4, 0.8)),
        ("2:0:-1", (0, 1, 2)),
        (" -1 , 0.25:0.75:0.25,3 ", (0, -1, 0.25, 0.5, 0.75, 3)),
        ("1", (0, 1)),
        ("0", (0,)),
        ("-0.0", (0,)),
        ("1, 1.0, 1e0, +1", (0, 1)),
        ("2, 0.5, -3", (0, -3, 0.5, 2)),
        (".5, 5e-1", (0, 0.5)),
    ],
)
def test_lists_ranges_and_mixtures_give_0_first_and_the_rest_ascending(text, expected):
    assert parse_strengths(text) == expected


def test_a_range_holds_the_decimals_a_reader_expects():
    assert parse_strengths("0:0.3:0.1") == (0.0, 0.1, 0.2, 0.3)
    assert parse_strengths("0:1:0.05")[1:] == tuple(index / 20 for index in range(1, 21))


@pytest.mark.parametrize(
    ("text", "count"), [("auto", 5), ("auto, 5 points", 5), ("AUTO 9", 9), (" auto,2 point ", 2)]
)
def test_auto_asks_for_a_number_of_points(text, count):
    assert parse_strengths(text) == AutoStrengths(count)


@pytest.mark.parametrize(
    "text",
    [
        *("0..2", "a,b", "", "   ", "1,,2", "1,", "0:1", "0:1:2:3", "1;2", "1 2", "0,5;1"),
        *("nan", "inf", "-inf", "0:inf:1", "nan:1:1", "1e999", "0:1:1e-999", "0x1", "1/2"),
        *("0:2:0", "0:2:-0.5", "2:0:0.5", "0:500:1", "0:1:1e-30", "500", "-100.5"),
        *("auto, 1", "auto, 65", "auto, x", "auto, 1, 2", "auto, " + "9" * 5000, "9" * 5000),
    ],
)
def test_invalid_strengths_are_a_one_sentence_error_with_an_example(text):
    with pytest.raises(ConfigError) as error:
        parse_strengths(text)
    message = str(error.value)
    assert message.startswith("strengths ")
    assert "such as '" in message
    assert len(message) < 300
    assert "\n" not in message


def test_an_example_in_a_message_is_valid():
    with pytest.raises(ConfigError) as error:
        parse_strengths("?")
    for example in str(error.value).split("such as ")[1].split("'")[1::2]:
        parse_strengths(example)


def test_too_many_strengths_are_counted():
    with pytest.raises(ConfigError, match=f"asks for 501 values; a sweep has at most {MAX_CELLS}"):
        parse_strengths("0:500:1")
    listed = ",".join(str(index / 10) for index in range(1, 501))
    with pytest.raises(ConfigError, match="asks for 501 values"):
        parse_strengths(listed)
    assert len(parse_strengths(",".join(map(str, range(1, MAX_CELLS))))) == MAX_CELLS


@pytest.mark.parametrize(
    ("text", "expected"),
    [("", (7,)), ("  ", (7,)), ("3, 1, 3", (3, 1)), ("1:4:1", (1, 2, 3, 4)), ("1e3", (1000,))],
)
def test_seeds_keep_their_order(text, expected):
    assert parse_seeds(text, 7) == expected


def test_the_largest_seed_is_exact():
    assert parse_seeds(f"{MAX_SEED}", 0) == (MAX_SEED,)


@pytest.mark.parametrize("text", ["1.5", "-1", "a", "1:2", f"{MAX_SEED + 1}", "0:100:1", "nan"])
def test_invalid_seeds_are_a_one_sentence_error_with_an_example(text):
    with pytest.raises(ConfigError, match=r"^seeds .* such as '1, 2, 3' or '1:4:1'$"):
        parse_seeds(text, 7)
