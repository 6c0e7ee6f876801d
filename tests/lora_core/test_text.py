"""Numbers, sizes and times in texts: three significant digits, a unit, and no "1 modules"."""

from __future__ import annotations

import pytest
from qwen_edit_lora.lora_core.text import (
    format_bytes,
    format_count,
    format_duration,
    format_number,
    format_percent,
)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.000012345, "1.23e-05"),
        (0.00012345, "0.000123"),
        (0.98765, "0.988"),
        (4.5678, "4.57"),
        (45.678, "45.7"),
        (999.6, "1,000"),
        (-12345.0, "-12,300"),
        (12345678.0, "1.23e+07"),
        (float("nan"), "nan"),
    ],
)
def test_a_number_has_three_significant_digits(value, text):
    assert format_number(value) == text


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0.0, "0 %"),
        (0.00012345, "0.0123 %"),
        (0.988396, "98.8 %"),
        (0.9992, "99.92 %"),
        (0.99997, "100 %"),
        (1.0, "100 %"),
        (2.17625, "218 %"),
    ],
)
def test_a_share_is_shown_in_percent_and_less_than_all_is_not_100(share, text):
    assert format_percent(share) == text


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (12345, "12.3 kB"),
        (999_999, "1 MB"),
        (212_345_678, "212 MB"),
        (1_180_000_000, "1.18 GB"),
        (40_900_000_000_000, "40.9 TB"),
    ],
)
def test_a_size_has_the_unit_that_fits(size, text):
    assert format_bytes(size) == text


def test_memory_is_counted_in_powers_of_1024():
    assert format_bytes(13 * 2**30, 1024) == "13 GiB"
    assert format_bytes(20.5 * 2**20, 1024) == "20.5 MiB"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2512, "0.251 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min"),
        (720, "12 min"),
        (3599, "1 h"),
        (12_000, "3 h 20 min"),
    ],
)
def test_a_duration_is_shown_in_seconds_minutes_or_hours(seconds, text):
    assert format_duration(seconds) == text


def test_one_of_a_kind_has_no_plural():
    assert [format_count(n, "module") for n in (0, 1, 2, 1200)] == [
        "0 modules",
        "1 module",
        "2 modules",
        "1,200 modules",
    ]
    assert format_count(2, "entry", "entries") == "2 entries"
