"""Files that list pairs: from any program, each cell is used as written or reported."""

from __future__ import annotations

import csv
import json
import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import pytest
from demo_base.pair_folders import load_photograph, write_pairs, write_picture, write_text
from qwen_edit_lora.lora_core import FileError
from qwen_edit_lora.lora_core.pairs.graph_pairs import build_graph_pairs
from qwen_edit_lora.lora_core.pairs.layouts import find_pairs
from qwen_edit_lora.lora_core.pairs.pair import FoundPairs, Level

ROW = {"image": "x/photo_0.png", "edit_image": "y/photo_0.png", "prompt": "make it red"}


def find(folder: Path, *reference_folders: Path) -> FoundPairs:
    return find_pairs(folder, lambda path: True, reference_folders)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_pairs(tmp_path / "set", 3, "x/{}.png", "y/{}.png", None)


def write_rows(path: Path, rows: Sequence[object]) -> Path:
    return write_text(path, "\n".join(json.dumps(row, ensure_ascii=False) for row in rows))


def list_kinds(found: FoundPairs, level: Level) -> list[str]:
    return [problem.kind for problem in found.problems if problem.level == level]


@pytest.mark.parametrize(
    "columns",
    [
        ("edit_image_2", "edit_image_1"),
        ("control_path_10", "control_path_9"),
        ("reference2", "reference"),
        ("Control Image 2", "Control Image 1"),
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_references_come_in_the_order_of_their_numbers_not_of_the_columns(kind, columns, folder):
    row = {"image": "x/photo_0.png", columns[0]: "y/photo_2.png", columns[1]: "y/photo_1.png"}
    row["prompt"] = "a"
    path = folder / f"metadata.{kind}"
    if kind == "csv":
        with path.open("w", newline="", encoding="utf-8") as out:
            writer = csv.DictWriter(out, row)
            writer.writeheader()
            writer.writerow(row)
    else:
        write_text(path, json.dumps([row] if kind == "json" else row))
    (pair,) = find(folder).pairs
    assert [reference.path.name for reference in pair.references] == ["photo_1.png", "photo_2.png"]


@pytest.mark.parametrize("caption", [["make it warm", "b"], {"en": "make it warm"}, 5, True])
def test_a_caption_that_is_not_text_is_not_a_caption(caption, folder):
    write_rows(folder / "metadata.jsonl", [ROW, {**ROW, "prompt": caption}])
    found = find(folder)
    assert [pair.caption for pair in found.pairs] == ["make it red"]
    (text,) = [problem.text for problem in found.problems if problem.level == Level.STOP]
    assert text.startswith("the caption in metadata.jsonl, row 2 is ")
    assert "expected text" in text


def test_nan_as_a_caption_is_a_problem_and_words_for_none_are_warned_about(folder):
    from qwen_edit_lora.lora_core.pairs.preflight import check_pairs

    rows = [ROW, {**ROW, "prompt": float("nan")}]
    write_rows(folder / "metadata.jsonl", rows)
    found = find(folder)
    assert [pair.caption for pair in found.pairs] == ["make it red"]
    (text,) = [problem.text for problem in found.problems if problem.level == Level.STOP]
    assert text.startswith("metadata.jsonl, row 2, cannot be read as JSON: it holds NaN")
    (folder / "metadata.jsonl").unlink()
    lines = [f"x/photo_{i}.png,y/photo_{i}.png,{c}" for i, c in enumerate(("nan", "['a'; 'b']"))]
    write_text(folder / "metadata.csv", "image,edit_image,prompt\n" + "\n".join(lines))
    found = find(folder)
    checked = check_pairs(found, name="set", megapixels=0.01, max_references=3)
    assert sum(problem.kind == "caption_not_text" for problem in checked.problems) == 2


def test_half_a_character_in_a_caption_is_a_problem_of_its_pair(folder):
    from qwen_edit_lora.lora_core.pairs.preflight import check_pairs

    rows = [ROW, {**ROW, "image": "x/photo_1.png", "prompt": "make it \ud83d red"}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    checked = check_pairs(find(folder), name="set", megapixels=0.01, max_references=3)
    assert [one.pair.name for one in checked.pairs] == ["photo_0"]
    assert "half of a surrogate pair" in checked.stops[0].text


def test_the_first_caption_column_with_text_counts_and_empty_ones_do_not(folder):
    rows = [
        {**ROW, "prompt": "", "text": "from text"},
        {**ROW, "prompt": None, "text": "from text"},
        {**ROW, "prompt": "  "},
        {**ROW, "prompt": None},
    ]
    write_rows(folder / "metadata.jsonl", rows)
    captions = [pair.caption for pair in find(folder).pairs]
    assert captions == ["from text", "from text", "", None]


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_only_a_newline_ends_a_line(mark, folder):
    import numpy as np

    caption = f"make it{mark}red"
    if mark > "\x20":
        write_rows(folder / "metadata.jsonl", [{**ROW, "prompt": caption}, ROW])
        assert [pair.caption for pair in find(folder).pairs] == [caption, "make it red"]
    pictures = [np.zeros((2, 2, 3), np.float32)] * 2
    found = build_graph_pairs(pictures, [pictures], [caption])
    assert [pair.caption for pair in found.pairs] == [caption, caption]


@pytest.mark.parametrize("column", ["mask", "mask_path", "mask_image", "Mask"])
def test_a_column_of_masks_is_used(column, folder):
    write_picture(load_photograph(0), folder / "m.png")
    write_rows(folder / "metadata.jsonl", [{**ROW, column: "m.png"}])
    found = find(folder)
    (pair,) = found.pairs
    assert pair.mask is not None
    assert pair.mask.path == folder / "m.png"
    assert "columns_unused" not in list_kinds(found, Level.WARNING)


def test_a_column_of_images_that_is_not_used_is_named(folder):
    write_rows(folder / "metadata.jsonl", [{**ROW, "garment": "y/photo_1.png"}, ROW])
    (problem,) = [p for p in find(folder).problems if p.kind == "columns_unused"]
    assert problem.level == Level.WARNING
    assert "not used: garment, in 1 rows" in problem.text


def test_images_that_a_list_leaves_out_are_counted(folder):
    write_rows(folder / "metadata.jsonl", [ROW])
    (problem,) = find(folder).problems
    assert (problem.kind, problem.level, problem.count) == ("pictures_unlisted", Level.NOTE, 4)


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_a_list_finds_a_file_in_another_unicode_normalization(forms, folder):
    on_disk, named = (unicodedata.normalize(form, "y/café é.png") for form in forms)
    write_picture(load_photograph(0), folder / on_disk)
    write_rows(folder / "metadata.jsonl", [{**ROW, "edit_image": named}])
    (pair,) = find(folder).pairs
    assert pair.references[0].path.is_file()


def write_variant(folder: Path, name: str) -> None:
    files = {
        "a free name": ("pose_transfer_v1.jsonl", json.dumps(ROW)),
        "tabs": ("metadata.tsv", "image\tedit_image\tprompt\n{0}\t{1}\t{2}"),
        "semicolons": ("metadata.csv", "image;edit_image;prompt\n{0};{1};{2}"),
        "capitals and blanks": ("data.csv", "Image , Edit Image, Prompt\n{0} , {1}, {2}"),
        "below a key": ("metadata.json", json.dumps({"version": 1, "data": [ROW]})),
        "no reference first": (
            "metadata.jsonl",
            json.dumps({"image": "x/photo_1.png"}) + "\n" + json.dumps(ROW),
        ),
        "words": (
            "list.jsonl",
            json.dumps({"after_file": ROW["image"], "Before-Image": ROW["edit_image"]})[:-1]
            + ', "caption": "make it red"}',
        ),
        "a Python list": ("metadata.csv", "image,edit_image,prompt\n{0},['{1}'],{2}"),
        "Windows": ("metadata.csv", "image,edit_image,prompt\r\n{0},{1},{2}\r\n"),
        "a byte order mark": ("metadata.jsonl", "\ufeff" + json.dumps(ROW)),
    }
    file, text = files[name]
    if not file.endswith(("jsonl", "json")):
        text = text.format(*ROW.values())
    write_text(folder / file, text)


@pytest.mark.parametrize(
    "name",
    [
        *("a free name", "tabs", "semicolons", "capitals and blanks", "below a key"),
        *("no reference first", "words", "a Python list", "Windows", "a byte order mark"),
    ],
)
def test_a_list_is_read_whatever_its_name_its_delimiter_and_its_headers(name, folder):
    for kind in ("image", "edit"):  # two folders that could both be of targets
        write_picture(load_photograph(1), folder / kind / "z.png")
    write_variant(folder, name)
    found = find(folder)
    (pair,) = found.pairs
    assert (pair.target.path, pair.caption) == (folder / "x/photo_0.png", "make it red")
    assert [reference.path for reference in pair.references] == [folder / "y/photo_0.png"]
    assert "listed in" in found.layout


def test_a_list_that_cannot_be_used_is_named_where_nothing_else_fits(folder):
    write_text(folder / "poses.csv", "picture,made_from,prompt\nx/photo_0.png,y/photo_0.png,red")
    with pytest.raises(FileError) as caught:
        find(folder)
    assert "Besides: poses.csv is not used" in str(caught.value)
    assert "columns: picture, made_from, prompt" in str(caught.value)
    assert len(str(caught.value)) <= 400


def test_a_list_of_another_name_without_files_does_not_affect_folders(tmp_path):
    folder = write_pairs(tmp_path / "set", 2)
    row = {"image": "https://example.org/a.png", "edit_image": "b.png"}
    write_rows(folder / "where_from.jsonl", [row])
    found = find(folder)
    assert len(found.pairs) == 2
    (problem,) = found.problems
    assert (problem.kind, problem.level) == ("list_unused", Level.WARNING)
    write_rows(folder / "metadata.jsonl", [row])
    found = find(folder)
    assert found.pairs == ()
    assert "which does not exist" in found.problems[0].text


def test_a_second_list_and_unreadable_ones_are_warned_about(folder):
    write_rows(folder / "metadata.jsonl", [ROW])
    write_rows(folder / "other.jsonl", [ROW])
    write_text(folder / "broken.jsonl", "{")
    write_text(folder / "config.json", '{"a": 1}')
    found = find(folder)
    assert len(found.pairs) == 1
    assert set(list_kinds(found, Level.WARNING)) == {"list_unused", "list_unreadable"}
    assert "list_other" in list_kinds(found, Level.NOTE)


def test_an_unquoted_comma_and_an_open_quote_never_lose_text_silently(folder):
    rows = "x/photo_0.png,y/photo_0.png,make it red, please\nx/photo_1.png,y/photo_1.png,blue,"
    write_text(folder / "metadata.csv", f"image,edit_image,prompt\n{rows}")
    found = find(folder)
    assert [pair.caption for pair in found.pairs] == ["blue"]
    (text,) = [problem.text for problem in found.problems if problem.level == Level.STOP]
    assert "row 1, has 4 cells, but the header has 3" in text
    write_text(
        folder / "metadata.csv",
        'image,edit_image,prompt\nx/photo_0.png,y/photo_0.png,"make it\n'
        "x/photo_1.png,y/photo_1.png,b",
    )
    with pytest.raises(FileError, match=r"metadata\.csv is damaged \(unexpected end of data\)"):
        find(folder)


def test_one_damaged_line_is_one_problem(folder):
    write_text(folder / "metadata.jsonl", json.dumps(ROW) + '\n{"image": "x\n' + json.dumps(ROW))
    found = find(folder)
    assert len(found.pairs) == 2
    assert list_kinds(found, Level.STOP) == ["pair_unusable"]


@pytest.mark.parametrize(
    "value",
    ["a" * 5000 + ".png", "['a', 'b" + "x" * 400 + "']", "\ud800.png", "a\0.png", 7, {}, [7]],
)
@pytest.mark.parametrize("column", ["image", "edit_image", "mask"])
def test_a_cell_that_names_no_file_is_a_short_error(column, value, folder):
    path = folder / "metadata.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in (ROW, {**ROW, column: value})))
    found = find(folder)
    texts = [problem.text for problem in found.problems if problem.level == Level.STOP]
    if value or column != "mask":
        assert len(texts) == 1
    assert all(len(text) <= 400 and text.isprintable() for text in texts)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes on this system")
def test_a_pipe_as_a_list_is_a_clear_error(folder):
    os.mkfifo(folder / "metadata.jsonl")
    with pytest.raises(FileError, match=r"metadata.jsonl is a pipe, socket or device"):
        find(folder)
