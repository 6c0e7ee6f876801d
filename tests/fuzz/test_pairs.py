"""Generated folders of pairs must be read correctly, or refused with one short sentence.

The oracle for a list is the row it was written from; for an image, Pillow itself. Any error outside
our own family fails the test, as does a message that cannot be shown.
"""

from __future__ import annotations

import csv
import io
import json
import os
import random
import re
import tempfile
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from qwen_edit_lora.lora_core import LoraError
from qwen_edit_lora.lora_core.pairs.graph_pairs import split_captions
from qwen_edit_lora.lora_core.pairs.images import FileImage
from qwen_edit_lora.lora_core.pairs.layouts import find_pairs
from qwen_edit_lora.lora_core.pairs.pair import INVISIBLE, FoundPairs, clean_caption, read_caption
from qwen_edit_lora.lora_core.pairs.preflight import LEAVE_OUT, STOP, Preflight, check_pairs
from qwen_edit_lora.lora_core.pairs.preview import build_table, describe_preflight

MAX_MESSAGE = 400
SHARE = settings.default.max_examples


@contextmanager
def make_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "roots", "set")
        folder.mkdir(parents=True)
        yield folder


def is_inside(root: Path):
    return lambda path: path.resolve().is_relative_to(root.resolve())


def check_text(text: str) -> None:
    """It can be shown anywhere."""
    assert 0 < len(text) <= MAX_MESSAGE, text
    assert all(line.isprintable() for line in text.split("\n")), repr(text)


def find(folder: Path) -> FoundPairs | None:
    """None if it is refused, which is allowed."""
    try:
        found = find_pairs(folder, is_inside(folder.parent))
    except LoraError as e:
        check_text(str(e))
        return None
    for problem in found.problems:
        check_text(problem.text)
        assert problem.kind
        assert problem.count > 0
    assert len(found.layout) <= MAX_MESSAGE
    return found


def check(found: FoundPairs, on_problem: str = STOP) -> Preflight | None:
    try:
        preflight = check_pairs(
            found, name="set", megapixels=0.01, max_references=3, on_problem=on_problem
        )
        describe_preflight(preflight)
        build_table(preflight)
        for problem in preflight.problems:
            check_text(problem.text)
        json.dumps(preflight.to_dict(), allow_nan=False)
        preflight.raise_stops()
    except LoraError as e:
        check_text(str(e))
        return None
    return preflight


# --- folders ---

WORDS = (
    *("target", "control", "after", "before", "a", "a_start", "a_end", "a_end2", "before_1"),
    *("after_1", "mask", "captions", "prompt", "notes", "images", "edit", "A", "B", "train"),
    *("control_2", "a_2", "x_original", "a-condlabel", "garment", "a_R", "a_T", "café"),
)
NAMES = st.one_of(
    st.sampled_from(WORDS),
    st.sampled_from(WORDS).map(lambda word: unicodedata.normalize("NFD", word).upper()),
    st.text(st.characters(exclude_characters="/\0", exclude_categories=("Cs",)), max_size=20),
).filter(lambda name: name not in ("", ".", ".."))
SUFFIXES = st.sampled_from(
    [".png", ".jpg", ".txt", ".caption", ".json", ".jsonl", ".csv", ".tsv", ".heic", ".PNG", ""]
)
PATHS = st.lists(NAMES, min_size=1, max_size=3)
BYTES = st.one_of(
    st.binary(max_size=60),
    st.sampled_from([b"", b"make it red", b"\xff\xfe\0", b"\xef\xbb\xbfx", b'{"prompt": "x"}']),
)


def build_png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


PNGS = [build_png(seed) for seed in range(6)]
KINDS = st.sampled_from(["file", "file", "file", "file", "picture", "link", "pipe"])
FILES = st.lists(st.tuples(PATHS, SUFFIXES, KINDS, BYTES, st.integers(0, 5)), max_size=14)


def write_files(folder: Path, files) -> None:
    for parts, suffix, kind, content, number in files:
        path = folder.joinpath(*parts[:-1], parts[-1] + suffix)
        try:
            # Never through a link that leads out, and never into a pipe, which would wait.
            if os.path.lexists(path) or not path.parent.resolve().is_relative_to(folder.resolve()):
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            if kind == "link":
                targets = [folder, folder.parent, Path("/"), folder / "target", path]
                path.symlink_to(targets[number % len(targets)])
            elif kind == "pipe" and hasattr(os, "mkfifo"):
                os.mkfifo(path)
            elif path.suffix.lower() in (".png", ".jpg") and kind == "file":
                path.write_bytes(PNGS[number])
            else:
                path.write_bytes(content)
        except (OSError, ValueError, RuntimeError):  # no name for this disk, or there already
            continue


@settings(max_examples=SHARE)
@given(FILES)
def test_any_folder_is_read_or_refused_with_a_message(files):
    with make_folder() as folder:
        write_files(folder, files)
        found = find(folder)
        if found is not None:
            check(found)
            check(found, LEAVE_OUT)


@settings(max_examples=SHARE // 2)
@given(FILES)
def test_every_image_is_in_a_pair_or_reported(files):
    with make_folder() as folder:
        for index in range(2):  # so that there is a layout at all
            for side in ("target", "control"):
                path = folder / side / f"good_{side}_{index}.png".replace(f"_{side}", "")
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(PNGS[index])
        files = [file for file in files if file[2] not in ("link", "pipe") and file[1] != ".jsonl"]
        write_files(folder, files)
        found = find(folder)
        if found is None or "listed in" in found.layout:
            return
        used = {picture.path for pair in found.pairs for picture in pair.images}
        there = [
            path
            for path in folder.rglob("*")
            if path.suffix.lower() in (".png", ".jpg")
            and path.is_file()
            and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        ]
        if len(used) < len(there):
            kinds = {"pair_unusable", "pictures_unused", "masks_unused"}
            assert kinds & {problem.kind for problem in found.problems}


# --- lists ---

TEXTS = st.text(st.characters(exclude_categories=("Cs",)), max_size=30)
COLUMNS = ("image", "edit_image", "control_path_2", "edit_image_1", "mask", "prompt", "text", "x")
CELLS = st.one_of(
    st.sampled_from(["p.png", "q.png", "r.png", "../p.png", "/etc/passwd", "p.heic", "a" * 300]),
    TEXTS,
    st.none(),
    st.integers(),
    st.floats(),
    st.lists(st.sampled_from(["p.png", "q.png", 3, None]), max_size=3),
    st.dictionaries(TEXTS, TEXTS, max_size=2),
)
ROWS = st.lists(
    st.one_of(
        st.dictionaries(st.one_of(st.sampled_from(COLUMNS), TEXTS), CELLS, max_size=6),
        CELLS,
    ),
    max_size=6,
)


def write_three(folder: Path) -> None:
    for name, content in zip(("p.png", "q.png", "r.png"), PNGS, strict=False):
        (folder / name).write_bytes(content)


@settings(max_examples=SHARE)
@given(ROWS, st.sampled_from(["metadata.jsonl", "free.jsonl", "data.json", "key.json"]))
def test_any_list_is_read_or_refused_with_a_message(rows, name):
    with make_folder() as folder:
        write_three(folder)
        if name.endswith("jsonl"):
            text = "\n".join(map(json.dumps, rows))
        else:
            text = json.dumps({"rows": rows} if name == "key.json" else rows)
        (folder / name).write_text(text)
        found = find(folder)
        if found is not None:
            for pair in found.pairs:
                assert pair.caption is None or isinstance(pair.caption, str)
                assert all(picture.path.parent == folder for picture in pair.images)
            check(found, LEAVE_OUT)


@settings(max_examples=SHARE // 2)
@given(st.binary(max_size=300), st.sampled_from(["metadata.jsonl", "metadata.csv", "x.tsv"]))
def test_noise_in_place_of_a_list_is_an_error(content, name):
    with make_folder() as folder:
        write_three(folder)
        (folder / name).write_bytes(content)
        find(folder)


@settings(max_examples=SHARE)
@given(
    st.lists(TEXTS, min_size=1, max_size=5),
    st.sampled_from(["jsonl", "json", "csv", "tsv", "semicolons"]),
    st.permutations([1, 2, 3]),
    st.booleans(),
)
def test_a_valid_list_gives_the_captions_and_the_order_it_was_written_with(
    captions, kind, order, is_crlf
):
    assume(kind in ("jsonl", "json") or not any("\0" in caption for caption in captions))
    names = {1: "q.png", 2: "r.png", 3: "p.png"}
    rows = [
        {"image": "p.png", **{f"edit_image_{n}": names[n] for n in order}, "prompt": caption}
        for caption in captions
    ]
    with make_folder() as folder:
        write_three(folder)
        end = "\r\n" if is_crlf else "\n"
        if kind == "jsonl":
            lines = [json.dumps(row, ensure_ascii=False) for row in rows]
            data, name = end.join(lines), "metadata.jsonl"
        elif kind == "json":
            data, name = json.dumps(rows, ensure_ascii=False), "metadata.json"
        else:
            out = io.StringIO(newline="")
            delimiter = {"csv": ",", "tsv": "\t", "semicolons": ";"}[kind]
            writer = csv.DictWriter(
                out, rows[0], delimiter=delimiter, lineterminator=end, quoting=csv.QUOTE_ALL
            )
            writer.writeheader()
            writer.writerows(rows)
            data, name = out.getvalue(), "list.tsv" if kind == "tsv" else "list.csv"
        (folder / name).write_bytes(data.encode())
        found = find(folder)
        assert found is not None
        assert [pair.caption for pair in found.pairs] == list(map(clean_caption, captions))
        for pair in found.pairs:
            assert [r.path.name for r in pair.references] == ["q.png", "r.png", "p.png"]


@settings(max_examples=SHARE)
@given(st.lists(TEXTS.filter(clean_caption), min_size=2, max_size=5))
def test_a_text_file_gives_each_target_its_own_line(captions):
    lines = [caption.replace("\r", " ").replace("\n", " ") for caption in captions]
    assert split_captions(["\n".join(lines)], len(lines)) == [line.strip() for line in lines]


# --- captions and images ---


@settings(max_examples=SHARE // 2)
@given(st.one_of(BYTES, TEXTS.map(str.encode)), st.sampled_from([".txt", ".caption", ".json"]))
def test_any_caption_is_read_or_refused_with_a_message(content, suffix):
    with make_folder() as folder:
        path = folder / f"a{suffix}"
        path.write_bytes(content)
        try:
            caption = read_caption(path, lambda path: True)
        except LoraError as e:
            check_text(str(e))
            return
        if suffix != ".json":
            text = "\n".join(re.split(r"\r\n|\r|\n", content.decode("utf-8-sig"))).strip()
            is_blank = not any(c.isalnum() and c not in INVISIBLE for c in text)
            assert caption == text or (caption == "" and is_blank)
        assert caption is None or (caption == caption.strip() and "\r" not in caption)


FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "TGA", "ICO", "EPS", "PDF", "PCX")


@settings(max_examples=SHARE)
@given(
    st.sampled_from(FORMATS),
    st.sampled_from(["RGB", "L", "P", "1", "RGBA", "LA", "CMYK", "I", "F", "I;16"]),
    st.integers(1, 40),
    st.integers(1, 40),
    st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), max_size=6),
    st.integers(0, 9),
)
def test_an_image_with_flipped_bytes_is_complete_or_an_error(
    kind, mode, width, height, flips, orientation
):
    image = Image.new("RGB", (width, height))
    image.putdata([(x % 256, x % 7 * 30, x % 11 * 20) for x in range(width * height)])
    try:
        image = (
            Image.new(mode, (width, height)) if mode in ("I", "F", "I;16") else image.convert(mode)
        )
        out = io.BytesIO()
        exif = Image.Exif()
        exif[0x0112] = orientation
        image.save(out, kind, exif=exif)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError):
        assume(False)
    data = bytearray(out.getvalue())
    for place, value in flips:
        data[place % len(data)] = value
    with make_folder() as folder:
        path = folder / "a.png"
        path.write_bytes(data)
        picture = FileImage(path)
        for read in (
            picture.read_header,
            picture.read,
            lambda: picture.read_small(16),
            lambda: list(picture.read_bands()),
        ):
            try:
                value = read()
            except LoraError as e:
                check_text(str(e))
                continue
            assert kind not in ("PPM", "TGA", "ICO", "EPS", "PDF", "PCX") or flips
            if isinstance(value, np.ndarray):
                assert value.ndim == 3
                assert value.shape[2] == 3


@pytest.mark.parametrize("seed", range(3))
def test_exponentially_many_links_terminate(seed):
    generator = random.Random(seed)
    with make_folder() as folder:
        names = [folder / f"f{index}" for index in range(24)]
        for name in names:
            name.mkdir()
            (name / "a.png").write_bytes(PNGS[0])
        for name in names:
            for index in range(3):
                (name / f"l{index}").symlink_to(generator.choice(names))
        found = find(folder)
        assert found is None
