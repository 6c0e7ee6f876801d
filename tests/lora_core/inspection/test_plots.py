"""The plots: their size, that they show something, and that different data look different."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from qwen_edit_lora.lora_core import Adapter, ConfigError, LoraWeights
from qwen_edit_lora.lora_core.base_model.qwen_image import QWEN_IMAGE
from qwen_edit_lora.lora_core.drawing.style import draw_message
from qwen_edit_lora.lora_core.inspection.inspection import Inspection, inspect_adapter
from qwen_edit_lora.lora_core.inspection.plots import (
    draw_heat_map,
    draw_histogram,
    draw_map,
    draw_spectrum,
)
from qwen_edit_lora.lora_core.inspection.statistics import STATISTICS

RANK = 4
TO_K = "transformer_blocks.30.attn.to_k"
LAST = "transformer_blocks.59.txt_mlp.net.2"


def make_modules(blocks: tuple[int, ...] = (0, 30, 59)) -> dict[str, LoraWeights]:
    torch.manual_seed(0)
    decay = torch.tensor([1.0, 0.5, 0.2, 0.1])
    modules = {}
    for block in blocks:
        for name in QWEN_IMAGE.presets["full"]:
            rows, columns = QWEN_IMAGE.compute_shape(name, 16)
            lora_A = torch.randn(RANK, columns) * decay[:, None]
            lora_B = torch.randn(rows, RANK) * 1e-3
            modules[f"transformer_blocks.{block}.{name}"] = LoraWeights(lora_A, lora_B)
    return modules


def inspect(modules: dict[str, LoraWeights], exact: bool = True, name: str = "a") -> Inspection:
    return inspect_adapter(Adapter(modules, name=name), exact=exact)


@pytest.fixture(scope="module")
def inspection() -> Inspection:
    return inspect(make_modules(), name="my_edit_lora.safetensors")


def count_colours(picture: np.ndarray) -> int:
    return len(np.unique(picture.reshape(-1, 3), axis=0))


def check_picture(picture: np.ndarray) -> None:
    assert picture.shape == (1024, 1024, 3)
    assert picture.dtype == np.uint8
    assert count_colours(picture) > 100
    assert np.median(picture) < 60  # dark


@pytest.mark.parametrize("statistic", STATISTICS)
def test_every_statistic_has_its_own_map(inspection, statistic):
    picture = draw_heat_map(inspection, statistic)
    check_picture(picture)
    other = "std" if statistic != "std" else "frobenius"
    assert (picture != draw_heat_map(inspection, other)).any()


def find_changes(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(y, x) of the pixels that differ."""
    return np.argwhere((a != b).any(axis=2))


def test_an_absent_and_a_dead_module_change_exactly_their_own_cell():
    modules = make_modules()
    others = {p: 1.0 for p in modules if p != TO_K} | {LAST: 2.0}
    whole = draw_map(dict.fromkeys(modules, 1.0) | {LAST: 2.0}, "x", QWEN_IMAGE)
    absent = draw_map(others, "x", QWEN_IMAGE)
    dead = draw_map(others, "x", QWEN_IMAGE, marked={TO_K: "delta is 0"})
    cell = find_changes(whole, absent)
    (top, left), (bottom, right) = cell.min(0), cell.max(0)
    assert bottom - top < 20  # one of 60 rows
    assert right - left < 80  # one of 14 columns
    assert 425 < (top + bottom) / 2 < 455  # the map's middle; labels are below it
    inside = (slice(top, bottom), slice(left, right))
    assert (absent[inside] != dead[inside]).any()
    assert count_colours(absent[inside]) > 2  # hatched, not flat


def test_a_dead_module_is_marked_and_does_not_stretch_the_scale():
    modules = make_modules()
    before = draw_heat_map(inspect(modules), "std")
    modules[TO_K] = LoraWeights(modules[TO_K].lora_A, torch.zeros_like(modules[TO_K].lora_B))
    after = draw_heat_map(inspect(modules), "std")
    changes = find_changes(before, after)
    assert len(changes)
    note = changes[changes[:, 0] > 900]
    cell = changes[changes[:, 0] <= 900]
    assert len(note)  # the note below now explains the cross
    assert np.ptp(cell[:, 0]) < 30


def test_more_blocks_than_qwen_image_has_are_shown_too():
    few = draw_heat_map(inspect(make_modules((0,)), name="a"))
    many = draw_heat_map(inspect(make_modules((0, 70)), name="a"))
    assert len(find_changes(few, many)) > 1000


def test_histogram_and_spectrum_show_something(inspection):
    for picture in (draw_histogram(inspection), draw_spectrum(inspection)):
        check_picture(picture)
    for draw in (draw_histogram, draw_spectrum):
        one = draw(inspection, TO_K)
        check_picture(one)
        assert (one != draw(inspection, LAST)).any()
        with pytest.raises(ConfigError, match=r"is not a module of my_edit_lora\.safetensors"):
            draw(inspection, "transformer_blocks.1.attn.to_q")


def test_without_exact_the_images_that_need_it_say_so():
    quick = inspect(make_modules((0,)), exact=False)
    text = "histogram of the entries\n\nneeds exact: turn it on to see it"
    assert (draw_histogram(quick) == draw_message(text)).all()
    text = "largest entry of the delta\n\nneeds exact: turn it on to examine every entry"
    assert (draw_heat_map(quick, "abs max") == draw_message(text)).all()
    with pytest.raises(ConfigError, match="unknown statistic 'colour'; expected one of std"):
        draw_heat_map(quick, "colour")


@pytest.mark.parametrize("name", ["画像-✨", "$x^2", "a_b\nc", "n" * 300])
def test_names_that_fonts_or_formulas_cannot_show_are_drawn(name):
    check_picture(draw_spectrum(inspect(make_modules((0,)), exact=False, name=name)))


def test_empty_untrained_and_broken_adapters_have_images():
    zero = {
        path: LoraWeights(weights.lora_A, torch.zeros_like(weights.lora_B))
        for path, weights in make_modules((0,)).items()
    }
    nan = {
        path: LoraWeights(weights.lora_A, weights.lora_B * float("nan"))
        for path, weights in make_modules((0,)).items()
    }
    pictures = [draw_heat_map(inspect(modules)) for modules in ({}, zero, nan)]
    assert all((a != b).any() for a, b in itertools.pairwise(pictures))
    for modules in ({}, zero, nan):
        assert count_colours(draw_histogram(inspect(modules))) > 10
        assert count_colours(draw_spectrum(inspect(modules))) > 10


def test_drawing_needs_no_display_and_leaves_matplotlib_as_it_was(tmp_path):
    """In a fresh process: pyplot would choose a backend and keep every figure."""
    code = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("core", sys.argv[1] + "/lora_core/__init__.py",
    submodule_search_locations=[sys.argv[1] + "/lora_core"])
sys.modules["core"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
import core.inspection.plots
assert "matplotlib" not in sys.modules
import matplotlib
before = dict(matplotlib.rcParams)
core.inspection.plots.draw_map({"transformer_blocks.0.attn.to_q": 1.0}, "x")
assert "matplotlib.pyplot" not in sys.modules
assert dict(matplotlib.rcParams) == before
"""
    root = str(Path(sys.modules[Adapter.__module__].__file__).parents[2])
    environment = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "MPLBACKEND")}
    result = subprocess.run(
        [sys.executable, "-c", code, root],
        env={**environment, "MPLBACKEND": "TkAgg"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
