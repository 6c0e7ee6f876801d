"""An interrupted and resumed run is bit-identical, however it was interrupted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from qwen_edit_lora.lora_core import ConfigError
from qwen_edit_lora.lora_core.training.data.dataset import read_dataset
from qwen_edit_lora.lora_core.training.optimizer.optimization import OPTIMIZERS
from qwen_edit_lora.lora_core.training.run.checkpoint import CheckpointFolder
from qwen_edit_lora.lora_core.training.run.metrics import StepReport, read_metrics
from qwen_edit_lora.lora_core.training.run.run_state import TrainingState, build_training_state
from qwen_edit_lora.lora_core.training.run.trainer import train
from safetensors.torch import load_file, save_file
from tiny import make_config, make_dataset, make_injected

SCRIPT = Path(__file__).parents[1] / "killed_runs.py"
NUM_KILLS = 10  # of each kind: at a disk operation, after a random time
TIMINGS = {"seconds", "tokens_per_s", "memory_bytes"}


def read_outcome(run: Path) -> dict[str, object]:
    """All output of a run that must not depend on how often it was interrupted."""
    lines = [
        {name: value for name, value in line.items() if name not in TIMINGS}
        for line in read_metrics(run / "metrics.jsonl")
    ]
    files = {
        path.relative_to(run).as_posix(): load_file(path) for path in run.rglob("*.safetensors")
    }
    return {"metrics": lines, "files": files}


def assert_same(ours: dict[str, object], theirs: dict[str, object]) -> None:
    assert ours["metrics"] == theirs["metrics"]
    assert ours["files"].keys() == theirs["files"].keys()
    for name, tensors in theirs["files"].items():
        assert tensors.keys() == ours["files"][name].keys()
        for key, tensor in tensors.items():
            assert torch.equal(ours["files"][name][key], tensor), (name, key)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks the runs that are killed")
def test_a_run_killed_at_any_moment_ends_bit_identical_to_an_uninterrupted_one(tmp_path):
    result = subprocess.run(
        [sys.executable, SCRIPT, tmp_path, str(NUM_KILLS)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    outcome = json.loads(result.stdout)
    assert outcome["killed_at_operations"] == NUM_KILLS
    assert outcome["killed_after_times"] == NUM_KILLS
    assert outcome["half_written"] == []
    whole = read_outcome(tmp_path / "whole" / "run")
    assert [line["step"] for line in whole["metrics"]] == list(range(1, 7))
    assert {"tiny.safetensors", "tiny_ema.safetensors"} <= whole["files"].keys()
    assert len(outcome["runs"]) > NUM_KILLS
    for name in outcome["runs"]:
        assert_same(read_outcome(tmp_path / name / "run"), whole)
        assert not list((tmp_path / name / "run").rglob(".*"))


def run(folder: Path, should_stop=None, resume=False, notify=None, **changes):
    config = make_config(folder, **changes)
    model, injection = make_injected(config)
    dataset = make_dataset(folder / "data")
    reports = train(
        *(config, model, injection, dataset),
        **{"resume": resume, "should_stop": should_stop, "notify": notify},
    )
    return list(reports)


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer.name": "prodigy", "optimizer.learning_rate": 1.0},
        {"optimizer.name": "schedule-free"},
        {"optimizer.name": "adafactor"},
        {"optimizer.name": "adamw8bit", "lora.rank": 32},  # 8 bits from 4096 entries on
        {"lora.use_dora": True, "lora.dropout": 0.2},
        {"lora.init": "pissa", "optimizer.ema_decay": 0.9},
    ],
    ids=["prodigy", "schedule-free", "adafactor", "8-bit AdamW", "DoRA", "PiSSA and EMA"],
)
def test_a_stopped_run_resumes_bit_exactly(tmp_path, changes):
    if "optimizer.name" in changes:
        pytest.importorskip(OPTIMIZERS[changes["optimizer.name"]].module)
    changes = changes | {"saving.checkpoint_every": 100, "saving.dtype": "fp32"}
    whole = run(tmp_path / "whole", **changes)
    asked = iter([False, False, False, True])
    first = run(tmp_path / "cut", lambda: next(asked), **changes)
    assert [report.step for report in first] == [1, 2, 3]
    rest = run(tmp_path / "cut", resume=True, **changes)
    assert [report.loss for report in first + rest] == [report.loss for report in whole]
    ours, theirs = (read_outcome(tmp_path / name / "run")["files"] for name in ("cut", "whole"))
    finished = [name for name in theirs if "/" not in name]
    assert len(finished) == 1 + ("optimizer.ema_decay" in changes)
    for name in finished:
        assert all(torch.equal(ours[name][key], tensor) for key, tensor in theirs[name].items())


def test_a_finished_run_can_be_given_more_steps(tmp_path):
    run(tmp_path / "short", steps=4)
    said = []
    rest = run(tmp_path / "short", resume=True, steps=6, notify=said.append)
    whole = run(tmp_path / "whole", steps=6)
    assert [report.loss for report in rest] == [report.loss for report in whole[4:]]
    assert "steps was 4 and is 6 from now on" in said
    assert "resumed after step 4 of 6" in said


def test_another_base_is_reported_and_a_moved_one_is_not(tmp_path):
    run(tmp_path, steps=2)
    said = []
    run(tmp_path, resume=True, steps=2, notify=said.append, **{"model.source": "moved/tiny"})
    assert said == ["resumed after step 2 of 2"]
    run(tmp_path, resume=True, steps=2, notify=said.append, **{"model.source": "tiny_2511"})
    assert "model.source was 'tiny' and is 'tiny_2511' from now on" in said


def test_resuming_a_finished_run_takes_no_step_and_returns_its_adapter(tmp_path):
    run(tmp_path)
    adapter = tmp_path / "run" / "tiny.safetensors"
    before = load_file(adapter)
    adapter.unlink()
    assert run(tmp_path, resume=True) == []
    assert all(torch.equal(before[key], tensor) for key, tensor in load_file(adapter).items())


def test_a_second_run_in_the_same_folder_is_refused_and_nothing_is_touched(tmp_path):
    run(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in [tmp_path, *tmp_path.rglob("*")]}
    config = make_config(tmp_path)
    dataset = read_dataset(tmp_path / "data")
    with pytest.raises(ConfigError, match="run already holds a run up to step 6; resume it, or"):
        train(config, *make_injected(config), dataset)
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize("what", ["nothing", "the base model", "the training set"])
def test_a_resumed_run_reports_other_contents_under_the_same_names(tmp_path, what):
    base = tmp_path / "base.safetensors"
    save_file({"a": torch.ones(4, 4)}, base)
    changes = {"model.source": str(base)}
    run(tmp_path, steps=2, **changes)
    moved = tmp_path / "moved" / base.name
    moved.parent.mkdir()
    base.rename(moved)  # a file may move
    changes = {"model.source": str(moved)}
    if what == "the base model":
        save_file({"a": torch.full((4, 4), 1.5)}, moved)
    config = make_config(tmp_path, steps=3, **changes)
    model, injection = make_injected(config)
    dataset = make_dataset(tmp_path / "data")
    if what == "the training set":
        path = next((tmp_path / "data").rglob("items/*.safetensors"))
        tensors = load_file(path)
        save_file({name: tensor + 1 for name, tensor in tensors.items()}, path)
    notes: list[str] = []
    resumed = {"resume": True, "notify": notes.append}
    list(train(config, model, injection, dataset, **resumed))
    found = [note for note in notes if "contents" in note]
    if what == "nothing":
        assert found == []
    else:
        (sentence,) = found
        assert sentence.startswith(f"{what} changed since the checkpoint")


def test_a_resumed_run_reports_another_variant(tmp_path):
    for steps, variant in ((1, "2509"), (2, "2511")):
        config = make_config(tmp_path, steps=steps)
        model, injection = make_injected(config)
        notes: list[str] = []
        parts = model, injection, make_dataset(tmp_path / "data")
        resumed = {"resume": steps > 1, "notify": notes.append}
        list(train(config, *parts, variant=variant, **resumed))
    assert "the variant was 2509 and is 2511 from now on" in notes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora.rank": 8}, r"lora\.rank was 4 when the checkpoint was made and is 8 now"),
        ({"seed": 1}, "seed was 0"),
        ({"data.batch_size": 2}, r"data\.batch_size was 1"),
        ({"optimizer.name": "prodigy"}, r"optimizer\.name was 'adamw'"),
        ({"optimizer.ema_decay": 0.9}, "the EMA changed since"),
    ],
)
def test_settings_under_which_the_state_means_something_else_are_refused(
    tmp_path, changes, message
):
    run(tmp_path, steps=2)
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, resume=True, **changes)


def test_another_training_set_is_refused(tmp_path):
    run(tmp_path, steps=2)
    config = make_config(tmp_path)
    with pytest.raises(ConfigError, match="the training set's items changed"):
        train(*(config, *make_injected(config), make_dataset(tmp_path / "other", 2)), resume=True)


def test_a_damaged_checkpoint_is_skipped_and_reported(tmp_path):
    whole = run(tmp_path / "whole")
    asked = iter([False] * 4 + [True])
    run(tmp_path / "cut", lambda: next(asked))
    checkpoints = tmp_path / "cut" / "run" / "checkpoints"
    damaged = checkpoints / "step_00000004" / "optimizer.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-9])
    said = []
    rest = run(tmp_path / "cut", resume=True, notify=said.append)
    assert [report.step for report in rest] == [3, 4, 5, 6]
    assert [report.loss for report in rest] == [report.loss for report in whole[2:]]
    expected = "skipped: step_00000004 is damaged: optimizer.safetensors is missing or cut"
    assert any(sentence.startswith(expected) for sentence in said)
    assert_same(*(read_outcome(tmp_path / name / "run") for name in ("cut", "whole")))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: (folder / "state.json").unlink(),
        lambda folder: (folder / "state.json").write_text('{"version": 1, "st'),
        lambda folder: (folder / "state.json").write_text("[]"),
        lambda folder: (folder / "random_0.safetensors").unlink(),
        lambda folder: (folder / "adapter.safetensors").write_bytes(b""),
    ],
)
def test_an_incomplete_checkpoint_is_never_read(tmp_path, spoil):
    run(tmp_path, steps=2)
    folder = CheckpointFolder(tmp_path / "run" / "checkpoints")
    assert folder.read_latest().step == 2
    spoil(folder.get_path(2))
    assert folder.read_latest() is None
    assert len(folder.passed_over) == 1
    assert "\n" not in folder.passed_over[0]


def test_resuming_without_a_checkpoint_starts_a_new_run_and_reports_it(tmp_path):
    said = []
    reports = run(tmp_path, resume=True, notify=said.append)
    assert [report.step for report in reports] == [1, 2, 3, 4, 5, 6]
    assert said == ["run holds no intact checkpoint; starting at step 1"]


def test_only_the_newest_checkpoints_and_by_default_all_adapters_are_kept(tmp_path):
    changes = {"saving.checkpoint_every": 1, "saving.adapter_every": 2}
    run(tmp_path / "all", **changes)
    folder = tmp_path / "all" / "run"
    assert CheckpointFolder(folder / "checkpoints").list_steps() == [5, 6]
    names = sorted(path.name for path in (folder / "adapters").iterdir())
    assert names == [f"tiny_{step:08d}.safetensors" for step in (2, 4, 6)]
    changes |= {"saving.keep_adapters": 1, "optimizer.ema_decay": 0.5}
    run(tmp_path / "one", **changes)
    names = sorted(path.name for path in (tmp_path / "one" / "run" / "adapters").iterdir())
    assert names == ["tiny_00000006.safetensors", "tiny_00000006_ema.safetensors"]


def test_a_half_written_line_of_metrics_is_dropped(tmp_path):
    run(tmp_path, steps=4)
    path = tmp_path / "run" / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"step": 5, "lo')
    run(tmp_path, resume=True)
    steps = [line["step"] for line in read_metrics(path)]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert {*next(read_metrics(path))} <= {field.name for field in fields(StepReport)}


def test_only_half_written_files_of_a_killed_process_are_removed(tmp_path):
    run(tmp_path, steps=2, **{"saving.adapter_every": 1})
    folder = tmp_path / "run"
    ours = (
        ".0123456789abcdef.tmp",
        ".tmpvKHBLu",
    )  # our own names, and those of safetensors
    others = (".tmp", ".gitignore", "notes.tmp", ".tmp_notes")
    for name in (*ours, *others):
        (folder / name).write_bytes(b"half")
        (folder / "adapters" / name).write_bytes(b"half")
    half = folder / "checkpoints" / ".step_00000003.0123456789abcdef.tmp"
    half.mkdir()
    (half / ".tmpAAAAAA").write_bytes(b"half")
    run(tmp_path, resume=True, steps=3)
    for place in (folder, folder / "adapters"):
        assert all((place / name).exists() for name in others)
        assert not any((place / name).exists() for name in ours)
    assert sorted(path.name for path in half.parent.iterdir()) == ["step_00000002", "step_00000003"]


def test_checkpoints_hold_no_pickles(tmp_path):
    run(tmp_path, steps=2)
    folder = tmp_path / "run" / "checkpoints" / "step_00000002"
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json"}
    for path in folder.glob("*.safetensors"):
        load_file(path)


def test_a_checkpoint_of_another_version_is_a_clear_error(tmp_path):
    run(tmp_path, steps=2)
    folder = CheckpointFolder(tmp_path / "run" / "checkpoints")
    state = folder.get_path(2) / "state.json"
    state.write_text(state.read_text().replace('"version": 2', '"version": 7', 1))
    assert folder.read_latest() is None
    assert "format 7, this is 2" in folder.passed_over[0]


def take_steps(state: TrainingState, count: int) -> None:
    """Steps along random gradients, the same for the same count."""
    generator = torch.Generator().manual_seed(count)
    for _ in range(count):
        for parameter in state.injection.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        state.optimizer.step()
        state.ema.update()
        state.smoothed_loss.update(torch.rand((), generator=generator).item())
        state.step += 1


def test_a_state_continues_bit_exactly_in_another_run(tmp_path):
    config = make_config(tmp_path, **{"optimizer.ema_decay": 0.9})
    ours, theirs = (
        build_training_state(config.optimizer, make_injected(config)[1]) for _ in range(2)
    )
    take_steps(ours, 3)
    tensors, values = ours.state_dict()
    # as a checkpoint has them: copies, and numbers that were JSON
    copies = {
        group: {name: tensor.clone() for name, tensor in named.items()}
        for group, named in tensors.items()
    }
    theirs.load_state_dict(copies, json.loads(json.dumps(values)), ours.step)
    for state in (ours, theirs):
        take_steps(state, 2)
    (a, ours_values), (b, theirs_values) = ours.state_dict(), theirs.state_dict()
    assert (ours_values, ours.step) == (theirs_values, theirs.step)
    assert a.keys() == b.keys() == {"adapter", "optimizer", "ema"}
    for group in a:
        assert a[group].keys() == b[group].keys()
        for name in a[group]:
            assert torch.equal(a[group][name], b[group][name]), (group, name)


def test_a_checkpoint_has_the_groups_and_entries_of_its_version(tmp_path):
    """Whoever changes this has to read what earlier versions wrote, or raise the version."""
    run(tmp_path, **{"optimizer.ema_decay": 0.9})
    checkpoint = CheckpointFolder(tmp_path / "run" / "checkpoints").read_latest()
    assert checkpoint.tensors.keys() == {"adapter", "optimizer", "ema", "random_0"}
    state = checkpoint.state
    assert state.keys() == {"run", "optimizer", "smoothed_loss", "random"}
    assert state["smoothed_loss"].keys() == {"total", "weight"}
    assert len(state["random"]) == 1
    assert state["run"].keys() == {
        *("config", "dataset", "prior", "processes", "has_ema", "contents", "variant"),
    }
