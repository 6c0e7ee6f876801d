"""What a user may download of a training, and what a page may order from it."""

from __future__ import annotations

import dataclasses
import io
import json
import zipfile
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image

pytestmark = pytest.mark.comfy

JOBS = "/qwen_edit_lora/jobs"


@pytest.fixture
def filled(routes: Any, job_id: str) -> Any:
    """The job's folder with adapters, images and a log."""
    folder = routes.store.catalog.find(job_id)
    (folder.path / "adapters").mkdir()
    (folder.path / "tiny.safetensors").write_bytes(b"finished" * 1000)
    (folder.path / "adapters" / "tiny_00000004.safetensors").write_bytes(b"step" * 300_000)
    folder.samples.mkdir()
    for name, color in (("source_item_0", "red"), ("step_00000004_item", "blue")):
        Image.new("RGB", (8, 8), color).save(folder.samples / f"{name}.png")
    folder.log.write_text("one\n" + "line\n" * 400_000 + f'File "{folder.path}/x.py"\nlast\n')
    return folder


def download(routes: Any, folder: Any, what: str) -> Any:
    answer = routes.ask("GET", f"{JOBS}/{folder.id}/{what}")
    if answer.status == 200:
        assert answer.headers["Content-Disposition"].startswith("attachment; filename*=UTF-8''")
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
    return answer


def test_all_images_come_in_one_archive_stored_as_they_are(routes, filled):
    answer = download(routes, filled, "samples.zip")
    archive = zipfile.ZipFile(io.BytesIO(answer.body))
    assert archive.testzip() is None
    assert archive.namelist() == ["source_item_0.png", "step_00000004_item.png"]
    assert {one.compress_type for one in archive.infolist()} == {zipfile.ZIP_STORED}
    for name in archive.namelist():
        assert archive.read(name) == (filled.samples / name).read_bytes()


def test_an_archive_names_what_it_leaves_out_and_follows_no_link(routes, filled, tmp_path):
    (tmp_path / "secret.txt").write_bytes(b"secret")
    (filled.samples / "step_00000005_item.png").write_bytes(b"<script>")
    (filled.samples / "step_00000006_item.png").symlink_to(tmp_path / "secret.txt")
    with (filled.samples / "step_00000007_item.png").open("wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        file.truncate(1 << 29)
    answer = download(routes, filled, "samples.zip")
    assert len(answer.body) < 10_000
    archive = zipfile.ZipFile(io.BytesIO(answer.body))
    left_out = archive.read("left out.txt").decode()
    assert "step_00000005_item.png" in left_out
    assert "step_00000007_item.png" in left_out
    assert b"secret" not in answer.body


def test_an_archive_is_made_piece_by_piece(filled, routes):
    from qwen_edit_lora.lora_core.jobs import downloads

    noise = b"\x89PNG\r\n\x1a\n" + bytes(5 << 20)
    for step in range(10, 14):
        (filled.samples / f"step_{step:08d}_item.png").write_bytes(noise)
    sizes = [len(piece) for piece in downloads.iterate_images(routes.store, filled.id)]
    assert sum(sizes) > 20 << 20
    assert max(sizes) < 2 << 20


def test_the_log_is_whole_and_without_the_paths_of_this_machine(routes, filled):
    answer = download(routes, filled, "log.txt")
    assert answer.headers["Content-Type"] == "text/plain; charset=utf-8"
    text = answer.body.decode()
    assert text.startswith("one\n")
    assert text.count("line\n") == 400_000
    assert text.endswith("last\n")
    assert str(filled.path) not in text


@pytest.mark.parametrize("name", ["tiny.safetensors", "tiny_00000004.safetensors"])
def test_a_lora_file_is_sent_as_it_is(name, routes, filled):
    answer = download(routes, filled, f"files/{name}")
    (path,) = (p for p in routes.store.list_adapters(filled.id) if p.name == name)
    assert answer.body == path.read_bytes()
    assert answer.headers["Content-Length"] == str(len(answer.body))


@pytest.mark.parametrize(
    "name", ["other.safetensors", "state.json", "../state.json", "..%5cx", "log.txt", "adapters"]
)
def test_only_a_listed_file_is_sent(name, routes, filled):
    from demo_base.route_server import encode

    answer = routes.ask("GET", f"{JOBS}/{filled.id}/files/{encode(name)}")
    assert answer.status == 404
    assert "has no LoRA file" in answer.sentence


def test_a_name_of_any_language_survives_the_download(routes, filled):
    name = 'été "1"\r\nX-Evil: 1.safetensors'
    try:
        (filled.path / name).write_bytes(b"x")
    except OSError:
        pytest.skip("this file system has no such names")
    from demo_base.route_server import encode

    answer = routes.ask("GET", f"{JOBS}/{filled.id}/files/{encode(name)}")
    assert answer.status == 200
    assert "X-Evil" not in answer.headers
    assert "%C3%A9t%C3%A9" in answer.headers["Content-Disposition"]


@pytest.mark.parametrize("what", ["samples.zip", "log.txt", "files/a.safetensors"])
def test_nothing_to_download_is_said_in_a_sentence(what, routes, job_id):
    answer = routes.ask("GET", f"{JOBS}/{job_id}/{what}")
    if what == "log.txt":
        assert (answer.status, answer.body) == (200, b"")
    else:
        assert answer.status == 404
        assert answer.sentence
    assert routes.ask("GET", f"{JOBS}/20260131-120000-0123abcd/{what}").status == 404
    assert routes.ask("GET", f"{JOBS}/..%2f..%2fx/{what}").status == 400


@pytest.mark.parametrize("what", ["samples.zip", "log.txt", "files/tiny.safetensors"])
def test_asking_for_the_head_alone_sends_no_file(what, routes, filled):
    answer = routes.ask("HEAD", f"{JOBS}/{filled.id}/{what}")
    assert (answer.status, answer.body) == (200, b"")
    # with a body it would be read as the start of the next answer
    assert routes.ask("GET", JOBS).read()["jobs"]


@pytest.mark.parametrize("what", ["samples.zip", "log.txt", "files/tiny.safetensors"])
def test_another_name_of_this_server_gets_nothing(what, routes, filled):
    headers = {"Host": "evil.example"}
    assert routes.ask("GET", f"{JOBS}/{filled.id}/{what}", headers=headers).status == 403


# --- orders, captions, measurements ---------------------------------------------------------------


@pytest.fixture
def running(routes: Any, job_id: str) -> Iterator[Any]:
    """The job's folder as one whose worker trains: its lock is held."""
    from qwen_edit_lora.lora_core.jobs.job import JobStatus

    folder = routes.store.catalog.find(job_id)
    before = folder.read_state()
    assert folder.lock.try_acquire()
    folder.write_state(dataclasses.replace(before, status=JobStatus.IN_PROGRESS))
    yield folder
    folder.write_state(before)
    folder.lock.release()


def test_a_save_is_ordered_once_and_shown_until_it_is_done(routes, running):
    for _ in range(2):
        answer = routes.post(f"{JOBS}/{running.id}/save")
        assert (answer.status, answer.read()["orders"]) == (200, ["save"])
    (listed,) = routes.ask("GET", JOBS).read()["jobs"]
    assert (listed["orders"], "save" in listed["actions"]) == (["save"], False)
    from qwen_edit_lora.lora_core.jobs.transitions import Order

    assert running.take_order(Order.SAVE)
    (listed,) = routes.ask("GET", JOBS).read()["jobs"]
    assert (listed["orders"], "save" in listed["actions"]) == ([], True)


def test_what_cannot_be_ordered_is_refused_in_a_sentence(routes, running, job_id):
    answer = routes.post(f"{JOBS}/{running.id}/sample")
    assert (answer.status, "makes no samples" in answer.sentence) == (409, True)
    headers = {"Origin": "https://evil.example"}
    assert routes.post(f"{JOBS}/{running.id}/save", **headers).status == 403


def test_a_paused_job_takes_no_orders(routes, job_id):
    answer = routes.post(f"{JOBS}/{job_id}/save")
    assert answer.status == 409
    assert "is paused; only one that trains can save an adapter" in answer.sentence


def test_images_come_with_the_captions_of_their_items(routes, filled, tmp_path):
    import torch
    from qwen_edit_lora.lora_core.training.data.dataset import CachedItem, DatasetWriter

    assert routes.ask("GET", f"{JOBS}/{filled.id}").read()["captions"] == {}
    writer = DatasetWriter(tmp_path / "data")
    tensor = torch.zeros(16, 2, 2)
    item = CachedItem(target=tensor, references=(tensor.clone(),), text=torch.zeros(3, 8))
    for key in ("item", "other"):
        writer.add(key, item, "make it\n<b>blue</b>" + "x" * 999)
    writer.finish()
    captions = routes.ask("GET", f"{JOBS}/{filled.id}").read()["captions"]
    assert captions.keys() == {"item"}
    assert captions["item"].startswith("make it <b>blue</b>")
    assert len(captions["item"]) == 300
    (tmp_path / "data" / "index.json").write_text(json.dumps({"version": 5}))
    assert routes.ask("GET", f"{JOBS}/{filled.id}").read()["captions"] == {}


def test_a_measurement_is_listed_and_announced_while_it_runs(routes, monkeypatch):
    from qwen_edit_lora.nodes.server import measurements

    events: list[Any] = []
    monkeypatch.setitem(measurements._connection, "send", events.append)
    with measurements.measuring("my <b>edit</b>"):
        (shown,) = routes.ask("GET", JOBS).read()["measuring"]
        assert shown["name"] == "my <b>edit</b>"
    assert routes.ask("GET", JOBS).read()["measuring"] == []
    assert [len(event["measuring"]) for event in events] == [1, 0]
    with pytest.raises(InterruptedError):
        measure_in_vain(measurements)
    assert routes.ask("GET", JOBS).read()["measuring"] == []


def measure_in_vain(measurements: Any) -> None:
    with measurements.measuring("stopped"):
        raise InterruptedError
