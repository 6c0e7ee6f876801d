"""Attack findings: a training whose name is that of a file that is already in its folder."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from demo_base import dit
from qwen_edit_lora.lora_core.__main__ import main


def import_tiny():
    """tests/lora_core/training/tiny.py, as the conftest there imports it."""
    if "tiny" not in sys.modules:
        path = Path(__file__).parents[1] / "lora_core" / "training" / "tiny.py"
        spec = importlib.util.spec_from_file_location("tiny", path)
        sys.modules["tiny"] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules["tiny"]


def write_config(folder: Path, output: str, name: str) -> str:
    tiny = import_tiny()
    tiny.make_dataset(folder / "data", {k: tiny.make_item(i, (8, 8)) for i, k in enumerate("ab")})
    dit.write_dit(folder / "base.safetensors", "2511", "bf16")
    path = folder / "config.toml"
    path.write_text(
        f'name = "{name}"\noutput = "{output}"\nsteps = 1\n[model]\ndevice = "cpu"\n'
        f"source = {json.dumps((folder / 'base.safetensors').as_posix())}\n"
        '[data]\nfolder = "data"\n[lora]\nrank = 2\n'
    )
    return str(path)


def test_a_training_never_replaces_its_own_base_model(tmp_path, capsys):
    """output = "." and the base's own name: the adapter would be written over the model."""
    config = write_config(tmp_path, ".", "base")
    kept = (tmp_path / "base.safetensors").read_bytes()
    main(["train", config])
    assert (tmp_path / "base.safetensors").read_bytes() == kept


@pytest.mark.parametrize("name", ["mine.safetensors", "mine_ema.safetensors"])
def test_a_new_training_replaces_no_lora_that_is_in_its_folder(tmp_path, capsys, name):
    """There is no run in the folder, only a LoRA of the name: it is the user's."""
    config = write_config(tmp_path, "run", "mine")
    text = Path(config).read_text() + "[optimizer]\nema_decay = 0.9\n"
    Path(config).write_text(text)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_bytes(b"of another training")
    main(["train", config])
    assert (tmp_path / "run" / name).read_bytes() == b"of another training"
