"""`python -m lora_core`, once in its own process, otherwise in this one."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from qwen_edit_lora.lora_core import (
    Adapter,
    LoraWeights,
    compute_delta,
    read_adapter,
    write_adapter,
)
from qwen_edit_lora.lora_core.__main__ import build_parser, main
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2]
PATHS = ("transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The working folder, with a.safetensors and b.safetensors of rank 4."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    for name in "ab":
        modules = {
            path: LoraWeights(torch.randn(4, 32) / 6, torch.randn(32, 4) * 1e-3) for path in PATHS
        }
        write_adapter(Adapter(modules, name=name), tmp_path / f"{name}.safetensors")
    return tmp_path


def get_delta(file: str, path: str = PATHS[0]) -> torch.Tensor:
    return compute_delta(read_adapter(file).modules[path])


@pytest.fixture
def run(capsys):
    """Runs a command line that must succeed; returns its output."""

    def run(*argv: str) -> str:
        assert main(list(argv)) == 0
        out, err = capsys.readouterr()
        assert err == ""
        return out

    return run


def test_it_starts_as_a_module_and_an_error_is_one_line_with_status_2(folder):
    def start(*argv: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "lora_core", *argv],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )

    good = start("inspect", str(folder / "a.safetensors"), "--json")
    assert good.returncode == 0, good.stderr
    assert set(json.loads(good.stdout)["modules"]) == set(PATHS)
    bad = start("inspect", str(folder / "gone.safetensors"))
    assert bad.returncode == 2
    assert bad.stdout == ""
    (line,) = bad.stderr.splitlines()
    assert line.startswith("inspect: gone.safetensors does not exist")


def test_inspect_prints_the_verdict_and_a_table(run):
    text = run("inspect", "a.safetensors", "--exact", "--sort-by", "abs max")
    assert text.startswith("a.safetensors: 2 modules\n")
    assert "2 modules, largest abs max first" in text
    assert "0.attn.to_k" in text
    assert run("inspect", "a.safetensors") != text


def test_inspect_beside_a_base(run, folder):
    base = {f"{path}.weight": torch.randn(32, 32) * 0.02 for path in PATHS}
    save_file({k: t.to(torch.float8_e4m3fn) for k, t in base.items()}, folder / "base.safetensors")
    found = json.loads(run("inspect", "a.safetensors", "--base", "base.safetensors", "--json"))
    assert found["modules"][PATHS[0]]["base"]["storage"] == "float8_e4m3fn"


def test_compare(run):
    assert "cosine 1;" in run("compare", "a.safetensors", "a.safetensors")
    found = json.loads(run("compare", "a.safetensors", "b.safetensors", "--json"))
    assert abs(found["cosine"]) < 0.5


def test_resize(run, capsys):
    text = run("resize", "a.safetensors", "out/small.safetensors", "--rank", "2")
    assert "of the energy kept" in text
    assert "Wrote out/small.safetensors" in text.replace("\\", "/")
    assert {w.rank for w in read_adapter("out/small.safetensors").modules.values()} == {2}
    run("resize", "a.safetensors", "half.safetensors", "--energy", "0.5", "--format", "kohya")
    half = read_adapter("half.safetensors")
    assert half.key_format == "kohya"
    assert all(weights.rank < 4 for weights in half.modules.values())
    assert main(["resize", "a.safetensors", "x.safetensors"]) == 2
    assert "resize: resize got neither rank nor energy" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["c.safetensors", "c:3.safetensors"])
def test_merge_takes_a_strength_behind_each_file(run, folder, name):
    (folder / "b.safetensors").rename(folder / name)
    run("merge", "sum.safetensors", "a.safetensors:-0.5", name)
    expected = get_delta(name) - 0.5 * get_delta("a.safetensors")
    torch.testing.assert_close(get_delta("sum.safetensors"), expected, rtol=1e-4, atol=1e-7)
    run("merge", "sum.safetensors", f"{name}:0.25", "--rank", "2", "--overwrite")
    assert {w.rank for w in read_adapter("sum.safetensors").modules.values()} == {2}


def test_merge_says_what_is_wrong_with_a_strength(capsys):
    assert main(["merge", "sum.safetensors", "a.safetensors:strong"]) == 2
    assert "does not end in a strength; expected a file" in capsys.readouterr().err
    assert not Path("sum.safetensors").exists()


def test_extract_recovers_a_merged_lora(run, folder):
    base = {f"{path}.weight": torch.randn(32, 32) for path in PATHS}
    tuned = {f"{path}.weight": base[f"{path}.weight"] + get_delta("a.safetensors", path)
             for path in PATHS}  # fmt: skip
    save_file(base, folder / "base.safetensors")
    save_file(tuned, folder / "tuned.safetensors")
    run("extract", "base.safetensors", "tuned.safetensors", "found.safetensors", "--rank", "4")
    found, expected = get_delta("found.safetensors"), get_delta("a.safetensors")
    assert (found - expected).norm() / expected.norm() < 1e-3


@pytest.mark.parametrize("key_format", ["comfyui", "kohya", "diffusers", "peft"])
def test_convert_changes_the_keys_alone(run, key_format):
    text = run("convert", "a.safetensors", "converted", "--format", key_format)
    assert "matched 2 modules" in text
    assert torch.equal(get_delta("converted"), get_delta("a.safetensors"))
    assert read_adapter("converted").key_format == key_format


@pytest.mark.parametrize(
    ("out", "file"),
    [
        ("new", "new.safetensors"),
        ("new.v2", "new.v2.safetensors"),
        ("new.safetensors", "new.safetensors"),
        ("new.SFT", "new.SFT"),
    ],
)
def test_a_file_is_written_under_a_name_that_loaders_list(run, folder, out, file):
    text = run("convert", "a.safetensors", out, "--format", "kohya")
    assert (folder / file).is_file()
    assert f"Wrote {file}" in text
    run("resize", "a.safetensors", f"small-{out}", "--rank", "2")
    assert (folder / f"small-{file}").is_file()


@pytest.mark.parametrize("name", ["a\0b.safetensors", "\ud800.safetensors", "x" * 300])
def test_an_impossible_file_name_is_a_one_line_error(name, capsys):
    assert main(["inspect", name]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_json_of_inspect_holds_the_report_of_the_file(run):
    values = json.loads(run("inspect", "a.safetensors", "--json"))
    assert values["report"]["num_modules"] == 2
    assert isinstance(values["report"]["findings"], list)
    assert values["findings"][0]["kind"]


def test_a_wrong_command_line_ends_with_status_2(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["explode"])
    assert stopped.value.code == 2
    assert "invalid choice: 'explode'" in capsys.readouterr().err


def test_every_command_line_in_the_manual_parses():
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    lines = re.findall(r"^python -m lora_core (.*)$", text, re.MULTILINE)
    assert {line.split()[0] for line in lines} == {
        *("inspect", "compare", "resize", "merge", "extract", "convert"),
        *("train", "estimate", "sample"),
    }
    for line in lines:
        assert callable(build_parser().parse_args(shlex.split(line)).run)


# bases of every kind, and adapters in folders


def write_models(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """A base, and the same with a.safetensors merged in."""
    base = {f"{path}.weight": torch.randn(32, 32) for path in PATHS}
    tuned = {key: w + get_delta("a.safetensors", key[: -len(".weight")]) for key, w in base.items()}
    return {"base": base, "tuned": tuned}


def write_gguf(path: Path, tensors: dict[str, torch.Tensor], kind: str = "F32") -> None:
    import gguf

    writer = gguf.GGUFWriter(path, "qwen_image")
    for key, tensor in tensors.items():
        type_ = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(key, gguf.quants.quantize(tensor.numpy(), type_), raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_parts(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    (folder / "transformer").mkdir(parents=True)
    stem = "diffusion_pytorch_model"
    names = {key: f"{stem}-{n:05}-of-00002.safetensors" for n, key in enumerate(tensors, 1)}
    for key, name in names.items():
        save_file({key: tensors[key]}, folder / "transformer" / name)
    index = json.dumps({"weight_map": names})
    (folder / "transformer" / f"{stem}.safetensors.index.json").write_text(index)
    (folder / "transformer" / "config.json").write_text("{}")


@pytest.fixture(params=["a GGUF", "a folder in parts", "a pipeline's folder in parts"])
def write_base(request, folder):
    def write(name: str, tensors: dict[str, torch.Tensor]) -> str:
        if request.param == "a GGUF":
            write_gguf(folder / f"{name}.gguf", tensors)
            return f"{name}.gguf"
        write_parts(folder / name, tensors)
        return name if "pipeline" in request.param else f"{name}/transformer"

    return write


def test_extract_opens_bases_as_training_does(run, folder, write_base):
    models = write_models(folder)
    names = [write_base(name, tensors) for name, tensors in models.items()]
    run("extract", *names, "found.safetensors", "--rank", "4")
    found, expected = get_delta("found.safetensors"), get_delta("a.safetensors")
    assert (found - expected).norm() / expected.norm() < 1e-3


def test_inspect_opens_a_base_as_training_does(run, folder, write_base):
    models = write_models(folder)
    save_file(models["base"], folder / "base.safetensors")
    name = write_base("other", models["base"])
    wanted, found = (
        json.loads(run("inspect", "a.safetensors", "--base", base, "--json"))["modules"]
        for base in ("base.safetensors", name)
    )
    assert found == wanted


def test_a_ggufs_storage_is_called_what_it_is(run, folder):
    write_gguf(folder / "base.gguf", write_models(folder)["base"], "Q8_0")
    found = json.loads(run("inspect", "a.safetensors", "--base", "base.gguf", "--json"))
    assert found["modules"][PATHS[0]]["base"]["storage"] == "GGUF Q8_0"


@pytest.mark.parametrize("name", ["none.safetensors", "a\0b", "x" * 300, "."])
def test_an_invalid_base_is_not_called_a_lora(name, folder, capsys):
    for argv in (
        ["inspect", "a.safetensors", "--base", name],
        ["extract", name, name, "out.safetensors", "--rank", "4"],
    ):
        assert main(argv) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "LoRA" not in line
        assert len(line) <= 400


def test_a_missing_lora_is_called_a_lora_and_a_missing_base_a_model(capsys):
    assert main(["inspect", "none.safetensors"]) == 2
    assert "expected a LoRA" in capsys.readouterr().err
    assert main(["inspect", "a.safetensors", "--base", "none.safetensors"]) == 2
    assert "expected a diffusion model" in capsys.readouterr().err


def test_a_folder_from_the_hub_is_read_by_the_file_that_diffusers_writes(run, folder):
    (folder / "my_edit").mkdir()
    (folder / "a.safetensors").rename(folder / "my_edit" / "pytorch_lora_weights.safetensors")
    assert run("inspect", "my_edit").startswith("my_edit: 2 modules")
    inside = "my_edit/pytorch_lora_weights.safetensors"
    assert run("inspect", inside).startswith("pytorch_lora_weights.safetensors: 2 modules")


def test_a_folder_without_an_adapter_says_what_was_looked_for(folder, capsys):
    (folder / "empty").mkdir()
    assert main(["inspect", "empty"]) == 2
    assert "without adapter_model.safetensors and pytorch_lora_weights" in capsys.readouterr().err


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_base_with_nan_gives_valid_json_and_is_reported(value, run, folder):
    base = write_models(folder)["base"]
    base[f"{PATHS[0]}.weight"][3, 3] = value
    save_file(base, folder / "base.safetensors")
    text = run("inspect", "a.safetensors", "--base", "base.safetensors", "--json")
    found = json.loads(text, parse_constant=pytest.fail)
    assert set(found["modules"]) == {PATHS[1]}
    assert found["skipped"] == {PATHS[0]: "the base's weight holds NaN or Inf"}


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "\ud800"])
def test_an_impossible_name_of_a_file_to_merge_is_a_one_line_error(name, capsys):
    assert main(["merge", "out.safetensors", name, f"{name}:0.5"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


# what a command writes to


@pytest.fixture
def models(folder):
    """base.safetensors and tuned.safetensors."""
    for name, tensors in write_models(folder).items():
        save_file(tensors, folder / f"{name}.safetensors")


def read_all(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "argv",
    [
        ["resize", "a.safetensors", "b.safetensors", "--rank", "2"],
        ["merge", "b.safetensors", "a.safetensors"],
        ["merge", "b", "a.safetensors"],  # OUT forgotten
        ["convert", "a.safetensors", "b"],
        ["extract", "base.safetensors", "tuned.safetensors", "b", "--rank", "2"],
    ],
)
def test_a_file_is_replaced_only_with_overwrite(folder, models, capsys, argv):
    before = read_all(folder)
    assert main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "b.safetensors already exists; " in line
    assert "--overwrite" in line
    assert read_all(folder) == before
    assert main([*argv, "--overwrite"]) == 0
    after = read_all(folder)
    assert {path for path in after if after[path] != before[path]} == {
        str(folder / "b.safetensors")
    }


@pytest.mark.parametrize("out", ["base.safetensors", "tuned.safetensors", "./tuned", "alias"])
@pytest.mark.parametrize("more", [[], ["--overwrite"]])
def test_extract_never_replaces_one_of_its_models(folder, models, capsys, out, more):
    """A LoRA is another kind of file than the model it was taken from, which may exist once."""
    (folder / "alias.safetensors").symlink_to(folder / "base.safetensors")
    kept = read_all(folder)
    argv = ["extract", "base.safetensors", "tuned.safetensors", out, "--rank", "2", *more]
    assert main(argv) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert read_all(folder) == kept


@pytest.mark.parametrize(
    "argv",
    [
        ["resize", "a", "a", "--rank", "2"],
        ["merge", "./a.safetensors", "b.safetensors", "a:0.5"],
        ["convert", "a", "a.safetensors"],
        ["convert", "saved", "saved", "--format", "peft"],
        ["convert", "saved/adapter_model.safetensors", "saved", "--format", "peft"],
        ["extract", "parts", "a", "parts/transformer/diffusion_model", "--rank", "2"],
    ],
)
def test_no_command_replaces_what_it_reads(folder, run, capsys, argv):
    run("convert", "a.safetensors", "saved", "--format", "peft")
    (folder / "parts" / "transformer").mkdir(parents=True)
    save_file({"x": torch.zeros(1)}, folder / "parts/transformer/diffusion_model.safetensors")
    before = read_all(folder)
    assert main([*argv, "--overwrite"]) == 2
    assert "is what is read, or a file in a folder that is" in capsys.readouterr().err
    assert read_all(folder) == before


def test_a_peft_folder_is_replaced_only_with_overwrite(folder, run, capsys):
    run("convert", "a.safetensors", "saved", "--format", "peft")
    assert main(["convert", "b.safetensors", "saved", "--format", "peft"]) == 2
    assert (
        "adapter_model.safetensors; adapter_config.json already exists" in capsys.readouterr().err
    )
    assert torch.equal(get_delta("saved"), get_delta("a.safetensors"))
    run("convert", "b.safetensors", "saved", "--format", "peft", "--overwrite")
    assert torch.equal(get_delta("saved"), get_delta("b.safetensors"))


@pytest.mark.parametrize("out", ["", ".", "..", "new/", "sub/.", ".safetensors", "sub/.sft"])
def test_an_output_that_names_no_file_is_refused(folder, capsys, out):
    """Not a file .safetensors or ..safetensors, which `ls` and ComfyUI hide."""
    (folder / "sub").mkdir()
    before = {path.name for path in folder.rglob("*")}
    assert main(["convert", "a.safetensors", out]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"OUT is {out!r}, which names no file" in line
    assert {path.name for path in folder.rglob("*")} == before


@pytest.mark.parametrize("command", ["inspect", "train", "estimate"])
@pytest.mark.parametrize("given", ["", "."])
def test_a_message_about_the_working_folder_names_it(folder, capsys, command, given):
    assert main([command, given]) == 2
    assert capsys.readouterr().err.startswith(f"{command}: '.' is a folder")
    assert main(["inspect", "a.safetensors", "--base", given]) == 2
    assert capsys.readouterr().err.startswith(f"inspect: {folder.name} ")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_convert_warns_of_nan_and_copies_it(folder, run, bad):
    """Every other command refuses such a file; a converted one must not look like a sound one."""
    weights = LoraWeights(torch.full((4, 32), bad), torch.randn(32, 4))
    write_adapter(Adapter({PATHS[0]: weights}, name="nan"), folder / "nan.safetensors")
    out = run("convert", "nan.safetensors", "out")
    assert "Warning: nan.safetensors holds NaN or Inf in transformer_blocks.0.attn.to_q" in out
    assert torch.equal(read_adapter("out").modules[PATHS[0]].lora_B, weights.lora_B)
    assert "NaN" not in run("convert", "a.safetensors", "sound")
