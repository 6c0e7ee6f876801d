"""Curves: growing files are read incrementally, and thinning keeps the important points."""

from __future__ import annotations

import json

import pytest
from qwen_edit_lora.lora_core.errors import FileError
from qwen_edit_lora.lora_core.jobs.curves import (
    CURVES,
    MetricsReader,
    build_curves,
    build_health,
    thin_out,
)


def make_row(step: int, loss: float = 0.1, **more):
    return {"step": step, "loss": loss, "smoothed_loss": loss, **more}


def write(path, rows, mode="a"):
    with path.open(mode, encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def test_a_file_that_grew_is_read_incrementally_and_a_partial_line_waits(tmp_path):
    path, reader = tmp_path / "metrics.jsonl", MetricsReader()
    assert reader.read(path) == []
    write(path, [make_row(1), make_row(2)])
    assert [row["step"] for row in reader.read(path)] == [1, 2]
    with path.open("a") as file:
        file.write('{"step": 3, "loss"')
    assert len(reader.read(path)) == 2
    with path.open("a") as file:
        file.write(": 0.5}\n")
    rows = reader.read(path)
    assert rows[2] == {"step": 3, "loss": 0.5}
    assert rows == MetricsReader().read(path)


def test_only_the_new_lines_are_parsed(tmp_path, monkeypatch):
    path, reader, parsed = tmp_path / "metrics.jsonl", MetricsReader(), []
    loads = json.loads

    def note(line, **options):
        parsed.append(line)
        return loads(line, **options)

    monkeypatch.setattr(json, "loads", note)
    write(path, [make_row(i) for i in range(1, 101)])
    reader.read(path)
    parsed.clear()
    write(path, [make_row(101)])
    assert len(reader.read(path)) == 101
    assert len(parsed) == 1


def test_a_file_truncated_by_a_resumed_run_is_read_from_its_start(tmp_path):
    path, reader = tmp_path / "metrics.jsonl", MetricsReader()
    write(path, [make_row(i, 0.1) for i in range(1, 11)])
    reader.read(path)
    new = tmp_path / "new"
    write(new, [make_row(i, 0.1) for i in range(1, 6)])
    new.replace(path)
    write(path, [make_row(i, 0.2) for i in range(6, 16)])
    rows = reader.read(path)
    assert [row["step"] for row in rows] == list(range(1, 16))
    assert rows[5]["loss"] == 0.2


def test_an_unreadable_file_is_a_clear_error_and_affects_no_other_file(tmp_path):
    good, bad, reader = tmp_path / "good.jsonl", tmp_path / "bad.jsonl", MetricsReader()
    write(good, [make_row(1)])
    bad.mkdir()
    with pytest.raises(FileError, match=r"bad\.jsonl is a folder"):
        reader.read(bad)
    assert len(reader.read(good)) == 1


def test_old_files_are_forgotten(tmp_path):
    reader = MetricsReader(capacity=2)
    paths = [tmp_path / f"{i}.jsonl" for i in range(4)]
    for path in paths:
        write(path, [make_row(1)])
        reader.read(path)
    assert list(reader._known) == paths[2:]


@pytest.mark.parametrize("count", [0, 1, 999, 1000, 1001, 10_000, 10_007])
def test_thinning_keeps_ends_extremes_and_order(count):
    rows = [make_row(i, 0.1 + 0.01 * (i % 7)) for i in range(1, count + 1)]
    if count > 600:
        rows[567] = make_row(568, 99.0)
        rows[321] = make_row(322, 1e-6)
    kept = thin_out(rows, 1000)
    steps = [row["step"] for row in kept]
    assert len(kept) == min(count, len(kept)) <= 1000
    assert steps == sorted(set(steps))
    assert len(kept) > 900 or len(kept) == count
    if count:
        assert (kept[0], kept[-1]) == (rows[0], rows[-1])
    if count > 600:
        losses = [row["loss"] for row in kept]
        assert (max(losses), min(losses)) == (99.0, 1e-6)


def test_curves_have_equal_length_and_health_has_its_own_steps():
    rows = [make_row(i, grad_norm=float(i)) for i in range(1, 51)]
    for i in (25, 50):
        rows[i - 1]["health"] = {"std": i / 1000, "spectral": 1.0, "effective_rank": 3.0}
    curves = build_curves(rows, 1000)
    assert set(curves) == set(CURVES)
    assert {len(values) for values in curves.values()} == {50}
    assert curves["learning_rate"] == [None] * 50
    health = build_health(rows, 1000)
    assert health["step"] == [25, 50]
    assert health["std"] == [0.025, 0.05]
    assert build_health([], 10)["step"] == []
