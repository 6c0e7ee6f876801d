"""Damage to a run's folder by a disk, a crash or a user costs at most one checkpoint."""

from __future__ import annotations

import json

import pytest
import torch
from qwen_edit_lora.lora_core.errors import ConfigError, FileError
from qwen_edit_lora.lora_core.jobs.curves import MetricsReader, build_curves
from qwen_edit_lora.lora_core.training.config.config import LONGEST_ENDING
from qwen_edit_lora.lora_core.training.run.checkpoint import STATE_FILE, CheckpointFolder
from qwen_edit_lora.lora_core.training.run.metrics import METRICS_FILE, read_metrics
from qwen_edit_lora.lora_core.training.run.trainer import train
from tiny import make_config, make_dataset, make_injected


@pytest.fixture
def checkpoints(tmp_path) -> CheckpointFolder:
    """Checkpoints of steps 1 and 2, with files of equal size."""
    folder = CheckpointFolder(tmp_path / "checkpoints")
    for step in (1, 2):
        generator = torch.Generator().manual_seed(step)
        tensors = {
            group: {"a": torch.randn(5, 7, generator=generator)} for group in ("adapter", "ema")
        }
        folder.write(step, tensors, {"smoothed_loss": {"total": step / 3}, "text": "käse"})
    return folder


def list_flips(data: bytes) -> list[bytes]:
    """Versions of the file with one bit flipped, at positions throughout."""
    places = range(0, len(data), max(1, len(data) // 40))
    return [data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :] for i in places]


@pytest.mark.parametrize("name", ["adapter.safetensors", "ema.safetensors", STATE_FILE])
def test_any_changed_bit_makes_a_run_resume_from_the_previous_checkpoint(checkpoints, name):
    whole = checkpoints.read_latest()
    assert whole.step == 2
    path = checkpoints.get_path(2) / name
    data = path.read_bytes()
    for damaged in list_flips(data):
        path.write_bytes(damaged)
        checkpoints.passed_over.clear()
        assert checkpoints.read_latest().step == 1
        (sentence,) = checkpoints.passed_over
        assert "step_00000002" in sentence
    path.write_bytes(data)
    again = checkpoints.read_latest()
    assert again.state == whole.state
    assert torch.equal(again.tensors["ema"]["a"], whole.tensors["ema"]["a"])


def test_a_file_of_the_previous_checkpoint_is_not_mistaken_for_the_newest(checkpoints):
    old, new = (checkpoints.get_path(step) / "adapter.safetensors" for step in (1, 2))
    assert old.stat().st_size == new.stat().st_size
    new.write_bytes(old.read_bytes())
    assert checkpoints.read_latest().step == 1


def damage(checkpoints: CheckpointFolder, step: int) -> None:
    path = checkpoints.get_path(step) / "adapter.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def write(checkpoints: CheckpointFolder, step: int) -> None:
    checkpoints.write(step, {"adapter": {"a": torch.full((3,), float(step))}}, {})


def test_damaged_later_checkpoints_do_not_displace_a_new_intact_one(tmp_path):
    before = CheckpointFolder(tmp_path / "checkpoints")
    for step in (1000, 1250):
        write(before, step)
        damage(before, step)
    for name in ("step_99999998", "step_99999999"):
        (before.folder / name).mkdir()
    checkpoints = CheckpointFolder(tmp_path / "checkpoints")
    checkpoints.prepare()
    assert checkpoints.read_latest() is None
    for step in (500, 750, 1100):
        write(checkpoints, step)
        assert checkpoints.read_latest().step == step
    kept = {step for step in checkpoints.list_steps() if step <= 1100}
    assert kept == {750, 1100}  # the damaged one of step 1000 counts for nothing


def test_an_intact_checkpoint_is_kept_though_fewer_are_asked_for_and_newer_ones_are_damaged(
    tmp_path,
):
    before = CheckpointFolder(tmp_path / "checkpoints", keep=3)
    for step in (1, 2, 3):
        write(before, step)
    damage(before, 2)
    damage(before, 3)
    checkpoints = CheckpointFolder(tmp_path / "checkpoints", keep=2)
    checkpoints.prepare()
    assert checkpoints.read_latest().step == 1
    checkpoints.rotate(1)
    assert checkpoints.list_steps() == [1, 2, 3]
    write(checkpoints, 2)
    assert checkpoints.list_steps() == [1, 2, 3]


TORN = [
    b'{"step": 2, "loss": 0.\n',
    b"\0\0\0\0\n",
    b"\n",
    b"\xff\xfe{}\n",
    b'{"loss": 0.5}\n',
    b'["step"]\n',
    b'{"step": "2"}\n',
    b'{"step": 2, "loss": "x"}\n',
    b'{"step": 2, "health": 3}\n',
    b'{"step": 2, "loss": NaN}\n',
    b"[" * 100_000 + b"\n",
]


@pytest.mark.parametrize("line", TORN, ids=lambda line: repr(line[:24]))
def test_an_unreadable_line_of_metrics_is_skipped(tmp_path, line):
    path = tmp_path / METRICS_FILE
    good = [json.dumps({"step": step, "loss": 0.5}).encode() + b"\n" for step in (1, 3)]
    path.write_bytes(good[0] + line + good[1])
    assert [row["step"] for row in read_metrics(path)] == [1, 3]
    rows = MetricsReader().read(path)
    assert build_curves(rows, 10)["step"] == [1, 3]


@pytest.fixture
def configure(tmp_path):
    return lambda **changes: make_config(tmp_path, **changes)


@pytest.fixture
def start(tmp_path):
    """Begins or resumes the tiny run."""
    dataset = make_dataset(tmp_path / "data")

    def begin(config, **options):
        return train(config, *make_injected(config), dataset, **options)

    return begin


def test_damaged_metrics_never_prevent_a_resume(tmp_path, configure, start):
    config = configure(steps=4)
    reports = start(config)
    for _ in range(2):
        next(reports)
    reports.close()
    path = tmp_path / "run" / METRICS_FILE
    assert path.exists()
    path.write_bytes(path.read_bytes() + b"".join(TORN))
    said: list[str] = []
    assert [r.step for r in start(config, resume=True, notify=said.append)] == [3, 4]
    assert any(f"{len(TORN)} lines of {METRICS_FILE}" in sentence for sentence in said)


def test_an_adapter_that_cannot_be_written_costs_no_step(tmp_path, configure, start):
    config = configure(steps=3, **{"saving.adapter_every": 2, "saving.checkpoint_every": 100})
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "adapters").write_text("not a folder")
    reports = start(config)
    next(reports)
    with pytest.raises(FileError):
        next(reports)
    assert CheckpointFolder(folder / "checkpoints").list_steps() == [2]


@pytest.mark.parametrize(
    "name",
    [
        "\u56fe" * 82,
        "\u0416" * 119,
        "a" * 228,
        "\ud800",
        "CON",
        "nul.txt",
        "com1",
        "style.",
        " style",
        "a\x7fb",
        "a/b",
        ".style",
        "",
    ],
    ids=lambda name: ascii(name)[:20],
)
def test_a_name_that_cannot_be_written_everywhere_is_refused_before_the_first_step(
    tmp_path, configure, name
):
    with pytest.raises(ConfigError) as error:
        configure(name=name)
    assert len(str(error.value)) <= 400


@pytest.mark.parametrize(
    "name",
    ["my edit", "\u56fe\u50cf 2", "a" * (255 - len(LONGEST_ENDING)), "v1.2"],
    ids=lambda name: ascii(name)[:20],
)
def test_a_name_that_is_accepted_can_be_written(tmp_path, configure, name):
    configure(name=name)
    (tmp_path / f"{name}{LONGEST_ENDING}").write_bytes(b"")
