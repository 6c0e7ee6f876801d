"""Which files make a pair: the layouts of trainers, and reports on files that fit none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from demo_base.pair_folders import load_photograph, write_pairs, write_picture, write_text
from qwen_edit_lora.lora_core import ConfigError, FileError
from qwen_edit_lora.lora_core.pairs.graph_pairs import build_graph_pairs
from qwen_edit_lora.lora_core.pairs.layouts import find_pairs
from qwen_edit_lora.lora_core.pairs.pair import FoundPairs, Level


def find(folder: Path, *reference_folders: Path) -> FoundPairs:
    return find_pairs(
        folder,
        lambda path: path.resolve().is_relative_to(folder.parent.resolve()),
        reference_folders,
    )


def describe(found: FoundPairs) -> list[tuple]:
    """(name, target, references, caption) of each pair, files by their names."""
    return [
        (
            pair.name,
            pair.target.path.name,
            tuple(reference.path.name for reference in pair.references),
            pair.caption,
        )
        for pair in found.pairs
    ]


LAYOUTS = {
    "ai-toolkit, musubi-tuner": ("target/{}.png", "control/{}.png", "target/{}.txt"),
    "sd-scripts": ("images/{}.png", "conditioning/{}.png", "images/{}.caption"),
    "captions in a folder": ("after/{}.png", "before/{}.png", "captions/{}.txt"),
    "captions beside references": ("output/{}.jpg", "input/{}.png", "input/{}.txt"),
    "named folders": ("cats_target/{}.png", "cats_control/{}.png", "cats_target/{}.txt"),
    "targets in the root": ("{}.png", "control/{}.png", "{}.txt"),
    "captions in the root": ("edited/{}.webp", "source/{}.png", "{}.txt"),
    "deeper": ("target/a/{}.png", "control_images/a/{}.jpg", "target/a/{}.txt"),
    "endings in both folders": ("target/{}_end.png", "source/{}_start.png", "target/{}_end.txt"),
    "numbered control": ("target/{}.png", "control/{}_0.png", "target/{}.txt"),
    "fal": ("{}_end.png", "{}_start.png", "{}.txt"),
    "fal, caption by target": ("{}_end.png", "{}_start.png", "{}_end.txt"),
    "T2ITrainer": ("{}_T.png", "{}_R.png", "{}_T.txt"),
    "OneTrainer": ("{}.png", "{}-condlabel.png", "{}.txt"),
    "before and after": ("{} after.jpg", "{} before.jpg", "{} after.txt"),
    "bare target": ("{}.png", "{}_source.png", "{}.txt"),
    "a folder each": ("{}/target.png", "{}/source.png", "{}/prompt.txt"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_is_recognised_and_every_pair_complete(name, tmp_path):
    target, reference, caption = LAYOUTS[name]
    folder = write_pairs(tmp_path / "My set", 3, target, reference, caption)
    found = find(folder)
    assert found.problems == ()
    expected = [
        (
            Path(target.format(f"photo_{i}")).name,
            (Path(reference.format(f"photo_{i}")).name,),
            f"exchange red and blue, number {i}",
        )
        for i in range(3)
    ]
    assert [line[1:] for line in describe(found)] == expected
    assert len({pair.name for pair in found.pairs}) == 3
    assert found.layout


def test_names_keep_their_case_and_numbers_their_order(tmp_path):
    for name in ("Photo 10", "Photo 9", "photo 1"):
        write_picture(load_photograph(0), tmp_path / "set" / "Target" / f"{name}.PNG")
        write_picture(load_photograph(1), tmp_path / "set" / "Control" / f"{name.upper()}.png")
    found = find(tmp_path / "set")
    assert [pair.name for pair in found.pairs] == ["photo 1", "Photo 9", "Photo 10"]


@pytest.mark.parametrize(
    "references",
    [
        ("control_1/a.png", "control_2/a.png", "control_3/a.png"),
        ("control/a_0.png", "control/a_1.png", "control/a_10.png"),
        ("control/a.png", "control/a_1.png", "ref2/a.png"),
    ],
)
def test_several_references_come_in_their_order(references, tmp_path):
    folder = tmp_path / "set"
    write_picture(load_photograph(9), folder / "target" / "a.png")
    write_text(folder / "target" / "a.txt", "x")
    for index in (2, 0, 1):
        write_picture(load_photograph(index), folder / references[index])
    (pair,) = find(folder).pairs
    assert [str(r.path.relative_to(folder)) for r in pair.references] == list(references)


def test_numbered_endings_are_further_references_and_masks_are_masks(tmp_path):
    names = ("a_start3", "a_start", "a_start2", "a_end", "a_mask")
    for index, name in enumerate(names):
        write_picture(load_photograph(index), tmp_path / "set" / f"{name}.png")
    (pair,) = find(tmp_path / "set").pairs
    assert [r.name for r in pair.references] == ["a_start.png", "a_start2.png", "a_start3.png"]
    assert pair.mask is not None
    assert pair.mask.name == "a_mask.png"


def test_reference_folders_outside_the_folder_are_taken_in_order(tmp_path):
    write_pairs(tmp_path, 2, "mine/{}.png", "first/{}.png", "mine/{}.txt")
    write_pairs(tmp_path, 2, "unused/{}.png", "second/{}.jpg", None)
    found = find(tmp_path / "mine", tmp_path / "second", tmp_path / "first")
    assert [[str(r.path.relative_to(tmp_path)) for r in p.references] for p in found.pairs] == [
        [f"second/photo_{i}.jpg", f"first/photo_{i}.png"] for i in range(2)
    ]
    assert found.pairs[1].caption == "exchange red and blue, number 1"


METADATA = {
    "DiffSynth": ("metadata.csv", "image", "edit_image", "prompt"),
    "DiffSynth list": ("metadata.json", "image", "edit_image[]", "prompt"),
    "musubi-tuner": ("metadata.jsonl", "image_path", "control_path", "caption"),
    "musubi-tuner numbered": ("dataset.jsonl", "image_path", "control_path_0", "caption"),
    "Hugging Face": ("metadata.jsonl", "file_name", "conditioning_image", "text"),
    "InstructPix2Pix": ("train.jsonl", "edited_image", "original_image", "edit_prompt"),
    "source and image": ("metadata.jsonl", "target", "image", "instruction"),
}


@pytest.mark.parametrize("name", METADATA)
def test_a_metadata_file_names_the_pairs(name, tmp_path):
    file, target, reference, caption = METADATA[name]
    folder = write_pairs(tmp_path / "set", 2, "x/{}.png", "y/{}.png", None)
    rows = []
    for index in (1, 0):
        source = f"y/photo_{index}.png"
        value = [source] if reference.endswith("[]") else source
        rows.append(
            {
                target: f"x/photo_{index}.png",
                reference.removesuffix("[]"): value,
                caption: f'say "{index}",\nplease',
            }
        )
    path = folder / file
    if path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        import csv

        with path.open("w", newline="", encoding="utf-8-sig") as out:
            writer = csv.DictWriter(out, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    found = find(folder)
    assert file in found.layout
    assert describe(found) == [
        (f"photo_{i}", f"photo_{i}.png", (f"photo_{i}.png",), f'say "{i}",\nplease') for i in (1, 0)
    ]
    assert [p.target.path.parent.name for p in found.pairs] == ["x", "x"]


def test_metadata_that_leads_outside_or_nowhere_is_an_error_per_row(tmp_path):
    folder = write_pairs(tmp_path / "roots" / "set", 1, "x/{}.png", "y/{}.png", None)
    write_picture(load_photograph(0), tmp_path / "secret.png")
    rows = [
        {"image": "x/photo_0.png", "edit_image": str(tmp_path / "secret.png"), "prompt": "a"},
        {"image": "../../secret.png", "edit_image": "y/photo_0.png", "prompt": "a"},
        {"image": "x/none.png", "edit_image": "y/photo_0.png", "prompt": "a"},
        {"image": "x/photo_0.png", "prompt": "a"},
        ["x"],
    ]
    first = {"image": "x/photo_0.png", "edit_image": "y/photo_0.png", "prompt": "good"}
    lines = "\n".join(map(json.dumps, [first, *rows]))
    write_text(folder / "metadata.jsonl", lines)
    found = find(folder)
    assert [pair.caption for pair in found.pairs] == ["good"]
    texts = [problem.text for problem in found.problems]
    assert [problem.level for problem in found.problems] == [Level.STOP] * 5
    assert "leads outside the allowed folders" in texts[0]
    assert "leads outside the allowed folders" in texts[1]
    assert "x/none.png, which does not exist" in texts[2]
    assert "row 5, lacks a target or a reference" in texts[3]
    assert "row 6, is a list; expected an object" in texts[4]


def test_missing_partners_are_named(tmp_path):
    folder = write_pairs(tmp_path / "set", 3)
    (folder / "control" / "photo_1.png").unlink()
    (folder / "target" / "photo_2.png").unlink()
    write_text(folder / "target" / "photo_8.txt", "whose?")
    found = find(folder)
    assert [pair.name for pair in found.pairs] == ["photo_0"]
    texts = [problem.text for problem in found.problems if problem.level == Level.STOP]
    assert any(t.startswith("target/photo_1.png has no reference; add") for t in texts)
    assert any(t.startswith("control/photo_2.png has no target; add") for t in texts)
    (unused,) = [problem.text for problem in found.problems if problem.level == Level.WARNING]
    assert unused == "text files that belong to no pair: 1, such as target/photo_8.txt"


def test_two_targets_or_four_references_are_refused(tmp_path):
    folder = write_pairs(tmp_path / "set", 2)
    write_picture(load_photograph(7), folder / "target" / "photo_0.jpg")
    for number in range(3):
        write_picture(load_photograph(number), folder / "control" / f"photo_1_{number}.png")
    found = find(folder)
    assert found.pairs == ()
    texts = [problem.text for problem in found.problems]
    assert any(
        "target/photo_0.jpg and target/photo_0.png are targets of the same name" in t
        or "target/photo_0.png and target/photo_0.jpg are targets of the same name" in t
        for t in texts
    )
    assert any("photo_1.png has 4 references; expected at most 3" in t for t in texts)


def test_a_link_that_leads_outside_is_refused_and_linked_folders_are_not_entered(tmp_path):
    folder = write_pairs(tmp_path / "roots" / "set", 2)
    outside = write_pairs(tmp_path / "elsewhere", 1)
    target = folder / "target" / "photo_0.png"
    target.unlink()
    target.symlink_to(outside / "target" / "photo_0.png")
    caption = folder / "target" / "photo_1.txt"
    caption.unlink()
    caption.symlink_to(outside / "target" / "photo_0.txt")
    (folder / "ref2").symlink_to(outside / "control", target_is_directory=True)
    found = find(folder)
    assert found.pairs == ()
    texts = [problem.text for problem in found.problems]
    assert [t.split(" leads")[0] for t in texts[:2]] == ["photo_0.png", "photo_1.txt"]
    assert all("leads outside the allowed folders" in t for t in texts[:2])
    assert texts[2].startswith("links to folders that are not followed: 1, such as ref2; they lead")


def test_folders_without_pairs_are_a_clear_error(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    with pytest.raises(FileError, match="set holds no images; expected pairs"):
        find(folder)
    write_picture(load_photograph(0), folder / "a.png")
    with pytest.raises(FileError, match="set holds one image; expected pairs"):
        find(folder)
    write_picture(load_photograph(1), folder / "b.png")
    with pytest.raises(FileError, match="whose names form no pairs; expected folders such as"):
        find(folder)
    for name in ("target", "after"):
        write_picture(load_photograph(0), folder / name / "a.png")
    with pytest.raises(FileError, match="several folders of targets"):
        find(folder)
    write_text(folder / "metadata.jsonl", '{"image": "a.png", ')
    with pytest.raises(FileError, match=r"^metadata.jsonl, row 1, cannot be read as JSON"):
        find(folder)


def test_captions_are_read_completely_without_marks_or_reported_unreadable(tmp_path):
    folder = write_pairs(tmp_path / "set", 4, caption=None)
    (folder / "target" / "photo_0.txt").write_bytes(b"\xef\xbb\xbf make it red\r\nand blue \r\n")
    (folder / "target" / "photo_1.txt").write_bytes(b"\xff\xfe\x00")
    (folder / "target" / "photo_2.txt").write_bytes(b"x" * 70_000)
    found = find(folder)
    captions = {pair.name: pair.caption for pair in found.pairs}
    assert captions["photo_0"].split() == ["make", "it", "red", "and", "blue"]
    assert captions == {"photo_0": captions["photo_0"], "photo_3": None}
    texts = [problem.text for problem in found.problems]
    assert texts[0].startswith("photo_1.txt is UTF-16 text; save it again as UTF-8")
    assert "70,000 bytes" in texts[1]


def test_emoji_names_are_read_and_hidden_files_ignored(tmp_path):
    folder = write_pairs(
        tmp_path / "set", 1, "target/🐈 {}.png", "control/🐈 {}.png", "target/🐈 {}.txt"
    )
    write_picture(load_photograph(3), folder / "target" / "._photo.png")
    write_picture(load_photograph(3), folder / "__MACOSX" / "target" / "x.png")
    write_text(folder / "target" / "README.txt", "about")
    (pair,) = find(folder).pairs
    assert pair.name == "🐈 photo_0"
    assert find(folder).problems == ()


def test_images_of_a_graph_are_paired_by_number():
    import numpy as np

    pictures = [np.full((4, 4, 3), i / 10, np.float32) for i in range(3)]
    found = build_graph_pairs(pictures, [pictures[::-1], pictures[:1]], ["a\n\nb\n c "])
    assert [pair.caption for pair in found.pairs] == ["a", "b", "c"]
    assert [pair.references[0].read()[0, 0, 0] for pair in found.pairs] == [
        pytest.approx(v) for v in (0.2, 0.1, 0.0)
    ]
    assert all(pair.references[1].read() is pictures[0] for pair in found.pairs)
    assert {p.caption for p in build_graph_pairs(pictures, [pictures], ["one"]).pairs} == {"one"}
    assert [p.caption for p in build_graph_pairs(pictures, [pictures], [""]).pairs] == [None] * 3
    with pytest.raises(ConfigError, match="captions holds 2 lines and targets 3 images"):
        build_graph_pairs(pictures, [pictures], ["a", "b"])
    with pytest.raises(ConfigError, match="reference_1 holds 2 images and targets 3"):
        build_graph_pairs(pictures, [pictures[:2]], ["a"])
    with pytest.raises(ConfigError, match="no references; connect"):
        build_graph_pairs(pictures, [], ["a"])
