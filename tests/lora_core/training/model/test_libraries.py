"""diffusers missing or broken: a clear error, and everything that does not need it works."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from demo_base import adapters, dit
from qwen_edit_lora.lora_core import ConfigError
from qwen_edit_lora.lora_core.training.model import libraries
from qwen_edit_lora.lora_core.training.model.libraries import HIDDEN, import_from_diffusers
from tiny import make_dataset

ROOT = Path(__file__).resolve().parents[4]
#: What diffusers does if it finds an unsupported version of another package.
BROKEN = "raise RuntimeError('Failed to import diffusers.models\\nbecause of torchao')\n"


@pytest.fixture
def broken(tmp_path):
    """The environment of a process in which diffusers and similar packages cannot be imported."""
    for name in ("diffusers", "accelerate", "peft", "bitsandbytes"):
        (tmp_path / "broken" / name).mkdir(parents=True)
        (tmp_path / "broken" / name / "__init__.py").write_text(BROKEN)
    return {**os.environ, "PYTHONPATH": str(tmp_path / "broken")}


@pytest.fixture
def misfit(tmp_path):
    """One in which everything that diffusers imports wherever it finds it fails to import."""
    for name in HIDDEN:
        (tmp_path / "misfit" / name).mkdir(parents=True)
        (tmp_path / "misfit" / name / "__init__.py").write_text(BROKEN)
    return {**os.environ, "PYTHONPATH": str(tmp_path / "misfit")}


@pytest.fixture
def config(tmp_path):
    """The file of a short training on the CPU."""
    make_dataset(tmp_path / "data")
    dit.write_dit(tmp_path / "dit.safetensors", "2511", "fp32")
    path = tmp_path / "config.toml"
    path.write_text(
        'name = "a"\noutput = "run"\nsteps = 1\n[model]\nsource = "dit.safetensors"\n'
        'device = "cpu"\n[data]\nfolder = "data"\n'
    )
    return path


def run(environment, *command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lora_core", *map(str, command)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_missing_diffusers_is_an_error_with_its_install_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ConfigError, match=r"not installed; run pip install .*diffusers>=0\.35"):
        import_from_diffusers("QwenImageTransformer2DModel")


def test_a_diffusers_that_is_too_old_is_a_clear_error():
    with pytest.raises(ConfigError, match=r"cannot be used \(.*NoSuchModel.*\); run pip install"):
        import_from_diffusers("NoSuchModel")


def test_training_with_a_broken_diffusers_is_a_one_line_error(broken, config, tmp_path):
    result = run(broken, "train", config)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert "cannot be used (Failed to import diffusers.models because of torchao)" in result.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_packages_that_diffusers_cannot_import_do_not_stop_a_training(misfit, config, tmp_path):
    result = run(misfit, "train", config)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run" / "a.safetensors").is_file()


def test_what_was_hidden_from_diffusers_is_there_again(monkeypatch):
    monkeypatch.delitem(sys.modules, "scipy", raising=False)
    seen = []
    monkeypatch.setattr(
        libraries.importlib, "import_module", lambda name: seen.append(sys.modules["scipy"])
    )
    libraries.import_diffusers_alone()
    assert seen == [None]  # None has no attributes: a failure ends it, as it should
    assert "scipy" not in sys.modules


def test_a_broken_diffusers_does_not_affect_inspecting(broken, tmp_path):
    lora = adapters.make_adapter(tmp_path / "lora.safetensors", dit.list_lora_targets())
    result = run(broken, "inspect", lora)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("lora.safetensors: 24 modules")


IMPORT_NODES = """
import asyncio, importlib.util, sys
from pathlib import Path

root, comfyui = map(Path, sys.argv[1:])
sys.path.insert(0, str(comfyui))
from comfy.cli_args import args
args.cpu = True
spec = importlib.util.spec_from_file_location(
    "qwen_edit_lora", root / "__init__.py", submodule_search_locations=[str(root)]
)
sys.modules["qwen_edit_lora"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
extension = asyncio.run(module.comfy_entrypoint())
print("nodes:", *(node.define_schema().node_id for node in asyncio.run(extension.get_node_list())))
"""


@pytest.mark.comfy
def test_a_broken_diffusers_does_not_affect_the_nodes(broken, comfyui_path):
    result = subprocess.run(
        [sys.executable, "-c", IMPORT_NODES, ROOT, comfyui_path],
        cwd=comfyui_path,
        env=broken,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "nodes: QwenEditLoraLoad QwenEditLoraApply" in result.stdout
