"""Attack findings: `python -m lora_core` with arguments that lose a file, or end in a traceback."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from demo_base import dit
from qwen_edit_lora.lora_core import Adapter, LoraWeights, write_adapter
from qwen_edit_lora.lora_core.__main__ import main
from safetensors.torch import save_file

PATH = "transformer_blocks.0.attn.to_q"
DEMO_WIDTH = 160  # of the tiny base


def import_tiny():
    """tests/lora_core/training/tiny.py, as the conftest there imports it."""
    if "tiny" not in sys.modules:
        path = Path(__file__).parents[1] / "lora_core" / "training" / "tiny.py"
        spec = importlib.util.spec_from_file_location("tiny", path)
        sys.modules["tiny"] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules["tiny"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The working folder with the LoRAs a and b, and the models base and tuned."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    for name, width in (("a", 32), ("b", 32), ("demo", DEMO_WIDTH)):
        modules = {PATH: LoraWeights(torch.randn(4, width), torch.randn(width, 4))}
        write_adapter(Adapter(modules, name=name), tmp_path / f"{name}.safetensors")
    for name in ("base", "tuned"):
        save_file({f"{PATH}.weight": torch.randn(32, 32)}, tmp_path / f"{name}.safetensors")
    return tmp_path


@pytest.mark.parametrize("out", ["base.safetensors", "tuned.safetensors", "./tuned"])
def test_extract_never_replaces_one_of_its_models(folder, capsys, out):
    """A LoRA is another kind of file than the model it was taken from, which may exist once."""
    kept = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert main(["extract", "base.safetensors", "tuned.safetensors", out, "--rank", "2"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == kept


def test_merge_without_an_output_does_not_replace_the_first_of_two_loras(folder, capsys):
    """`merge a b` forgets OUT: a is taken for it, and replaced by a copy of b."""
    kept = (folder / "a.safetensors").read_bytes()
    main(["merge", "a.safetensors", "b.safetensors"])
    assert (folder / "a.safetensors").read_bytes() == kept


@pytest.mark.parametrize("out", ["", ".", "..", "new/", "sub/."])
def test_an_output_that_names_no_file_is_refused(folder, capsys, out):
    """Not a file .safetensors or ..safetensors, which `ls` and ComfyUI hide."""
    (folder / "sub").mkdir()
    before = {path.name for path in folder.rglob("*")}
    assert main(["convert", "a.safetensors", out]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert {path.name for path in folder.rglob("*")} == before


@pytest.mark.parametrize("command", ["inspect", "train", "estimate"])
@pytest.mark.parametrize("given", ["", "."])
def test_a_message_about_the_working_folder_names_it(folder, capsys, command, given):
    assert main([command, given]) == 2
    assert not capsys.readouterr().err.startswith(f"{command}: is a folder")


@pytest.fixture
def config(folder: Path) -> str:
    """Of four steps on two tiny items."""
    tiny = import_tiny()
    tiny.make_dataset(folder / "data", {k: tiny.make_item(i, (8, 8)) for i, k in enumerate("ab")})
    source = folder / "dit.safetensors"
    dit.write_dit(source, "2511", "bf16")
    (folder / "config.toml").write_text(
        'name = "demo"\noutput = "run"\nsteps = 4\n[model]\ndevice = "cpu"\n'
        f'source = {json.dumps(source.as_posix())}\n[data]\nfolder = "data"\n[lora]\nrank = 4\n'
    )
    return "config.toml"


@pytest.mark.parametrize("every", ["0", "-1"])
def test_log_every_below_1_is_refused_before_the_first_step(folder, config, capsys, every):
    """0 divides by zero at the second step, in the middle of the run."""
    assert main(["train", config, "--log-every", every]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (folder / "run").exists()


@pytest.mark.parametrize(
    "option",
    [
        ("--guidance", "nan"),
        ("--guidance", "inf"),
        ("--strength", "nan"),
        ("--strength", "inf"),
        ("--steps", "-3"),
    ],
)
def test_an_option_of_sample_outside_its_range_is_refused_in_one_line(
    folder, config, capsys, option
):
    """JSON and TOML settings of the same names are checked; these go straight to the sampler."""
    arguments = ["sample", config, "out", "--items", "a", "--adapter", "demo.safetensors"]
    assert main([*arguments, *option]) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1
    assert option[0].strip("-") in err[0]
    assert not list(folder.glob("out/*"))


def test_sample_with_a_lora_of_another_width_is_refused_in_one_line(folder, config, capsys):
    assert main(["sample", config, "out", "--items", "a", "--adapter", "a.safetensors"]) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1
    assert "a.safetensors" in err[0]


def test_sample_replaces_no_image_that_it_did_not_write(folder, config, capsys):
    """An item's key is its target's name: in the folder of the pairs, the target is replaced."""
    (folder / "target").mkdir()
    for name in ("a.png", "a.safetensors"):
        (folder / "target" / name).write_bytes(b"a photograph")
    main(["sample", config, "target", "--items", "a", "--steps", "1"])
    for name in ("a.png", "a.safetensors"):
        assert (folder / "target" / name).read_bytes() == b"a photograph"


def test_convert_says_that_a_lora_holds_nan(folder, capsys):
    """Every other command refuses such a file; the converted one looks like a new, sound one."""
    weights = LoraWeights(torch.full((4, 32), float("nan")), torch.randn(32, 4))
    write_adapter(Adapter({PATH: weights}, name="nan"), folder / "nan.safetensors")
    main(["convert", "nan.safetensors", "out"])
    out, err = capsys.readouterr()
    assert "NaN" in out + err
