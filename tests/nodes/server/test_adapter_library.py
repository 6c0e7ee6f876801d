"""The adapters in ComfyUI's own loras folders: the host side, and the routes over HTTP."""

from __future__ import annotations

import json
import shutil
import time
import urllib.error
from pathlib import Path

import pytest
import torch
from demo_base.adapters import make_adapter
from qwen_edit_lora.lora_core import FileError
from safetensors.torch import save_file

pytestmark = pytest.mark.comfy

ADAPTERS = "/qwen_edit_lora/adapters"
MODULES = {"transformer_blocks.0.attn.to_q": (32, 32), "transformer_blocks.1.attn.to_q": (32, 32)}
TIMEOUT = 90.0  # seconds


@pytest.fixture(scope="module")
def folder(demo_models):
    """This test's own folder inside models/loras."""
    folder = demo_models.root / "loras" / "library"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


def find(adapters: list[dict], name: str) -> dict:
    (found,) = (a for a in adapters if a["name"] == str(Path("library", name)))
    return found


def test_every_file_of_the_loras_folders_is_found_under_the_loaders_name(ours, folder, demo_models):
    make_adapter(folder / "named.safetensors", MODULES)
    (folder / "pickle.pt").write_bytes(b"\x80\x02")
    found = ours.host.find_lora_files()
    assert found[str(Path("library", "named.safetensors"))] == folder / "named.safetensors"
    assert str(Path("library", "pickle.pt")) in found
    assert {name for name in found if name.endswith(".safetensors")} == set(ours.host.list_loras())
    assert demo_models.lora in found.values()


@pytest.mark.parametrize("file", ["short.sft", "loud.SAFETENSORS", "mixed.Sft"])
def test_every_ending_that_loads_is_listed(file, ours, folder, comfyui):
    make_adapter(folder / "plain.safetensors", MODULES)
    (folder / "plain.safetensors").rename(folder / file)
    name = str(Path("library", file))
    comfyui.folder_paths.filename_list_cache.clear()
    assert name in ours.host.list_loras()
    assert ours.host.find_lora(name) == folder / file
    assert ours.host.find_lora_files()[name] == folder / file


def test_a_name_from_windows_is_found(ours, folder, comfyui):
    make_adapter(folder / "named.safetensors", MODULES)
    comfyui.folder_paths.filename_list_cache.clear()
    assert ours.host.find_lora("library\\named.safetensors") == folder / "named.safetensors"


@pytest.mark.parametrize(
    "name",
    [None, "", 5, ["a"], "..\\a.safetensors", "a\0b", "\ud800", "x" * 5000, "C:\\a.safetensors"],
    ids=repr,
)
def test_an_invalid_name_of_a_lora_is_refused_with_a_message(name, ours):
    with pytest.raises(FileError) as error:
        ours.host.find_lora(name)
    assert len(str(error.value)) <= 400
    assert str(error.value).isprintable()


@pytest.mark.parametrize("name", ["a\0b", "loras/\ud800", "../../a", "a/../../b"])
def test_a_name_that_cannot_be_saved_is_refused_with_a_message(name, ours):
    with pytest.raises(FileError) as error:
        ours.host.choose_output_path(name)
    assert len(str(error.value)) <= 400
    assert str(error.value).isprintable()


def test_the_routes_list_judge_and_describe_without_a_path(server, folder, base_directory):
    metadata = {"modelspec.architecture": "Qwen-Image-Edit-2511/lora", "note": "<b>hello</b>"}
    make_adapter(folder / "good.safetensors", MODULES, rank=4, metadata=metadata)
    save_file({"lora_te_x.lora_down.weight": torch.zeros(1, 1)}, folder / "text.safetensors")
    deadline = time.monotonic() + TIMEOUT
    while (answer := server.get(ADAPTERS))["pending"]:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    good = find(answer["adapters"], "good.safetensors")
    assert (good["ranks"], good["variants"]) == ([4], ["2511"])
    assert good["health"]["level"] == "healthy"
    assert find(answer["adapters"], "text.safetensors")["state"] == "other model"
    details = server.get(f"{ADAPTERS}/{good['id']}")
    assert details["sentences"] == [good["health"]["sentence"]]
    assert {"key": "note", "value": "<b>hello</b>", "num_chars": 12} in details["metadata"]
    assert str(base_directory) not in json.dumps([answer, details])
    cache = base_directory / "user" / "__qwen_edit_lora" / "adapters.json"
    assert good["name"] in json.loads(cache.read_text(encoding="utf-8"))["adapters"]


@pytest.mark.parametrize(
    ("adapter_id", "status", "sentence"),
    [
        ("0123456789abcdef", 404, "reload the list"),
        ("my_lora.safetensors", 400, "is not an adapter id"),
        ("..%2f..%2fuser", 400, "is not an adapter id"),
        ("%2fetc%2fpasswd", 400, "is not an adapter id"),
    ],
)
def test_an_invalid_id_is_refused_with_a_message(server, adapter_id, status, sentence):
    with pytest.raises(urllib.error.HTTPError) as refused:
        server.get(f"{ADAPTERS}/{adapter_id}")
    assert refused.value.code == status
    assert sentence in json.loads(refused.value.read())["error"]


def test_only_reading_is_offered(server):
    with pytest.raises(urllib.error.HTTPError) as refused:
        server.post(ADAPTERS, {})
    assert refused.value.code == 405
