"""The routes of image pairs: what a page gets, and how requests are refused that it never sends."""

from __future__ import annotations

import json
import shutil
import threading
from typing import Any

import pytest
from demo_base.pair_folders import CAPTION, load_photograph, write_pairs, write_picture, write_text
from demo_base.pair_page import CACHE, IMAGE, PAIRS, TRASH, Page, make_image, read_tree
from demo_base.route_server import encode

pytestmark = pytest.mark.comfy

UNKNOWN = "0123456789abcdef"


# --- what a page gets -----------------------------------------------------------------------------


def test_sets_of_both_folders_are_listed_with_what_they_lack(routes, roots, folder):
    write_pairs(roots["datasets"] / "deep" / "er", 1, caption=None)
    write_pairs(roots["output"] / "not_listed", 1)
    write_picture(load_photograph(0), roots["input"] / "photos" / "a.png")
    listed = write_pairs(roots["input"] / "listed", 1)
    row = {"image": "target/photo_0.png", "edit_image": "control/photo_0.png", "prompt": "x"}
    write_text(listed / "metadata.jsonl", json.dumps(row))
    (folder / "control" / "photo_2.png").unlink()
    answer = routes.ask("GET", PAIRS)
    sets = {one["name"]: one for one in answer.read()["sets"]}
    assert sets.keys() == {"datasets/deep/er", "input/animals", "input/listed"}
    numbers = ("num_pairs", "num_incomplete", "num_uncaptioned")
    assert [sets["input/animals"][name] for name in numbers] == [3, 1, 0]
    assert [sets["datasets/deep/er"][name] for name in numbers] == [1, 0, 1]
    assert "metadata.jsonl" in sets["input/listed"]["problem"]
    assert str(roots["input"].parent) not in answer.body.decode()


def test_a_set_is_shown_with_its_pairs_and_thumbnails(routes, page, folder):
    shown = page.show()
    assert (shown["name"], shown["num_references"]) == ("input/animals", 1)
    assert [pair["caption"] for pair in shown["pairs"]] == [f"{CAPTION}, number {i}" for i in "012"]
    pair = shown["pairs"][1]
    assert pair["target"]["file"] == "target/photo_1.png"
    url = f"{page.path}/{pair['id']}/images/"
    for slot in (0, 1):
        answer = routes.ask("GET", f"{url}{slot}?side=384")
        assert (answer.status, answer.headers["Content-Type"]) == (200, "image/jpeg")
        assert "max-age=86400" in answer.headers["Cache-Control"]
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.body.startswith(b"\xff\xd8")
    write_picture(load_photograph(4), folder / "target" / "photo_1.png")
    assert page.get("photo_1")["target"]["version"] != pair["target"]["version"]


def test_a_pairs_findings_are_those_of_the_check(routes, page, folder):
    def ask(name: str) -> set[tuple[str, str]]:
        answer = routes.ask("GET", f"{page.path}/{page.get(name)['id']}/findings").read()
        return {(one["kind"], one["severity"]) for one in answer["findings"]}

    assert ask("photo_0") == {("enlarged", "warning")}
    shutil.copy(folder / "target" / "photo_1.png", folder / "control" / "photo_1.png")
    assert ("same_picture", "warning") in ask("photo_1")
    (folder / "target" / "photo_2.txt").unlink()
    assert ask("photo_2") == {("pair_unusable", "error")}
    (folder / "control" / "photo_0.png").write_bytes(b"no image")
    assert ask("photo_0") == {("pair_unusable", "error")}


def test_a_set_is_made_filled_captioned_and_undone(routes, roots):
    made = routes.post(PAIRS, {"name": "büro 1"}).read()
    assert (made["name"], made["num_pairs"]) == ("input/büro 1", 0)
    folder = roots["input"] / "büro 1"
    page = Page(routes, "input/büro 1")
    for slot, kind in enumerate(("PNG", "JPEG", "WEBP")):
        answer = page.upload(make_image(slot, kind), "Käse.png", slot)
        assert answer.status == 200
    pair = answer.read()["pair"]
    assert [image["file"] for image in pair["references"]] == [
        "control/Käse.jpg",
        "control_2/Käse.webp",
    ]
    answer = page.post(f"{pair['id']}/caption", {"caption": "a <b>text</b>", "before": ""})
    assert answer.read()["caption"] == "a <b>text</b>"
    assert page.post("captions", {"trigger": "ohwx"}).read()["num_changed"] == 1
    assert page.post("captions", {"fill": "x"}).read() == {"num_changed": 0, "removed": ""}
    assert (folder / "target" / "Käse.txt").read_text() == "ohwx, a <b>text</b>"
    replaced = page.upload(make_image(3), "other.png", 1, pair["id"]).read()
    assert replaced["pair"]["references"][0]["file"] == "control/Käse.png"
    before = {p for p in read_tree(folder) if not p.startswith(".")}
    removed = page.post(f"{pair['id']}/remove").read()["removed"]
    assert page.show()["pairs"] == []
    restored = page.post("restore", {"removed": removed}).read()
    assert restored == {"num_files": 4, "num_edited": 0}
    assert {p for p in read_tree(folder) if not p.startswith(".")} == before


# --- what is refused ------------------------------------------------------------------------------


def list_requests(page: Page, pair: str) -> list[tuple[str, str, bytes, dict[str, str]]]:
    """Each route that changes something, with a valid request."""
    json_type = {"Content-Type": "application/json"}
    posts = {
        PAIRS: {"name": "new"},
        f"{page.path}/captions": {"fill": "x"},
        f"{page.path}/restore": {"removed": UNKNOWN},
        f"{page.path}/{pair}/caption": {"caption": "x"},
        f"{page.path}/{pair}/remove": {},
        f"{page.path}/{pair}/mask/remove": {},
        f"{page.path}/outputs": {"filename": "a.png", "subfolder": "", "type": "output", "slot": 0},
        f"{CACHE}/clean": {},
        f"{TRASH}/empty": {},
    }
    found = [("POST", path, json.dumps(v).encode(), json_type) for path, v in posts.items()]
    uploads = (f"{page.path}/images?name=a.png&slot=0", f"{page.path}/{pair}/mask")
    return [*found, *(("POST", path, make_image(), IMAGE) for path in uploads)]


def test_pages_of_other_sites_change_nothing(routes, page, monkeypatch, unchanged):
    from comfy.cli_args import args

    monkeypatch.setattr(args, "listen", "0.0.0.0")
    pair = page.get("photo_0")["id"]
    unchanged()
    for method, path, body, headers in list_requests(page, pair):
        for foreign in (
            {"Host": "192.168.1.5:8188", "Origin": "http://evil.example"},
            {"Host": "192.168.1.5:8188", "Sec-Fetch-Site": "same-site"},
        ):
            answer = routes.ask(method, path, body, {**headers, **foreign})
            assert (answer.status, "page of another site" in answer.sentence) == (403, True), path


def test_a_rebound_name_reads_and_changes_nothing(routes, page, monkeypatch, unchanged):
    from comfy.cli_args import args

    monkeypatch.setattr(args, "listen", "127.0.0.1")
    pair = page.get("photo_0")["id"]
    unchanged()
    reads = [PAIRS, page.path, CACHE, TRASH]
    reads += [f"{page.path}/{pair}/{end}" for end in ("images/0", "mask", "findings")]
    requests = [("GET", path, b"", {}) for path in reads]
    for method, path, body, headers in requests + list_requests(page, pair):
        answer = routes.ask(method, path, body, {**headers, "Host": "rebind.attacker.example"})
        assert answer.status == 403, path


def test_a_form_of_another_site_cannot_send_what_is_accepted(routes, page, unchanged):
    pair = page.get("photo_0")["id"]
    unchanged()
    for method, path, body, _ in list_requests(page, pair):
        for kind in ("text/plain", "multipart/form-data; boundary=x", "", "image/png"):
            answer = routes.ask(method, path, body, {"Content-Type": kind} if kind else {})
            assert answer.status == 400, (path, kind)
            assert "Content-Type" in answer.sentence


@pytest.mark.parametrize("bad", ["..", "../x", "x", "0" * 15, "0" * 17, "A" * 16, "\0", "%2e%2e"])
def test_an_id_that_is_none_is_refused(routes, page, unchanged, bad):
    pair = page.get("photo_0")["id"]
    unchanged()
    for path in (
        *(f"{PAIRS}/{encode(bad)}{end}" for end in ("/captions", "/restore", f"/{pair}/remove")),
        *(f"{page.path}/{encode(bad)}{end}" for end in ("/caption", "/remove")),
    ):
        answer = routes.post(path, {"caption": "x", "fill": "x", "removed": UNKNOWN})
        assert answer.status in (400, 404), path
    assert page.upload(make_image(), "a.png", 0, bad).status == 400


def test_unknown_sets_pairs_and_images_are_404_and_never_cached(routes, page, unchanged):
    pair = page.get("photo_0")["id"]
    unchanged()
    for path in (
        f"{PAIRS}/{UNKNOWN}",
        f"{page.path}/{UNKNOWN}/findings",
        f"{page.path}/{UNKNOWN}/images/0",
        f"{page.path}/{pair}/images/2",
        f"{page.path}/{pair}/images/99",
        f"{page.path}/{pair}/mask",
    ):
        answer = routes.ask("GET", path)
        assert (answer.status, answer.headers["Cache-Control"]) == (404, "no-store"), path
    for path in (f"{UNKNOWN}/caption", f"{UNKNOWN}/remove", "restore"):
        options = {"caption": "x", "removed": UNKNOWN}
        assert page.post(path, options).status == 404
    assert page.upload(make_image(), "a.png", 1, UNKNOWN).status == 404


@pytest.mark.parametrize(
    "name",
    [
        *("../evil.png", "..\\evil.png", "/etc/passwd", "a/b.png", "C:\\a.png", "CON.png"),
        *(".hidden.png", ".png", "..png", "\0.png", "a\n.png", " .png", f"{'x' * 300}.png"),
        *("photo_0.png", "PHOTO_0.jpg", "a:stream.png"),
    ],
)
def test_a_hostile_or_taken_name_is_refused(page, unchanged, name):
    unchanged()
    answer = page.upload(make_image(), name)
    assert answer.status in (400, 409)
    assert 0 < len(answer.sentence) <= 400
    assert answer.sentence.isprintable()


@pytest.mark.parametrize("name", ["", "..", "../x", "a/b", "a\\b", "CON", ".x", "x" * 256, "a\0"])
def test_a_hostile_name_of_a_set_is_refused(routes, page, unchanged, name):
    unchanged()
    answer = routes.post(PAIRS, {"name": name})
    assert (answer.status, "name is" in answer.sentence) == (400, True)


def test_a_set_of_the_same_name_is_not_made_twice(routes, page, unchanged):
    unchanged()
    assert routes.post(PAIRS, {"name": "animals"}).status == 409


CONTENTS = {
    "nothing": b"",
    "text": b"hello",
    "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "half a PNG": make_image()[:-200],
    "a pickle": b"\x80\x04\x95\x10\x00\x00\x00",
    "HTML": b"<!doctype html><script>alert(1)</script>",
}


@pytest.mark.parametrize("kind", CONTENTS)
def test_content_that_is_no_image_is_refused_and_leaves_nothing(page, unchanged, kind):
    pair = page.get("photo_0")["id"]
    unchanged()
    for pair_id in ("", pair):
        answer = page.upload(CONTENTS[kind], "fine.png", 0, pair_id)
        assert (answer.status, "fine.png" in answer.sentence) == (400, True)


def test_an_upload_over_the_limit_is_refused_and_leaves_nothing(page, unchanged, monkeypatch):
    from qwen_edit_lora.nodes.server import pair_routes

    monkeypatch.setattr(pair_routes, "MAX_UPLOAD_BYTES", 1000)
    unchanged()
    assert page.upload(make_image(), "a.png").status == 413
    content = make_image()
    chunked = b"".join(b"%x\r\n%s\r\n" % (len(p), p) for p in (content[:900], content[900:]))
    headers = {**IMAGE, "Transfer-Encoding": "chunked"}
    connection_path = f"{page.path}/images?name=a.png&slot=0"
    answer = ask_chunked(page.routes.port, connection_path, chunked + b"0\r\n\r\n", headers)
    assert answer == 413


def ask_chunked(port: int, path: str, body: bytes, headers: dict[str, str]) -> int:
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.putrequest("POST", path)
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders(body)
    status = connection.getresponse().status
    connection.close()
    return status


@pytest.mark.parametrize("slot", ["4", "-1", "", "1.0", "x", "9" * 30, "٣"])
def test_a_slot_that_is_none_is_refused(page, unchanged, slot):
    unchanged()
    assert page.upload(make_image(), "new.png", slot).status == 400


@pytest.mark.parametrize("side", ["1", "100000", "-384", "x", "384.0"])
def test_a_thumbnail_has_one_of_two_sizes(routes, page, side):
    pair = page.get("photo_0")["id"]
    answer = routes.ask("GET", f"{page.path}/{pair}/images/0?side={side}")
    assert (answer.status, answer.headers["Cache-Control"]) == (400, "no-store")


@pytest.mark.parametrize(
    ("path", "options"),
    [
        ("captions", {}),
        ("captions", {"fill": "a", "trigger": "b"}),
        ("captions", {"fill": 7}),
        ("captions", {"fill": " "}),
        ("captions", {"trigger": ["a"]}),
        ("captions", {"trigger": "a\nb"}),
        ("restore", {}),
        ("restore", {"removed": "../../x"}),
        ("{pair}/caption", {}),
        ("{pair}/caption", {"caption": None}),
        ("{pair}/caption", {"caption": "x", "before": 1}),
        ("{pair}/caption", {"caption": "\ud800"}),
    ],
)
def test_options_of_another_kind_are_refused(page, unchanged, path, options):
    path = path.replace("{pair}", page.get("photo_0")["id"])
    unchanged()
    answer = page.post(path, options)
    assert answer.status == 400
    assert 0 < len(answer.sentence) <= 400


def test_links_that_lead_outside_are_neither_shown_nor_written(routes, roots, page, folder):
    secret = write_picture(load_photograph(0), roots["input"].parent.parent / "secret.png")
    text = write_text(secret.with_suffix(".txt"), "secret words")
    for name, target in (("photo_0.png", secret), ("photo_0.txt", text)):
        (folder / "target" / name).unlink()
        (folder / "target" / name).symlink_to(target)
    write_pairs(roots["input"].parent.parent / "outside", 1)
    (roots["input"] / "linked").symlink_to(roots["input"].parent.parent / "outside")
    before = secret.read_bytes()
    shown = page.get("photo_0")
    assert shown["caption"] == ""
    assert "leads outside" in shown["fault"]
    assert "secret words" not in json.dumps(page.show())
    answer = routes.ask("GET", f"{page.path}/{shown['id']}/images/0")
    assert (answer.status, "leads outside" in answer.sentence) == (409, True)
    answer = page.post(f"{shown['id']}/caption", {"caption": "x"})
    assert (answer.status, "leads outside" in answer.sentence) == (409, True)
    names = [one["name"] for one in routes.ask("GET", PAIRS).read()["sets"]]
    assert names == ["input/animals"]
    assert page.upload(make_image(), "new.png", 0, shown["id"]).status == 200
    assert (secret.read_bytes(), text.read_text()) == (before, "secret words")


def test_a_damaged_image_is_a_refusal_that_is_not_cached(routes, page, folder):
    (folder / "target" / "photo_0.png").write_bytes(b"damaged")
    answer = routes.ask("GET", f"{page.path}/{page.get('photo_0')['id']}/images/0")
    assert (answer.status, answer.headers["Cache-Control"]) == (409, "no-store")
    assert "target/photo_0.png" in answer.sentence


# --- at the same time -----------------------------------------------------------------------------


def send_together(routes: Any, requests: list[tuple[str, Any]]) -> list[int]:
    from demo_base.route_server import RouteServer

    statuses: list[int] = []
    barrier = threading.Barrier(len(requests))

    def send(path: str, value: Any) -> None:
        own = RouteServer(routes.port, routes.store)
        barrier.wait()
        statuses.append(own.post(path, value).status)
        own.close()

    threads = [threading.Thread(target=send, args=request) for request in requests]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sorted(statuses)


def test_of_two_captions_typed_over_the_same_text_one_is_kept_whole(routes, page, folder):
    for round_ in range(5):
        pair = page.get("photo_0")
        path = f"{page.path}/{pair['id']}/caption"
        texts = [f"{round_}{letter}" * 2000 for letter in "ab"]
        requests = [(path, {"caption": text, "before": pair["caption"]}) for text in texts]
        assert send_together(routes, requests) == [200, 409]
        assert (folder / "target" / "photo_0.txt").read_text() in texts


def test_captions_of_different_pairs_are_saved_at_the_same_time(routes, page, folder):
    pairs = page.show()["pairs"]
    requests = [
        (f"{page.path}/{pair['id']}/caption", {"caption": f"new {pair['name']}"}) for pair in pairs
    ]
    assert send_together(routes, requests) == [200, 200, 200]
    assert [pair["caption"] for pair in page.show()["pairs"]] == [
        f"new {pair['name']}" for pair in pairs
    ]
