"""Builds the throw-away base directory (ComfyUI's --base-directory) of the demo and the tests."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from .pairs import write_pairs

HERE = Path(__file__).resolve().parent
EXTENSION_NAME = "qwen-edit-lora"
#: Folder -> its name in custom_nodes: after ours in the alphabet, as ours must import without them.
SHIMS = {"shim": "zz_tiny_qwen", "shim_21": "zz_tiny_qwen_21"}
IMAGE_NAME = "example.png"
LORA_NAME = "my_edit_lora.safetensors"  # as in generate.py, which needs ComfyUI to import
PAIRS_NAME = "my_pairs"  # a folder to train on
NOT_SHIPPED = ("tests", "benchmarks")
FOLDERS = ("custom_nodes", "models", "input", "output", "temp", "user")
GENERATOR_SOURCES = ("dit.py", "generate.py")


def make_base_directory(target: Path | str, repo_root: Path | str) -> Path:
    """Makes or refreshes everything but the models, which `make_models` adds."""
    target, repo_root = Path(target), Path(repo_root)
    for name in FOLDERS:
        (target / name).mkdir(parents=True, exist_ok=True)
    install_extension(target / "custom_nodes" / EXTENSION_NAME, repo_root)
    for folder, name in SHIMS.items():
        install(HERE / folder, target / "custom_nodes" / name)
    write_example_image(target / "input" / IMAGE_NAME)
    write_pairs(target / "input" / PAIRS_NAME, HERE / "photo.jpg")
    return target


def install_extension(folder: Path, repo_root: Path) -> None:
    """Installs what users get into an extension folder, one link per top-level file and folder.

    Not one link to the checkout: a base directory inside the checkout would then contain itself.
    """
    folder.mkdir(exist_ok=True)
    shipped = {
        source.name: source
        for source in repo_root.iterdir()
        if not source.name.startswith((".", "__pycache__")) and source.name not in NOT_SHIPPED
    }
    for installed in folder.iterdir():
        if installed.name not in shipped:
            remove(installed)
    for name, source in shipped.items():
        install(source, folder / name)


def install(source: Path, target: Path) -> None:
    """Links a file or folder, or copies it if links are not allowed (Windows)."""
    remove(target)
    try:
        target.symlink_to(source, target_is_directory=source.is_dir())
    except OSError:
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, target)


def remove(path: Path) -> None:
    """Deletes a link, file or folder of the base directory; never what a link points to."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir():
        shutil.rmtree(path)


def write_example_image(path: Path) -> None:
    """Writes the demo photograph as the PNG file that the workflows name."""
    from PIL import Image  # here, so that the module needs no more than Python itself

    source = HERE / "photo.jpg"
    if not path.exists() or path.stat().st_mtime < source.stat().st_mtime:
        Image.open(source).save(path)


def make_models(models: Path | str, python: Path | str, comfyui_path: Path | str) -> Path:
    """Generates the demo base in its own process, unless it exists and is up to date.

    Its own process, since generating imports ComfyUI, which neither the demo nor pytest should.
    """
    models = Path(models)
    stamp = models / "demo_base.stamp"
    sources = describe_sources()
    if stamp.is_file() and stamp.read_text() == sources:
        return models
    subprocess.run(
        [str(python), "-m", "demo_base.generate", str(models.resolve())],
        cwd=HERE.parent,
        env={**os.environ, "COMFYUI_PATH": str(comfyui_path)},
        check=True,
    )
    stamp.write_text(sources)
    return models


def write_public_lora(loras: Path, workflow: dict[str, Any]) -> None:
    """Gives the demo LoRA the name of the public one that the workflow starts with.

    As the tiny base has the name of the official one: the workflow runs as a user opens it.
    """
    for node in workflow["nodes"]:
        if node["type"] == "QwenEditLoraLoad":
            target = loras / node["widgets_values"][0]
            if not target.exists():
                shutil.copyfile(loras / LORA_NAME, target)


def describe_sources() -> str:
    """The sources of the demo base: one line of name and hash per file."""
    files = [HERE / name for name in GENERATOR_SOURCES]
    files += sorted((HERE / "weights").glob("*.safetensors"))
    return "".join(f"{hashlib.sha256(f.read_bytes()).hexdigest()} {f.name}\n" for f in files)
