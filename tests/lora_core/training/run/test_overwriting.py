"""A run whose files have names that are taken in its folder: nothing of the user's is replaced."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from demo_base import dit
from qwen_edit_lora.lora_core.__main__ import main
from tiny import make_dataset, make_item


def write_config(folder: Path, output: str, name: str) -> str:
    make_dataset(folder / "data", {k: make_item(i, (8, 8)) for i, k in enumerate("ab")})
    dit.write_dit(folder / "base.safetensors", "2511", "bf16")
    path = folder / "config.toml"
    path.write_text(
        f'name = "{name}"\noutput = "{output}"\nsteps = 1\n[model]\ndevice = "cpu"\n'
        f"source = {json.dumps((folder / 'base.safetensors').as_posix())}\n"
        '[data]\nfolder = "data"\n[lora]\nrank = 2\n[optimizer]\nema_decay = 0.9\n'
    )
    return str(path)


@pytest.mark.parametrize("more", [[], ["--resume"]])
def test_a_training_never_replaces_its_own_base_model(tmp_path, capsys, more):
    """output = "." and the base's own name: the adapter would be written over the model."""
    config = write_config(tmp_path, ".", "base")
    (tmp_path / "checkpoints").mkdir()
    kept = (tmp_path / "base.safetensors").read_bytes()
    assert main(["train", config, *more]) == 2
    assert "base.safetensors is already in " in capsys.readouterr().err
    assert (tmp_path / "base.safetensors").read_bytes() == kept


@pytest.mark.parametrize("more", [[], ["--resume"]])
@pytest.mark.parametrize(
    "name", ["mine.safetensors", "mine_ema.safetensors", "adapters/mine_00000001.safetensors"]
)
def test_a_new_training_replaces_no_lora_that_is_in_its_folder(tmp_path, capsys, name, more):
    """There is no run in the folder, only a LoRA of the name: it is the user's."""
    config = write_config(tmp_path, "run", "mine")
    file = tmp_path / "run" / name
    file.parent.mkdir(parents=True)
    file.write_bytes(b"of another training")
    assert main(["train", config, *more]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{file.name} is already in {file.parent.name} and would be replaced" in line
    assert file.read_bytes() == b"of another training"
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_finished_training_whose_checkpoints_were_deleted_is_not_replaced(tmp_path, capsys):
    config = write_config(tmp_path, "run", "mine")
    assert main(["train", config]) == 0
    kept = (tmp_path / "run" / "mine.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert main(["train", config]) == 2
    assert "mine.safetensors is already in run" in capsys.readouterr().err
    assert (tmp_path / "run" / "mine.safetensors").read_bytes() == kept


@pytest.mark.parametrize("more", [[], ["--resume"]])
def test_a_training_that_was_killed_before_its_first_checkpoint_starts_again(tmp_path, more):
    config = write_config(tmp_path, "run", "mine")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "adapters").mkdir()
    (tmp_path / "run" / "adapters" / "mine_00000001.safetensors").write_bytes(b"its own")
    assert main(["train", config, *more]) == 0
    assert (tmp_path / "run" / "mine_ema.safetensors").is_file()


def test_a_finished_training_is_resumed_over_its_own_files(tmp_path):
    config = write_config(tmp_path, "run", "mine")
    assert main(["train", config]) == 0
    kept = (tmp_path / "run" / "mine.safetensors").read_bytes()
    longer = Path(config).read_text(encoding="utf-8").replace("steps = 1", "steps = 2")
    Path(config).write_text(longer, encoding="utf-8")
    assert main(["train", config, "--resume"]) == 0
    assert (tmp_path / "run" / "mine.safetensors").read_bytes() != kept


def rename_run(config: str, name: str, num_steps: int) -> None:
    """Under other settings, the same run."""
    text = Path(config).read_text(encoding="utf-8")
    text = re.sub(r'^name = ".*"', f'name = "{name}"', text)
    Path(config).write_text(
        re.sub(r"\nsteps = \d", f"\nsteps = {num_steps}", text), encoding="utf-8"
    )


@pytest.mark.parametrize("num_steps", [1, 2])
@pytest.mark.parametrize("name", ["other.safetensors", "other_ema.safetensors"])
def test_a_run_resumed_under_another_name_replaces_no_lora_of_that_name(
    tmp_path, capsys, name, num_steps
):
    config = write_config(tmp_path, "run", "mine")
    assert main(["train", config]) == 0
    file = tmp_path / "run" / name
    file.write_bytes(b"a finished one")
    rename_run(config, "other", num_steps)
    capsys.readouterr()
    assert main(["train", config, "--resume"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{name} is already in run and would be replaced by this run; choose" in line
    assert file.read_bytes() == b"a finished one"


def test_a_run_that_changes_its_name_keeps_the_loras_of_both_names(tmp_path, capsys):
    """Back under its first name, its first LoRA is one of the user's, too."""
    config = write_config(tmp_path, "run", "mine")
    assert main(["train", config]) == 0
    kept = (tmp_path / "run" / "mine.safetensors").read_bytes()
    rename_run(config, "other", 2)
    assert main(["train", config, "--resume"]) == 0
    assert (tmp_path / "run" / "mine.safetensors").read_bytes() == kept
    rename_run(config, "mine", 3)
    assert main(["train", config, "--resume"]) == 2
    assert (tmp_path / "run" / "mine.safetensors").read_bytes() == kept
    rename_run(config, "other", 3)
    assert main(["train", config, "--resume"]) == 0


def test_a_finished_run_under_another_name_can_be_repeated(tmp_path):
    """The name was changed after the last step, so no checkpoint has it."""
    config = write_config(tmp_path, "run", "mine")
    assert main(["train", config]) == 0
    rename_run(config, "other", 1)
    for _ in range(2):
        assert main(["train", config, "--resume"]) == 0
    assert (tmp_path / "run" / "other.safetensors").is_file()
