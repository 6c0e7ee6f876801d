"""The contact sheet: correct layout for any number, shape and names of the cells."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from qwen_edit_lora.lora_core.drawing.contact_sheet import (
    Row,
    Tile,
    choose_columns,
    choose_layout,
    compute_line_height,
    draw_sheet,
    load_font,
    shorten,
    wrap,
)
from qwen_edit_lora.lora_core.sweep.measures import SweepMeasures, measure_sweep
from qwen_edit_lora.lora_core.sweep.plots import (
    arrange,
    draw_contact_sheet,
    draw_curve,
    draw_differences,
)
from qwen_edit_lora.lora_core.sweep.verdict import judge_sweep

LONG = "an_extraordinarily_long_name_of_a_lora_that_fits_nowhere " * 3


def make_tile(caption: str = "0.5", shape: tuple[int, int] = (256, 256), notes=("RMS 12.3",)):
    return Tile(np.full((*shape, 3), 120, np.uint8), caption, notes)


def make_rows(columns: int, rows: int = 1, shape: tuple[int, int] = (256, 256)) -> list[Row]:
    return [
        Row(f"seed {n}", tuple(make_tile(shape=shape) for _ in range(columns))) for n in range(rows)
    ]


def find_changes(a: np.ndarray, b: np.ndarray) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of the pixels that differ."""
    y, x = np.nonzero((a != b).any(axis=2))
    return x.min(), y.min(), x.max(), y.max()


@pytest.mark.parametrize(
    ("columns", "rows", "shape"),
    [
        *((n, 1, (256, 256)) for n in (1, 2, 5, 8)),
        *((9, 2, shape) for shape in [(144, 256), (256, 64), (64, 256), (12, 9)]),
        (4, 16, (64, 64)),
        (64, 1, (64, 96)),
    ],
)
def test_every_cell_has_its_own_place_and_its_text_stays_inside(columns, rows, shape):
    sheet_rows = make_rows(columns, rows, shape)
    layout = choose_layout(sheet_rows)
    sheet = draw_sheet("title", sheet_rows)
    assert sheet.dtype == np.uint8
    assert 1024 <= sheet.shape[1] <= 8 * 1.1 * 256 + 64
    seen = []
    for row in (0, rows - 1):
        for column in {0, columns // 2, columns - 1}:
            changed = [Row(r.heading, r.tiles) for r in sheet_rows]
            tiles = list(changed[row].tiles)
            picture = 255 - tiles[column].image
            tiles[column] = Tile(picture, LONG, (LONG,))
            changed[row] = Row(changed[row].heading, tuple(tiles))
            left, top, right, bottom = find_changes(sheet, draw_sheet("title", changed))
            assert right - left < layout.tile[0] + layout.gap
            assert bottom - top < compute_line_height(sheet_rows[row], layout)
            assert layout.gap // 2 <= left
            assert right < sheet.shape[1] - layout.gap // 2
            seen.append((left, top, right, bottom))
    for number, a in enumerate(seen):
        for b in seen[:number]:
            same = rows == 1 and a == b
            assert same or a[2] < b[0] or b[2] < a[0] or a[3] < b[1] or b[3] < a[1]


@pytest.mark.parametrize(
    ("longest", "num_rows", "columns"),
    [(1, 1, 1), (4, 1, 4), (5, 1, 5), (8, 1, 4), (9, 1, 5), (64, 1, 8), (8, 3, 8), (9, 3, 5)],
)
def test_rows_break_evenly_and_only_where_they_must(longest, num_rows, columns):
    assert choose_columns(longest, num_rows, 1.0) == columns


@pytest.mark.parametrize("columns", [1, 3, 8, 64])
def test_the_font_size_grows_with_the_sheet(columns):
    layout = choose_layout(make_rows(columns))
    # A node shows the sheet about 480 pixels wide: notes are then 8 pixels or more.
    assert layout.small * 480 / layout.width >= 8
    assert layout.letter * 480 / layout.width >= 10


def test_a_text_that_fits_is_unchanged_and_a_longer_one_is_cut_in_the_middle():
    font = load_font(20)
    assert shorten("0.25", font, 200) == "0.25"
    cut = shorten(LONG, font, 200)
    assert font.getlength(cut) <= 200
    assert cut.startswith("an_ex")
    assert "..." in cut
    assert shorten("灯", font, 200) == "\u25a1"
    lines = wrap("a sentence of words " * 10 + LONG, font, 300)
    assert max(map(font.getlength, lines)) <= 300


def edit(strength: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    picture = 0.2 + 0.5 * torch.rand(1, 3, 4, 4, generator=generator)
    large = torch.nn.functional.interpolate(picture, (96, 96), mode="bicubic").movedim(1, -1)
    large[:, 20:40, 20:40] += 0.02 * strength
    return large


def measure(labels: list[str]) -> SweepMeasures:
    pictures = []
    for label in labels:
        parts = dict(part.split("=") for part in label.split())
        pictures.append(edit(float(parts["strength"]), int(parts.get("seed", 0))))
    return measure_sweep(pictures, labels)


def test_strengths_go_across_and_adapters_and_seeds_down_with_a_shared_strength_0():
    labels = [f"strength=0 seed={seed}" for seed in (1, 2)]
    labels += [f"strength={s} seed={n} lora={a}" for n in (1, 2) for a in "xy" for s in (2, 1)]
    labels.remove("strength=1 seed=2 lora=y")
    sweep = measure(labels)
    rows = arrange(sweep)
    assert [heading for heading, _ in rows] == ["x, seed 1", "x, seed 2", "y, seed 1", "y, seed 2"]
    assert all([strength for strength, _ in places] == [0, 1, 2] for _, places in rows)
    assert rows[0][1][0] == rows[2][1][0]
    missing = [(heading, s) for heading, places in rows for s, found in places if found is None]
    assert missing == [("y, seed 2", 1.0)]
    verdict = judge_sweep(sweep)
    assert draw_contact_sheet(sweep, verdict).shape[1] >= 1024


def test_a_table_with_more_gaps_than_images_shows_only_images():
    labels = ["strength=0 seed=0", *(f"strength={n} seed=0" for n in range(1, 5))]
    for seed in range(1, 5):
        labels += [f"strength=0 seed={seed}", f"strength={10 * seed} seed={seed}"]
    rows = arrange(measure(labels))
    assert [len(places) for _, places in rows] == [5, 2, 2, 2, 2]


def test_the_difference_image_is_amplified_and_black_where_nothing_changes():
    sweep = measure(["strength=0", "strength=1", "strength=2"])
    verdict = judge_sweep(sweep)
    differences = draw_differences(sweep, verdict)
    plain = draw_contact_sheet(sweep, verdict)
    assert differences.shape[1] == plain.shape[1]
    layout = choose_layout(make_rows(3, shape=(96, 96)))
    # The square, 4 % of the image, differs by 0.02 and 0.04 of the full scale; 32 times leaves
    # the middle one, 0.03, below white.
    red = differences[..., 0].astype(int)
    area = layout.tile[0] ** 2
    for value in (0, round(0.02 * 32 * 255), 255):
        assert (abs(red - value) <= 4).sum() > 0.03 * area


def test_the_curve_changes_with_what_it_shows():
    smooth = judge_sweep(measure(["strength=0", "strength=1", "strength=2"]))
    other = judge_sweep(measure(["strength=0", "strength=1", "strength=3"]))
    pictures = [
        draw_curve(smooth),
        draw_curve(other),
        draw_curve(judge_sweep(measure(["strength=0"]))),
    ]
    for picture in pictures:
        assert picture.shape == (1024, 1024, 3)
        assert np.median(picture) < 60  # dark
    assert (pictures[0] != pictures[1]).any()
    assert (pictures[0] != pictures[2]).any()
