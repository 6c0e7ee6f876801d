"""`python -m lora_core train`, `sample` and `estimate` on the demo base's files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from demo_base import dit
from qwen_edit_lora.lora_core import Adapter, LoraWeights, read_adapter, write_adapter
from qwen_edit_lora.lora_core.__main__ import main
from qwen_edit_lora.lora_core.training.run.metrics import read_metrics
from safetensors.torch import load_file
from tiny import make_dataset, make_item

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def write_config(tmp_path):
    """Writes config.toml for a tiny file of that variant and storage and a set of two items."""
    make_dataset(tmp_path / "data", {k: make_item(i, (8, 8)) for i, k in enumerate("ab")})

    def write(steps: int = 4, variant: str = "2511_bf16", **model: str) -> str:
        source = tmp_path / f"{variant}.safetensors"
        if not source.exists():
            dit.write_dit(source, *variant.split("_", 1))
        model = {"source": source.as_posix(), "device": "cpu", **model}
        lines = [f"{name} = {json.dumps(value)}" for name, value in model.items()]
        path = tmp_path / "config.toml"
        path.write_text(
            f'name = "demo"\noutput = "run"\nsteps = {steps}\n[model]\n'
            + "\n".join(lines)
            + '\n[data]\nfolder = "data"\n[lora]\nrank = 4\n'
            + "[saving]\ncheckpoint_every = 2\n[optimizer]\nema_decay = 0.9\n"
        )
        return str(path)

    return write


def test_train_writes_an_adapter_with_descriptive_metadata(write_config, tmp_path, capsys):
    assert main(["train", write_config()]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("step 1/4  loss ")
    assert err.splitlines()[-1].startswith("train: wrote ")
    path = tmp_path / "run" / "demo.safetensors"
    assert "left out transformer_blocks.1.attn.to_add_out; " in err
    adapter = read_adapter(path)
    assert adapter.metadata["modelspec.architecture"] == "Qwen-Image-Edit-2511/lora"
    assert {weights.rank for weights in adapter.modules.values()} == {4}
    num_parameters = sum(4 * sum(weights.shape) for weights in adapter.modules.values())
    assert (
        f"train: {len(adapter.modules)} modules, {num_parameters:,} parameters; the adapter's file "
        f"will take {path.stat().st_size:,} bytes"
    ) in err


def test_train_again_is_refused_in_one_line_and_with_resume_goes_on(write_config, capsys):
    assert main(["train", write_config(2), "--json"]) == 0
    reports = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [report["step"] for report in reports] == [1, 2]
    assert main(["train", write_config(4)]) == 2
    assert capsys.readouterr().err == (
        "train: run already holds a run up to step 2; resume it, or choose another output folder\n"
    )
    assert main(["train", write_config(4), "--resume", "--json"]) == 0
    reports = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [report["step"] for report in reports] == [3, 4]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"source": "nothing.safetensors"}, "nothing.safetensors does not exist"),
        ({"device": "cuda:77"}, "the device 'cuda:77' does not exist"),
        ({"storage": "fp4"}, "config.toml: [model] storage is 'fp4'; expected one of"),
    ],
)
def test_files_that_cannot_be_opened_are_a_one_line_error(write_config, capsys, model, message):
    assert main(["train", write_config(**model)]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err


def test_sample_follows_the_adapter_and_its_strength(write_config, tmp_path, capsys):
    config = write_config(variant="2509_fp32")
    assert main(["train", config]) == 0
    adapter = str(tmp_path / "run" / "demo.safetensors")
    samples = {}
    for name, options in {
        "base": [],
        "zero": ["--adapter", adapter, "--strength", "0"],
        "trained": ["--adapter", adapter],
    }.items():
        folder = tmp_path / name
        command = ["sample", config, str(folder), "--steps", "3", "--items", "b", *options]
        assert main(command) == 0
        assert [path.name for path in folder.iterdir()] == ["b.safetensors"]
        samples[name] = load_file(folder / "b.safetensors")["samples"]
    assert samples["base"].shape == (1, 16, 1, 8, 8)
    assert torch.equal(samples["zero"], samples["base"])
    assert not torch.allclose(samples["trained"], samples["base"], atol=1e-6)


def test_sample_decodes_with_the_vae_of_comfyuis_file(write_config, demo_models, tmp_path):
    from PIL import Image

    config = write_config(vae=demo_models.vae.as_posix())
    assert main(["sample", config, str(tmp_path / "out"), "--steps", "2"]) == 0
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["a.png", "a.safetensors", "b.png", "b.safetensors"]
    assert Image.open(tmp_path / "out" / "a.png").size == (64, 64)


def test_an_unknown_item_is_a_one_line_error(write_config, tmp_path, capsys):
    assert main(["sample", write_config(), str(tmp_path / "out"), "--items", "c"]) == 2
    assert "the training set has no item 'c'; it has a" in capsys.readouterr().err


def test_sharding_by_accelerate_is_refused_in_one_line(write_config, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # set by `accelerate launch --use_fsdp`
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert main(["train", write_config()]) == 2
    assert "train: FSDP version 1 would shard the LoRAs" in capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt", reason="sends a signal")
def test_a_terminated_run_saves_its_step_and_says_how_to_go_on(write_config, tmp_path):
    command = [sys.executable, "-m", "lora_core", "train", write_config(100_000), "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        process.stdout.readline()
        time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    last = list(read_metrics(tmp_path / "run" / "metrics.jsonl"))[-1]["step"]
    assert err.splitlines()[-1] == f"train: stopped after step {last}; --resume continues"
    assert (tmp_path / "run" / "checkpoints" / f"step_{last:08d}").is_dir()


@pytest.mark.skipif(os.name == "nt", reason="needs a shell's ulimit")
def test_a_full_disk_is_a_one_line_error_and_the_run_can_be_resumed(write_config, tmp_path, capsys):
    assert main(["train", write_config(2)]) == 0
    limited = ["bash", "-c", 'ulimit -f 16 && exec "$@"', "bash", sys.executable]
    result = subprocess.run(
        [*limited, "-m", "lora_core", "train", write_config(4), "--resume"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    last = result.stderr.splitlines()[-1]
    assert last.startswith("train: the checkpoint of step 4 cannot be written: ")
    assert last.endswith("File too large (os error 27); the last good one is of step 2.")
    checkpoints = tmp_path / "run" / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["step_00000002"]

    assert main(["train", write_config(4), "--resume"]) == 0
    mended = load_file(tmp_path / "run" / "demo.safetensors")
    (tmp_path / "run").rename(tmp_path / "mended")
    assert main(["train", write_config(4)]) == 0
    whole = load_file(tmp_path / "run" / "demo.safetensors")
    assert all(torch.equal(mended[key], tensor) for key, tensor in whole.items())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: d.pop("transformer_blocks.1.attn.to_q.weight"), "lacks 1 of "),
        (lambda d: d.update({"extra.weight": torch.zeros(2)}), "holds 1 tensors that a "),
        (lambda d: d["proj_out.bias"].fill_(torch.nan), "proj_out.bias"),
        (lambda d: d.update({"proj_out.weight": torch.zeros(64, 3)}), "proj_out.weight is (64, 3)"),
    ],
    ids=["missing tensor", "another architecture", "NaN", "another shape"],
)
def test_a_wrong_model_is_a_one_line_error_and_the_output_folder_stays_usable(
    write_config, tmp_path, capsys, spoil, message
):
    state_dict = dit.make_dit("2511")
    spoil(state_dict)
    dit.write_dit(tmp_path / "wrong.safetensors", "2511", "fp32", state_dict)
    config = write_config(source=(tmp_path / "wrong.safetensors").as_posix())
    assert main(["train", config]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err
    assert main(["train", write_config()]) == 0


def test_a_broken_training_set_is_a_one_line_error(write_config, tmp_path, capsys):
    config = write_config()
    item = tmp_path / "data" / "items" / "a.safetensors"
    item.write_bytes(item.read_bytes()[:200])
    assert main(["train", config]) == 2
    out, err = capsys.readouterr()
    assert out.count("\n") <= 1  # the other item may have come first
    assert "train: a.safetensors " in err.splitlines()[-1]


@pytest.mark.parametrize("every", ["0", "-1"])
def test_log_every_below_1_is_refused_before_the_first_step(write_config, tmp_path, capsys, every):
    """0 would divide by zero at the second step, in the middle of the run."""
    assert main(["train", write_config(), "--log-every", every]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--log-every is {every}; expected 1 or more" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--guidance", "nan"),
        ("--guidance", "inf"),
        ("--strength", "nan"),
        ("--strength", "inf"),
        ("--strength", "-inf"),
        ("--steps", "0"),
        ("--steps", "-3"),
    ],
)
def test_an_option_of_sample_outside_its_range_is_refused_in_one_line(
    write_config, tmp_path, capsys, option, value
):
    out = tmp_path / "out"
    assert main(["sample", write_config(), str(out), f"{option}={value}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{option} is {value}; expected " in line
    assert not out.exists()


def test_sample_with_a_lora_of_another_width_is_refused_in_one_line(write_config, tmp_path, capsys):
    weights = LoraWeights(torch.randn(4, 32), torch.randn(32, 4))
    adapter = Adapter({"transformer_blocks.0.attn.to_q": weights}, name="wide")
    write_adapter(adapter, tmp_path / "wide.safetensors")
    more = ["--adapter", str(tmp_path / "wide.safetensors")]
    assert main(["sample", write_config(), str(tmp_path / "out"), *more]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "wide.safetensors does not fit the model: transformer_blocks.0.attn.to_q is " in line


def test_sample_replaces_files_only_with_overwrite(write_config, tmp_path, capsys):
    """An item's key is its target's name: in the folder of the pairs, the target has it too."""
    folder = tmp_path / "target"
    folder.mkdir()
    for name in ("a.png", "a.safetensors"):
        (folder / name).write_bytes(b"a photograph")
    command = ["sample", write_config(), str(folder), "--steps", "1"]
    assert main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "a.safetensors already exists; " in line
    assert [path.read_bytes() for path in sorted(folder.iterdir())] == [b"a photograph"] * 2
    assert main([*command, "--overwrite"]) == 0
    assert (folder / "a.png").read_bytes() == b"a photograph"  # there is no VAE
    assert load_file(folder / "a.safetensors")["samples"].shape == (1, 16, 1, 8, 8)


def test_sample_never_replaces_the_adapter_it_applies(write_config, tmp_path, capsys):
    config = write_config()
    assert main(["train", config]) == 0
    adapter = (tmp_path / "run" / "demo.safetensors").rename(tmp_path / "run" / "a.safetensors")
    kept = adapter.read_bytes()
    command = ["sample", config, str(tmp_path / "run"), "--adapter", str(adapter), "--steps", "1"]
    assert main([*command, "--overwrite"]) == 2
    assert "a.safetensors is what is read" in capsys.readouterr().err
    assert adapter.read_bytes() == kept
