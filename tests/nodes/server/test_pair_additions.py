"""The routes that paint masks, take what graphs made, undo changes, and empty the trash."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from demo_base.pair_folders import write_text
from demo_base.pair_page import IMAGE, TRASH, Page, make_image, read_tree
from PIL import Image

pytestmark = pytest.mark.comfy

OUTPUT = {"filename": "made_00001_.png", "subfolder": "", "type": "output", "slot": 0}


@pytest.fixture
def produced(comfyui: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """ComfyUI's folders of what graphs make, with an image in each."""
    folders = {name: tmp_path / "produced" / name for name in ("output", "temp")}
    for name, folder in folders.items():
        folder.mkdir(parents=True)
        monkeypatch.setattr(comfyui.folder_paths, f"{name}_directory", str(folder))
        (folder / OUTPUT["filename"]).write_bytes(make_image())
        (folder / "sub").mkdir()
        (folder / "sub" / "ü 1.jpg").write_bytes(make_image(3, "JPEG"))
    return folders


def paint(size: tuple[int, int] = (96, 64), kind: str = "PNG") -> bytes:
    mask = Image.new("RGB", size, "black")
    mask.paste("white", (0, 0, size[0] // 2, size[1]))
    buffer = io.BytesIO()
    mask.save(buffer, kind)
    return buffer.getvalue()


def send_mask(page: Page, pair: str, content: bytes) -> Any:
    return page.routes.ask("POST", f"{page.path}/{pair}/mask", content, IMAGE)


def list_set(folder: Path) -> set[str]:
    return {name for name in read_tree(folder) if not name.startswith(".removed")}


# --- masks ----------------------------------------------------------------------------------------


def test_a_mask_is_painted_shown_removed_and_undone(routes, page, folder):
    before = list_set(folder)
    pair = page.get("photo_1")
    assert pair["mask"] is None
    answer = send_mask(page, pair["id"], paint()).read()
    assert (answer["pair"]["id"], answer["removed"]) == (pair["id"], "")
    assert answer["pair"]["mask"]["file"] == "mask/photo_1.png"
    shown = routes.ask("GET", f"{page.path}/{pair['id']}/mask?side=384")
    assert shown.headers["Content-Type"] == "image/png"
    assert shown.headers["X-Content-Type-Options"] == "nosniff"
    alpha = Image.open(io.BytesIO(shown.body)).getchannel("A")
    assert (alpha.size, alpha.getpixel((10, 10)), alpha.getpixel((90, 10))) == ((96, 64), 255, 0)
    second = send_mask(page, pair["id"], paint((48, 32))).read()
    assert second["pair"]["mask"]["version"] != answer["pair"]["mask"]["version"]
    page.post("restore", {"removed": second["removed"]})
    assert page.get("photo_1")["mask"]["file"] == "mask/photo_1.png"
    cleared = page.post(f"{pair['id']}/mask/remove").read()
    assert cleared["pair"]["mask"] is None
    assert list_set(folder) == before | {"mask"}
    page.post("restore", {"removed": cleared["removed"]})
    assert page.get("photo_1")["mask"] is not None


def test_a_mask_that_is_none_is_refused_and_leaves_nothing(page, unchanged):
    pair = page.get("photo_1")["id"]
    unchanged()
    black = Image.new("L", (96, 64))
    buffer = io.BytesIO()
    black.save(buffer, "PNG")
    for content in (b"", b"<svg/>", paint()[:-60], paint((64, 64)), buffer.getvalue()):
        answer = send_mask(page, pair, content)
        assert (answer.status, "the mask" in answer.sentence) == (400, True), answer.sentence


# --- from the graph -------------------------------------------------------------------------------


def test_an_image_of_a_graph_becomes_a_pair(page, folder, produced):
    answer = page.post("outputs", OUTPUT).read()
    pair = answer["pair"]
    assert (pair["name"], pair["target"]["file"]) == ("made_00001_", "target/made_00001_.png")
    place = {"filename": "ü 1.jpg", "subfolder": "sub", "type": "temp"}
    answer = page.post("outputs", {**place, "slot": 1, "pair": pair["id"]}).read()
    assert [one["file"] for one in answer["pair"]["references"]] == ["control/made_00001_.jpg"]
    answer = page.post("outputs", {**place, "slot": 0, "name": "new.x"}).read()
    assert answer["pair"]["target"]["file"] == "target/new.jpg"
    assert (folder / "target" / "new.jpg").read_bytes() == make_image(3, "JPEG")
    replaced = page.post("outputs", {**OUTPUT, "slot": 1, "pair": pair["id"]}).read()
    assert replaced["removed"]
    assert (produced["output"] / OUTPUT["filename"]).read_bytes() == make_image()
    page.post("restore", {"removed": replaced["removed"]})
    assert page.get("made_00001_")["references"][0]["file"] == "control/made_00001_.jpg"


@pytest.mark.parametrize(
    "place",
    [
        {"type": "input"},
        {"type": ""},
        {"type": "output]"},
        {"subfolder": ".."},
        {"subfolder": "sub/../.."},
        {"subfolder": "/etc", "filename": "passwd"},
        {"filename": "../temp/made_00001_.png"},
        {"filename": "..\\made_00001_.png"},
        {"filename": "missing.png"},
        {"filename": "sub"},
        {"filename": ""},
        {"filename": "a\0.png"},
        {"filename": "\ud800.png"},
        {"filename": "x" * 5000},
        {"filename": "secret.txt"},
        {"filename": "link.png"},
        {"filename": "made_00001_.png [input]"},
        {"filename": 7},
        {"subfolder": None},
        {"slot": "0"},
        {"slot": True},
        {"slot": 4},
        {"slot": -1},
        {"name": "../x.png"},
        {"name": "a/b.png"},
        {"pair": "../x"},
        {"name": ["a"]},
    ],
)
def test_nothing_else_of_this_machine_is_taken(
    page, produced, tmp_path, place, unchanged: Callable[[], None]
):
    secret = tmp_path / "secret.png"
    secret.write_bytes(make_image())
    (produced["output"] / "link.png").symlink_to(secret)
    write_text(produced["output"] / "secret.txt", "secret")
    unchanged()
    body = json.dumps({**OUTPUT, **place}).encode()
    answer = page.routes.ask(
        "POST", f"{page.path}/outputs", body, {"Content-Type": "application/json"}
    )
    assert (answer.status, answer.sentence.isprintable()) == (400, True)
    assert str(tmp_path) not in answer.sentence


def test_an_image_of_a_graph_over_the_limit_is_refused(page, produced, monkeypatch, unchanged):
    from qwen_edit_lora.nodes.server import pair_routes

    monkeypatch.setattr(pair_routes, "MAX_UPLOAD_BYTES", 1000)
    unchanged()
    answer = page.post("outputs", OUTPUT)
    assert (answer.status, "too large" in answer.sentence) == (400, True)


# --- undo, and the trash --------------------------------------------------------------------------


def test_a_trigger_word_is_undone(page, folder):
    before = {name: data for name, data in read_tree(folder).items() if data is not None}
    done = page.post("captions", {"trigger": "ohwx"}).read()
    assert (done["num_changed"], len(done["removed"])) == (3, 16)
    answer = page.post("restore", {"removed": done["removed"]}).read()
    assert answer == {"num_files": 3, "num_edited": 0}
    after = read_tree(folder)
    assert {name: after[name] for name in before} == before


def test_what_was_removed_is_measured_over_all_sets_and_emptied(routes, page, folder):
    assert routes.ask("GET", TRASH).read() == {"num_files": 0, "size_bytes": 0}
    removed = page.post(f"{page.get('photo_0')['id']}/remove").read()["removed"]
    measured = routes.ask("GET", TRASH).read()
    assert measured["num_files"] == 3
    kept = list_set(folder)
    assert routes.post(f"{TRASH}/empty").read() == measured
    assert list_set(folder) == kept
    assert routes.ask("GET", TRASH).read() == {"num_files": 0, "size_bytes": 0}
    assert page.post("restore", {"removed": removed}).status == 404


def test_a_cards_findings_name_the_images_by_their_sides(routes, page, folder):
    def ask(name: str) -> list[str]:
        answer = routes.ask("GET", f"{page.path}/{page.get(name)['id']}/findings").read()
        return [one["text"] for one in answer["findings"]]

    (folder / "control" / "photo_0.png").write_bytes((folder / "target/photo_0.png").read_bytes())
    (folder / "target" / "photo_1.png").write_bytes(b"no image")
    (folder / "target" / "photo_2.png").unlink()
    texts = [*ask("photo_0"), *ask("photo_1"), *ask("photo_2")]
    assert any(text.startswith("the target and reference 1 are the same image") for text in texts)
    assert any(text.startswith("the target is not a readable image") for text in texts)
    assert "the target is missing" in texts[-1]
    assert not any("photo_" in text for text in texts)
