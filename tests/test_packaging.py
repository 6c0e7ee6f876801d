"""The files that the ComfyUI registry and Manager read."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.comfy
def test_comfyuis_own_parser_reads_every_field_of_our_configuration(comfyui):
    from comfy_config.config_parser import extract_node_configuration

    config = extract_node_configuration(str(ROOT))
    assert config.project.name == "qwen-edit-lora"
    assert "comfyui" not in config.project.name.lower()
    assert config.project.version.count(".") == 2
    assert config.project.license.file == "LICENSE"
    assert config.project.urls.repository.startswith("https://")
    assert config.project.supported_comfyui_version == ">=0.30.0"
    assert config.tool_comfy.publisher_id
    assert config.tool_comfy.display_name == "Qwen Edit LoRA"
    assert config.tool_comfy.icon.endswith("web/icon.svg")
    assert not config.tool_comfy.web  # WEB_DIRECTORY serves the folder; both would serve it twice


def test_files_users_do_not_need_stay_out_of_the_archive():
    ignored = (ROOT / ".comfyignore").read_text(encoding="utf-8").split()
    assert {"tests/", "benchmarks/", "dev.py", "requirements-dev.txt", ".ci/"} <= set(ignored)


def test_files_comfyui_reads_are_in_the_archive():
    """The archive contains what git tracks, minus .comfyignore; new files must be tracked."""
    try:
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs git and a checkout")
    ignored = (ROOT / ".comfyignore").read_text(encoding="utf-8").split()
    kept = {name for name in result.stdout.split("\0") if not name.startswith(tuple(ignored))}
    read = [*(ROOT / "locales").glob("*/*.json"), *(ROOT / "web").rglob("*.md")]
    read += [*(ROOT / "web").glob("*.js"), *(ROOT / "workflows").glob("*.*")]
    assert {path.relative_to(ROOT).as_posix() for path in read} - kept == set()
    assert {"README.md", "LICENSE", "pyproject.toml", "requirements.txt", "__init__.py"} <= kept
