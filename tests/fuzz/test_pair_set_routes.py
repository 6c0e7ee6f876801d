"""The routes of image pairs, live: any ids, JSON, uploads and files get an answer or a refusal.

Never a 500 and never a file outside the set's folder, read or written. A refused request changes
nothing, and an accepted one loses no image: it is in the set, or moved aside.
"""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from demo_base.pair_folders import load_photograph, write_pairs, write_picture
from demo_base.route_inputs import (
    HEADERS,
    METHODS,
    NUMBERS,
    TEXTS,
    VALUES,
    build_bodies,
    check_form,
    is_route,
    write_query,
)
from demo_base.route_server import JSON, Answer, encode
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

pytestmark = pytest.mark.comfy

SHARE = settings.default.max_examples
PAIRS, CACHE = "/qwen_edit_lora/pairs", "/qwen_edit_lora/pair_cache"
IMAGE = {"Content-Type": "application/octet-stream"}
SECRET = b"secret words"
Tree = dict[str, bytes | str | None]


def read_tree(folder: Path) -> Tree:
    """Path -> bytes of a file, what a link leads to, None for the rest."""
    found: Tree = {}
    for parent, folders, names in os.walk(folder):
        for path in (Path(parent, name) for name in (*folders, *names)):
            if path.is_symlink():
                content: bytes | str | None = str(path.readlink())
            else:
                content = path.read_bytes() if path.is_file() else None
            found[path.relative_to(folder).as_posix()] = content
    return found


def write_tree(folder: Path, tree: Tree) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    for name, content in tree.items():
        path = folder / name
        if content is None:
            path.mkdir(parents=True, exist_ok=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(content) if isinstance(content, str) else path.write_bytes(content)


def count_images(tree: Tree) -> Counter[bytes]:
    """Contents of files that may be images: all but captions."""
    endings = (".txt", ".caption", ".json")
    return Counter(
        content
        for name, content in tree.items()
        if isinstance(content, bytes) and not name.lower().endswith(endings)
    )


class Place:
    """ComfyUI's folders with two sets, and a secret next to them; restored for each case."""

    def __init__(self, routes: Any, folder: Path):
        self.routes, self.folder = routes, folder
        self.comfy = folder / "comfy"
        for name in ("datasets", "input", "output"):
            (self.comfy / name).mkdir(parents=True)
        (folder / "outside").mkdir()
        (folder / "outside" / "secret.txt").write_bytes(SECRET)
        write_picture(load_photograph(4), folder / "outside" / "secret.png")
        self.set = write_pairs(self.comfy / "input" / "animals", 3, width=24, height=16)
        write_picture(load_photograph(3, 24, 16), self.set / "control_2" / "photo_0.png")
        (self.set / "target" / "photo_2.txt").unlink()
        plain = write_pairs(self.comfy / "datasets" / "plain", 1, target="{}.png", caption=None)
        write_picture(load_photograph(5, 24, 16), plain / "control" / "alone.png")
        self.whole, self.outside = read_tree(self.comfy), read_tree(folder / "outside")
        self.tree = self.whole
        sets = self.ask("GET", PAIRS).read()["sets"]
        self.sets = {one["name"].split("/")[1]: one["id"] for one in sets}
        self.pairs = {
            name: [pair["id"] for pair in self.show(set_id)["pairs"]]
            for name, set_id in self.sets.items()
        }

    def ask(self, *request: Any, is_ours: bool = True) -> Answer:
        answer = self.routes.ask(*request)
        check_form(answer, self.folder, is_ours)
        assert SECRET not in answer.body
        return answer

    def show(self, set_id: str) -> dict[str, Any]:
        return self.ask("GET", f"{PAIRS}/{set_id}").read()

    def fill(self) -> None:
        """The folders as they were at first."""
        if self.tree != self.whole:
            write_tree(self.comfy, self.whole)
            self.tree = self.whole
            self.ask("GET", PAIRS)

    def check(self, answer: Answer) -> Tree:
        """After a change that was asked for; the files before it."""
        before, self.tree = self.tree, read_tree(self.comfy)
        assert read_tree(self.folder / "outside") == self.outside
        if answer.status != 200:
            assert self.tree == before
        assert not any(name.endswith(".tmp") for name in self.tree)
        assert count_images(before) <= count_images(self.tree)
        return before

    def get_set(self, name: str) -> str:
        return self.sets.get(name, name)

    def get_pair(self, set_name: str, pair: int | str) -> str:
        known = self.pairs.get(set_name, [])
        return pair if isinstance(pair, str) else known[pair % len(known)] if known else "0" * 16


@pytest.fixture(scope="module")
def place(routes: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    from qwen_edit_lora.nodes import host
    from qwen_edit_lora.nodes.datasets import pair_sets, pair_views

    folder = tmp_path_factory.mktemp("fuzzed")
    with pytest.MonkeyPatch.context() as patch:
        names = ("datasets", "input", "output")
        roots = {name: [str(folder / "comfy" / name)] for name in names}
        patch.setattr(host, "list_dataset_roots", lambda: roots)
        for known in (pair_sets._known, pair_views._opened, pair_views._facts):
            known.clear()
        yield Place(routes, folder)
    shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Asserts that the log has no traceback."""
    caplog.set_level(logging.WARNING)
    yield
    assert [record.getMessage() for record in caplog.records if record.exc_info] == []


SETS = st.one_of(st.sampled_from(["animals", "animals", "plain"]), TEXTS)
IDS = st.one_of(st.integers(0, 3), st.integers(0, 3), TEXTS)
SLOTS = st.one_of(st.integers(-1, 5).map(str), TEXTS, NUMBERS.map(str))
QUERIES = st.dictionaries(
    st.sampled_from(["side", "slot", "name", "x"]),
    st.sampled_from(["384", "1280"]) | TEXTS | NUMBERS.map(str),
)


@settings(max_examples=SHARE)
@given(SETS, IDS, st.sampled_from(["set", "findings", "images"]), SLOTS, QUERIES)
@example("animals", 0, "images", "1", {"side": "1280"})
def test_any_request_about_a_pair_is_answered_and_changes_nothing(
    place, name, pair, part, slot, query
):
    place.fill()
    path = f"{PAIRS}/{encode(place.get_set(name))}"
    texts = [name]
    if part != "set":
        texts.append(place.get_pair(name, pair))
        path += f"/{encode(texts[-1])}/{part}"
    if part == "images":
        texts.append(slot)
        path += f"/{encode(slot)}"
    is_ours = all(is_route(text, path) for text in texts)
    place.check(place.ask("GET", path + write_query(query), is_ours=is_ours))
    assert place.tree == place.whole


CHANGES = ("set", "captions", "restore", "caption", "remove")
WORDS = st.one_of(
    TEXTS,
    st.sampled_from(["make it red", "", " ", "a\r\nb", "\u2028", "x" * 60_000, "animals", "CON"]),
    st.text(min_size=1, max_size=20).map(lambda text: text * 20),
)
OPTIONS = st.one_of(
    st.just({}),
    st.fixed_dictionaries({"name": WORDS | VALUES}),
    st.fixed_dictionaries({"fill": WORDS | VALUES}),
    st.fixed_dictionaries({"trigger": WORDS | VALUES}),
    st.fixed_dictionaries({"removed": WORDS | VALUES}),
    st.fixed_dictionaries({"caption": WORDS | VALUES}),
    st.fixed_dictionaries({"caption": WORDS, "before": WORDS | VALUES}),
    st.dictionaries(TEXTS, VALUES, max_size=3),
)


def describe_change(place: Place, name: str, pair: int | str, change: str) -> tuple[str, bool]:
    """(path, whether it is one of our routes)."""
    set_id, pair_id = place.get_set(name), place.get_pair(name, pair)
    path = PAIRS if change == "set" else f"{PAIRS}/{encode(set_id)}/{change}"
    if change in ("caption", "remove"):
        path = f"{PAIRS}/{encode(set_id)}/{encode(pair_id)}/{change}"
    return path, change == "set" or all(is_route(text, path) for text in (set_id, pair_id))


@settings(max_examples=SHARE)
@given(SETS, IDS, st.sampled_from(CHANGES), build_bodies(OPTIONS))
@example("animals", 0, "set", b'{"name": "new one"}')
@example("animals", 2, "captions", b'{"fill": "make it red"}')
@example("plain", 0, "captions", b'{"fill": "make it red"}')
@example("animals", 0, "captions", b'{"trigger": "ohwx"}')
@example("plain", 0, "caption", b'{"caption": "make it red", "before": ""}')
@example("animals", 1, "remove", b"{}")
def test_any_change_is_made_or_refused_and_no_image_is_lost(place, name, pair, change, body):
    place.fill()
    path, is_ours = describe_change(place, name, pair, change)
    answer = place.ask("POST", path, body, JSON, is_ours=is_ours)
    before = place.check(answer)
    if answer.status != 200 or not is_ours:
        return
    if change == "set":  # it can be shown
        assert place.show(answer.read()["id"])["name"] == f"input/{json.loads(body)['name']}"
        assert set(before) < set(place.tree)
    elif change == "remove":
        assert count_images(before) == count_images(place.tree)
        token = {"removed": answer.read()["removed"]}
        restored = place.ask("POST", path.rsplit("/", 2)[0] + "/restore", to_json(token), JSON)
        assert restored.status == 200
        assert {k: v for k, v in read_tree(place.comfy).items() if ".removed" not in k} == before
    else:  # captions alone
        assert count_images(before) == count_images(place.tree)
        changed = {k for k, v in place.tree.items() if before.get(k, 0) != v}
        # and what Undo needs of them
        others = {path for path in changed if not path.endswith(".txt") and ".removed" not in path}
        assert others == set()
        if change == "caption":
            caption = answer.read()["caption"]
            shown = {one["id"]: one["caption"] for one in place.show(place.sets[name])["pairs"]}
            assert shown[place.get_pair(name, pair)] == caption


def to_json(value: Any) -> bytes:
    return json.dumps(value).encode()


KINDS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "ICO", "EPS", "PDF")


def build_image(kind: str, mode: str = "RGB", size: tuple[int, int] = (16, 12)) -> bytes:
    buffer = io.BytesIO()
    load_photograph(6, 48, 32).resize(size).convert(mode).save(buffer, kind)
    return buffer.getvalue()


IMAGES = {kind: build_image(kind) for kind in KINDS}
CONTENTS = st.one_of(
    st.sampled_from(list(IMAGES.values())),
    st.tuples(
        st.sampled_from(list(IMAGES.values())),
        st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), min_size=1, max_size=4),
    ).map(lambda found: flip(*found)),
    st.tuples(st.sampled_from(list(IMAGES.values())), st.integers(0, 2000)).map(
        lambda found: found[0][: found[1]]
    ),
    st.binary(max_size=200),
    st.sampled_from([b"", b"<svg/>", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"\x80\x04\x95\0", b"GIF89a"]),
)


def flip(data: bytes, flips: list[tuple[int, int]]) -> bytes:
    changed = bytearray(data)
    for place, value in flips:
        changed[place % len(changed)] = value
    return bytes(changed)


NAMES = st.one_of(
    st.sampled_from(
        ["new.png", "photo_0.png", "a.b.jpg", "alone.png", "../x.png", "CON.png", ".a"]
    ),
    st.sampled_from(["target.png", "photo_1_mask.png", "photo_1.PNG", "x" * 251 + ".png"]),
    st.tuples(TEXTS, st.sampled_from(["", ".png", ".jpg", ".txt"])).map("".join),
)


@settings(max_examples=SHARE)
@given(SETS, st.just("") | IDS, NAMES, SLOTS, CONTENTS)
@example("animals", "", "new.png", "0", IMAGES["PNG"])
@example("animals", 1, "other.png", "2", IMAGES["JPEG"])
@example("animals", 0, "other.png", "0", IMAGES["WEBP"])
@example("plain", 0, "other.png", "0", IMAGES["WEBP"])
@example("plain", 1, "other.png", "0", IMAGES["WEBP"])
def test_any_upload_becomes_its_image_of_the_set_or_is_refused(
    place, name, pair, file, slot, content
):
    place.fill()
    pair_id = "" if pair == "" else place.get_pair(name, pair)
    query = write_query({"name": file, "slot": slot, "pair": pair_id})
    path = f"{PAIRS}/{encode(place.get_set(name))}/images"
    is_ours = is_route(name, path)
    answer = place.ask("POST", path + query, content, IMAGE, is_ours=is_ours)
    before = place.check(answer)
    if answer.status == 200 and is_ours:
        check_upload(place, name, pair_id, int(slot), content, before, answer.read())


def check_upload(
    place: Place,
    name: str,
    pair_id: str,
    slot: int,
    content: bytes,
    before: Tree,
    given: dict[str, Any],
) -> None:
    with Image.open(io.BytesIO(content)) as image:
        image.load()  # what was accepted can be decoded
    assert count_images(place.tree) == count_images(before) + Counter([content])
    shown = next(
        one for one in place.show(place.sets[name])["pairs"] if one["id"] == given["pair"]["id"]
    )
    assert shown == given["pair"]
    assert pair_id in ("", shown["id"])
    images = [shown["target"], *shown["references"]]
    folder = {"animals": "input/animals", "plain": "datasets/plain"}[name]
    files = [one and place.tree[f"{folder}/{one['file']}"] for one in images]
    assert content in (files[slot : slot + 1] if pair_id else files)
    if slot == 0:
        assert files[0] == content
    for at, one in enumerate(images):
        if one is not None:
            answer = place.ask("GET", f"{PAIRS}/{place.sets[name]}/{shown['id']}/images/{at}")
            assert answer.status == 200


FOLDERS = ("target", "control", "control_2", "control_3", "mask", "captions", "deep/target", "")
STEMS = ("photo_0", "photo_1", "Photo_0", "new", "a.b", "café", "cafe\u0301", "target", "x" * 251)
ENDINGS = (".png", ".jpg", ".PNG", ".txt", ".caption", ".json", ".jsonl", ".heic", "")
FILES = st.lists(
    st.tuples(
        st.sampled_from(FOLDERS),
        st.sampled_from(STEMS) | st.text(st.characters(exclude_characters="/\0"), max_size=8),
        st.sampled_from(ENDINGS),
        st.sampled_from(["file", "file", "file", "folder", "link", "pipe", "nothing"]),
        CONTENTS | st.sampled_from([b"make it red", b"\xff\xfe\0", b'{"prompt": 3}']),
        st.integers(0, 5),
    ),
    min_size=1,
    max_size=5,
)


def put_file(place: Place, name: str, kind: str, content: bytes, number: int) -> None:
    path = place.set / name
    try:
        if os.path.lexists(path):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        if kind == "nothing" or not path.parent.resolve().is_relative_to(place.set):
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        if kind == "file":
            path.write_bytes(content)
        elif kind == "folder":
            path.mkdir()
        elif kind == "pipe" and hasattr(os, "mkfifo"):
            os.mkfifo(path)
        elif kind == "link":
            outside = place.folder / "outside"
            targets = [outside, outside / "secret.png", outside / "secret.txt", path, place.set]
            path.symlink_to([*targets, place.set / "control" / "photo_0.png"][number])
    except (OSError, ValueError):  # no name for this disk, or below a file
        pass


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["captions", "caption", "remove", "upload", "upload"]),
        st.integers(0, 9),
        st.integers(0, 3),
    ),
    max_size=3,
)


@settings(max_examples=SHARE // 2)
@given(FILES, STEPS)
def test_a_set_of_any_files_is_shown_and_changed_without_loss(place, files, steps):
    place.fill()
    for folder, stem, ending, kind, content, number in files:
        put_file(place, f"{folder}/{stem}{ending}", kind, content, number)
    place.tree = read_tree(place.comfy)
    path = f"{PAIRS}/{place.sets['animals']}"
    try:
        names = [one["name"] for one in place.ask("GET", PAIRS).read()["sets"]]
        assert "datasets/plain" in names
        for kind, at, slot in [("show", 0, 0), *steps]:
            shown = place.ask("GET", path)
            pairs = shown.read().get("pairs", [])
            if kind == "show":
                show_all(place, path, pairs)
            elif pairs:
                place.check(change_pair(place, path, kind, pairs[at % len(pairs)]["id"], slot))
    finally:
        place.tree = {}  # as some links lead to folders, all is written again


def show_all(place: Place, path: str, pairs: list[dict[str, Any]]) -> None:
    for pair in pairs:
        place.ask("GET", f"{path}/{pair['id']}/findings")
        for one in (pair["target"], *pair["references"]):
            if one is not None:
                place.ask("GET", f"{path}/{pair['id']}/images/{one['slot']}")


def change_pair(place: Place, path: str, kind: str, pair_id: str, slot: int) -> Answer:
    if kind == "upload":
        query = write_query({"name": "given.png", "slot": str(slot), "pair": pair_id})
        return place.ask("POST", f"{path}/images{query}", IMAGES["PNG"], IMAGE)
    if kind == "captions":
        return place.ask("POST", f"{path}/captions", to_json({"fill": "new words"}), JSON)
    options = {"caption": {"caption": "other words"}, "remove": {}}[kind]
    return place.ask("POST", f"{path}/{pair_id}/{kind}", to_json(options), JSON)


PLACES = st.sampled_from([*CHANGES, "upload", "show", "cache", "clean"])


@settings(max_examples=SHARE)
@given(METHODS, SETS, IDS, PLACES, HEADERS)
def test_any_method_and_headers_are_answered_and_only_our_changes_change_anything(
    place, method, name, pair, part, headers
):
    place.fill()
    path = f"{PAIRS}/{encode(place.get_set(name))}"
    if part in CHANGES:
        path, _ = describe_change(place, name, pair, part)
    more = {"upload": "/images?name=a.png&slot=0", "show": ""}
    path = {"cache": CACHE, "clean": f"{CACHE}/clean"}.get(part, path + more.get(part, ""))
    answer = place.routes.ask(method, path, b"[]", headers)
    assert answer.status < 500 or headers.get("Origin"), (answer.status, answer.body[:300])
    if answer.status == 200 and method == "GET" and is_route(name, path):
        answer.read()
    assert read_tree(place.comfy) == place.whole
