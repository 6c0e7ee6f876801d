"""A run whose files have names that are taken in its folder: nothing of the user's is replaced."""

from __future__ import annotations

import json
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
