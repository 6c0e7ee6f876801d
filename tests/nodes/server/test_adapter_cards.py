"""What a LoRA's card shows over HTTP: its preview, the training that made it, and its star."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from demo_base.adapters import make_adapter
from PIL import Image

pytestmark = pytest.mark.comfy

ADAPTERS, JOBS = "/qwen_edit_lora/adapters", "/qwen_edit_lora/jobs"
MODULES = {"transformer_blocks.0.attn.to_q": (32, 32), "transformer_blocks.1.attn.to_q": (32, 32)}
CONFIG = {"qwen_edit_lora.config": "{}"}


@pytest.fixture
def loras(demo_models: Any, routes: Any) -> Iterator[Path]:
    """The folder served, without the files that a test adds."""
    folder = demo_models.root / "loras"
    before = set(folder.iterdir())
    yield folder
    for path in set(folder.iterdir()) - before:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def find(routes: Any, name: str) -> dict[str, Any]:
    entries = routes.ask("GET", ADAPTERS).read()["adapters"]
    (found,) = (entry for entry in entries if entry["name"] == name)
    return routes.ask("GET", f"{ADAPTERS}/{found['id']}").read()


def show_preview(routes: Any, name: str) -> Any:
    return routes.ask("GET", f"{ADAPTERS}/{find(routes, name)['id']}/preview")


@pytest.fixture
def sampled(routes: Any, job_id: str) -> str:
    """The job with two samples, the newest one blue."""
    folder = routes.store.catalog.find(job_id)
    folder.samples.mkdir()
    Image.new("RGB", (8, 8), "red").save(folder.samples / "step_00000002_item.png")
    Image.new("RGB", (8, 8), "blue").save(folder.samples / "step_00000004_item.png")
    return job_id


def test_a_preview_beside_the_file_is_sent_small(routes, loras):
    make_adapter(loras / "seen.safetensors", MODULES)
    Image.new("RGB", (1200, 600), "green").save(loras / "seen.preview.png")
    entry = find(routes, "seen.safetensors")
    assert len(entry["preview"]) == 16
    answer = show_preview(routes, "seen.safetensors")
    assert (answer.status, answer.headers["Content-Type"]) == (200, "image/jpeg")
    assert Image.open(io.BytesIO(answer.body)).size == (320, 160)
    assert len(answer.body) < 20_000


@pytest.mark.parametrize("content", [b"<script>alert(1)</script>", b"\x89PNG\r\n\x1a\n", b"GIF89a"])
def test_what_is_no_image_is_refused_in_a_sentence(content, routes, loras, tmp_path):
    make_adapter(loras / "fake.safetensors", MODULES)
    (loras / "fake.png").write_bytes(content)
    answer = show_preview(routes, "fake.safetensors")
    assert answer.status == 404
    assert "preview cannot be shown" in answer.sentence
    assert str(loras) not in answer.sentence
    assert b"script" not in answer.body


def test_a_link_that_replaces_a_preview_is_not_followed(routes, loras, tmp_path, monkeypatch):
    from qwen_edit_lora.lora_core.library import companions

    Image.new("RGB", (8, 8)).save(tmp_path / "outside.png")
    make_adapter(loras / "swapped.safetensors", MODULES)
    (loras / "swapped.png").symlink_to(tmp_path / "outside.png")
    assert find(routes, "swapped.safetensors")["preview"] == ""
    assert show_preview(routes, "swapped.safetensors").status == 404
    # as when it is put there just after the folder was listed
    monkeypatch.setattr(companions, "list_names", lambda folder: {"swapped.png": "swapped.png"})
    assert show_preview(routes, "swapped.safetensors").status == 404


def test_the_newest_sample_is_the_preview_of_a_lora_trained_here(routes, loras, sampled):
    metadata = {**CONFIG, "qwen_edit_lora.job": sampled}
    make_adapter(loras / "made.safetensors", MODULES, metadata=metadata)
    entry = find(routes, "made.safetensors")
    assert (entry["is_trained_here"], entry["has_job"]) == (True, True)
    pixels = Image.open(io.BytesIO(show_preview(routes, "made.safetensors").body))
    assert pixels.getpixel((4, 4))[2] > 200  # blue
    Image.new("RGB", (8, 8), "green").save(loras / "made.png")
    pixels = Image.open(io.BytesIO(show_preview(routes, "made.safetensors").body))
    assert pixels.getpixel((4, 4))[2] < 50  # a file put there on purpose goes first


def test_only_a_lora_of_a_job_of_this_machine_is_trained_here(routes, loras, job_id):
    other = {**CONFIG, "qwen_edit_lora.job": "20260131-120000-0123abcd"}
    resized = {**CONFIG, "qwen_edit_lora.job": job_id, "qwen_edit_lora.history": "[]"}
    hostile = {**CONFIG, "qwen_edit_lora.job": "../../x"}
    made = {**CONFIG, "qwen_edit_lora.job": job_id}
    files = {"demo": CONFIG, "other": other, "resized": resized, "odd": hostile, "made": made}
    for name, metadata in files.items():
        make_adapter(loras / f"{name}.safetensors", MODULES, metadata=metadata)
    shown = {name: find(routes, f"{name}.safetensors")["is_trained_here"] for name in files}
    assert shown == {**dict.fromkeys(files, False), "made": True}
    assert all(find(routes, f"{name}.safetensors")["is_ours"] for name in files)
    # its training may be deleted, which does not undo that
    assert routes.post(f"{JOBS}/{job_id}/delete").status == 200
    entry = find(routes, "made.safetensors")
    assert (entry["is_trained_here"], entry["has_job"]) == (True, False)


def test_sidecars_are_shown_with_the_details(routes, loras):
    make_adapter(loras / "noted.safetensors", MODULES)
    values = {"activation text": "restore", "notes": "<b>mine</b>"}
    (loras / "noted.json").write_text(json.dumps(values))
    (loras / "noted.civitai.info").write_text("{")
    beside = find(routes, "noted.safetensors")["beside"]
    assert (beside["trigger_words"], beside["notes"]) == (["restore"], "<b>mine</b>")
    assert (beside["files"], beside["has_link"]) == (["noted.json"], False)
    assert len(beside["problems"]) == 1


def test_a_star_is_kept_by_the_server_for_every_page(routes, loras):
    make_adapter(loras / "star.safetensors", MODULES)
    entry = find(routes, "star.safetensors")
    assert entry["is_favourite"] is False
    answer = routes.post(f"{ADAPTERS}/{entry['id']}/favourite", {"favourite": True})
    assert answer.read()["is_favourite"] is True
    assert find(routes, "star.safetensors")["is_favourite"] is True
    routes.post(f"{ADAPTERS}/{entry['id']}/favourite", {"favourite": False})
    assert find(routes, "star.safetensors")["is_favourite"] is False


@pytest.mark.parametrize(
    ("body", "status", "sentence"),
    [
        ({"favourite": "yes"}, 400, "expected true or false"),
        ({}, 400, "expected true or false"),
        (b"[]", 400, "expected a JSON object"),
    ],
)
def test_an_invalid_star_is_refused(body, status, sentence, routes, loras):
    make_adapter(loras / "star.safetensors", MODULES)
    entry = find(routes, "star.safetensors")
    answer = routes.post(f"{ADAPTERS}/{entry['id']}/favourite", body)
    assert answer.status == status
    assert sentence in answer.sentence


def test_another_sites_page_cannot_star(routes, loras):
    make_adapter(loras / "star.safetensors", MODULES)
    entry = find(routes, "star.safetensors")
    headers = {"Origin": "https://evil.example"}
    path = f"{ADAPTERS}/{entry['id']}/favourite"
    assert routes.post(path, {"favourite": True}, **headers).status == 403
    assert find(routes, "star.safetensors")["is_favourite"] is False


@pytest.mark.parametrize("adapter_id", ["0123456789abcdef", "../x", "x"])
def test_an_unknown_id_has_no_preview_and_gets_no_star(adapter_id, routes):
    from demo_base.route_server import encode

    path = f"{ADAPTERS}/{encode(adapter_id)}"
    for answer in (
        routes.ask("GET", f"{path}/preview"),
        routes.post(f"{path}/favourite", {"favourite": True}),
    ):
        assert answer.status in (400, 404)
        assert answer.sentence
