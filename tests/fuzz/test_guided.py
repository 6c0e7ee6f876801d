"""The surfaces of guided.py, which atheris drives by hand: each accepts any bytes."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

spec = importlib.util.spec_from_file_location("guided", Path(__file__).with_name("guided.py"))
guided = importlib.util.module_from_spec(spec)
spec.loader.exec_module(guided)

SURFACES = guided.build_surfaces()


@settings(max_examples=settings.default.max_examples // 2)
@given(st.sampled_from(sorted(SURFACES)), st.binary(max_size=200))
def test_a_surface_takes_any_bytes(name, data):
    guided.check(SURFACES[name], data)


def test_an_error_outside_our_family_is_a_finding():
    def fail(data: bytes) -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        guided.check(fail, b"")
