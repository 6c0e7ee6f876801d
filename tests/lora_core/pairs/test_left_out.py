"""Unused files of a folder, or files used by a rule that may be wrong, are always reported."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest
from demo_base.pair_folders import load_photograph, write_pairs, write_picture, write_text
from qwen_edit_lora.lora_core import FileError
from qwen_edit_lora.lora_core.pairs.layouts import find_pairs
from qwen_edit_lora.lora_core.pairs.pair import FoundPairs, Level, Problem
from qwen_edit_lora.lora_core.pairs.preflight import check_pairs
from qwen_edit_lora.lora_core.pairs.preview import describe_preflight


def find(folder: Path, *reference_folders: Path) -> FoundPairs:
    return find_pairs(
        folder,
        lambda path: path.resolve().is_relative_to(folder.parent.resolve()),
        reference_folders,
    )


def get_problem(found: FoundPairs, kind: str) -> Problem:
    (problem,) = [problem for problem in found.problems if problem.kind == kind]
    return problem


def add_picture(path: Path, index: int = 5) -> Path:
    return write_picture(load_photograph(index), path)


# --- unintended references ---


def test_a_reference_of_the_same_name_and_another_suffix_is_reported(tmp_path):
    folder = write_pairs(tmp_path / "set", 3)
    add_picture(folder / "control" / "photo_1.jpg")
    problem = get_problem(find(folder), "references_same_name")
    assert problem.level == Level.WARNING
    assert problem.count == 2
    assert "control/photo_1.jpg, control/photo_1.png" in problem.text


def test_a_reference_whose_target_was_deleted_is_reported(tmp_path):
    folder = write_pairs(tmp_path / "set", 2, "target/cat{}.png", "control/cat{}.png", None)
    add_picture(folder / "control" / "catphoto_0_2.png")
    problem = get_problem(find(folder), "references_odd")
    assert problem.level == Level.WARNING
    assert "than the 1 of the others: 1, such as catphoto_0 with" in problem.text
    assert "control/catphoto_0_2.png" in problem.text


def test_a_pair_missing_one_of_two_references_is_reported_but_a_mixed_set_is_not(tmp_path):
    folder = write_pairs(tmp_path / "set", 6, reference="control_1/{}.png")
    write_pairs(folder, 6, reference="control_2/{}.png")
    assert find(folder).problems == ()
    (folder / "control_2" / "photo_3.png").unlink()
    assert get_problem(find(folder), "references_odd").count == 1
    for index in (0, 1):
        (folder / "control_2" / f"photo_{index}.png").unlink()
    assert find(folder).problems == ()


def test_a_second_mask_is_reported(tmp_path):
    folder = write_pairs(tmp_path / "set", 2)
    for place in ("mask/photo_0.png", "masks/photo_0.png"):
        add_picture(folder / place)
    assert get_problem(find(folder), "masks_unused").count == 1


# --- captions ---


@pytest.mark.parametrize("other", ["notes.txt", "a_memo.txt", "info.txt"])
def test_in_a_folder_for_each_pair_the_instruction_is_the_file_that_says_so(other, tmp_path):
    folder = write_pairs(tmp_path / "set", 3, "{}/after.png", "{}/before.png", "{}/prompt.txt")
    for index in range(3):
        write_text(folder / f"photo_{index}" / other, "buy milk")
    found = find(folder)
    assert [pair.caption for pair in found.pairs] == [
        f"exchange red and blue, number {i}" for i in range(3)
    ]
    for problem in found.problems:
        assert (problem.kind, other) == ("captions_unused", "a_memo.txt")
        assert "prompt" not in problem.text


def test_in_a_folder_for_each_pair_a_caption_of_an_unknown_name_is_reported(tmp_path):
    folder = write_pairs(tmp_path / "set", 2, "{}/after.png", "{}/before.png", "{}/notes.txt")
    write_text(folder / "photo_0" / "story.txt", "make it red")
    found = find(folder)
    assert found.pairs[0].caption == "make it red"
    assert found.pairs[1].caption == "exchange red and blue, number 1"
    assert get_problem(found, "captions_by_fallback").count == 2


def test_of_two_captions_the_txt_is_used_and_the_other_reported(tmp_path):
    folder = write_pairs(tmp_path / "set", 2)
    write_text(folder / "target" / "photo_0.caption", "something else")
    found = find(folder)
    assert found.pairs[0].caption == "exchange red and blue, number 0"
    problem = get_problem(found, "captions_second")
    assert (problem.level, problem.count) == (Level.WARNING, 1)
    assert "target/photo_0.caption" in problem.text


@pytest.mark.parametrize(
    "value", ["make it red", {"caption": "make it red"}, {"prompt": "make it red", "seed": 1}]
)
def test_a_json_beside_an_image_holds_its_caption(value, tmp_path):
    folder = write_pairs(tmp_path / "set", 2, caption=None)
    for index in range(2):
        write_text(folder / "target" / f"photo_{index}.json", json.dumps(value))
    found = find(folder)
    assert [pair.caption for pair in found.pairs] == ["make it red"] * 2
    problem = get_problem(found, "captions_from_json")
    assert (problem.level, problem.count) == (Level.NOTE, 2)


def test_a_json_without_a_caption_stops_nothing_and_is_reported(tmp_path):
    folder = write_pairs(tmp_path / "set", 4, caption=None)
    contents = ('{"seed": 1}', '{"prompt": {"3": "KSampler"}}', "{", "[1]")
    for index, content in enumerate(contents):
        write_text(folder / "target" / f"photo_{index}.json", content)
    found = find(folder)
    assert [pair.caption for pair in found.pairs] == [None] * 4
    assert get_problem(found, "json_without_caption").count == 2
    assert [p.level for p in found.problems if p.kind == "json_unreadable"] == [Level.WARNING] * 2
    for index in range(4):
        write_text(folder / "target" / f"photo_{index}.txt", "make it red")
    found = find(folder)
    assert [pair.caption for pair in found.pairs] == ["make it red"] * 4
    assert get_problem(found, "json_unused").count == 4


# --- images that are in no pair ---


@pytest.mark.parametrize(
    "suffix", ["heic", "jxl", "jp2", "tga", "ppm", "psd", "HEIC", "svg", "dng", "mp4"]
)
def test_images_of_kinds_that_are_not_read_are_named(suffix, tmp_path):
    folder = write_pairs(tmp_path / "set", 2)
    for side in ("target", "control"):
        (folder / side / f"photo_9.{suffix}").write_bytes(b"\0" * 40)
    problem = get_problem(find(folder), "pictures_unread")
    assert (problem.level, problem.count) == (Level.WARNING, 2)
    assert f"(.{suffix.lower()})" in problem.text
    for path in folder.rglob("*.png"):
        path.unlink()
    with pytest.raises(FileError, match=r"holds no images; expected .* Besides: files of kinds"):
        find(folder)


@pytest.mark.parametrize("place", ["garment/photo_0.png", "detail.png", "target.png"])
def test_images_beside_the_folders_that_are_used_are_named(place, tmp_path):
    folder = write_pairs(tmp_path / "set", 3)
    add_picture(folder / place)
    problem = get_problem(find(folder), "pictures_unused")
    assert (problem.level, problem.count) == (Level.WARNING, 1)
    assert place in problem.text


def test_an_image_without_a_role_in_a_folder_for_each_pair_is_named(tmp_path):
    folder = write_pairs(tmp_path / "set", 3, "{}/after.png", "{}/before.png", "{}/prompt.txt")
    add_picture(folder / "photo_1" / "detail.png")
    assert "photo_1/detail.png" in get_problem(find(folder), "pictures_unused").text


# --- names ---


@pytest.mark.parametrize(
    "layout",
    [
        ("target/{}.png", "control/{}.png", "target/{}.txt"),
        ("{}_end.png", "{}_start.png", "{}.txt"),
        ("{}/after.png", "{}/before.png", "{}/prompt.txt"),
        ("after_{}.png", "before_{}.png", "{}.txt"),
    ],
)
@pytest.mark.parametrize("forms", [("NFC", "NFD", "NFD"), ("NFD", "NFC", "NFC")])
def test_names_pair_regardless_of_unicode_normalization(forms, layout, tmp_path):
    folder = tmp_path / "set"
    for name in ("café", "Ångström", "한국"):
        target, reference, caption = (
            pattern.format(unicodedata.normalize(form, name))
            for pattern, form in zip(layout, forms, strict=True)
        )
        add_picture(folder / target)
        add_picture(folder / reference, 6)
        write_text(folder / caption, "make it red")
    found = find(folder)
    assert found.problems == ()
    assert [pair.caption for pair in found.pairs] == ["make it red"] * 3
    if "/after" not in layout[0]:
        assert "Ångström" in {pair.name for pair in found.pairs}


def test_a_link_to_a_folder_is_followed_where_that_is_allowed(tmp_path):
    folder = write_pairs(tmp_path / "roots" / "set", 2)
    (folder / "control").rename(tmp_path / "roots" / "originals")
    (folder / "control").symlink_to(tmp_path / "roots" / "originals", target_is_directory=True)
    found = find(folder)
    assert len(found.pairs) == 2
    assert found.problems == ()


def test_circular_and_nested_links_are_reported_and_terminate(tmp_path):
    folder = write_pairs(tmp_path / "roots" / "set", 2)
    (folder / "target" / "up").symlink_to(folder, target_is_directory=True)
    other = tmp_path / "roots" / "other"
    other.mkdir()
    (other / "again").symlink_to(tmp_path / "roots", target_is_directory=True)
    (folder / "more").symlink_to(other, target_is_directory=True)
    found = find(folder)
    assert len(found.pairs) == 2
    assert get_problem(found, "links_left_out").count == 2


BEGINNINGS = {
    "numbers": ("after_{}.png", "before_{}.png", "{}.txt"),
    "caption by target": ("after_{}.png", "before_{}.png", "after_{}.txt"),
    "in a folder": ("all/end-{}.png", "all/start-{}.png", "all/end-{}.txt"),
    "numbered endings": ("cat_after{}.png", "cat_before{}.png", "cat_after{}.txt"),
    "one folder down": ("train/target/{}.png", "train/control/{}.png", "train/target/{}.txt"),
}


@pytest.mark.parametrize("name", BEGINNINGS)
@pytest.mark.parametrize("numbers", [("1", "2", "3"), ("01", "02", "10")])
def test_other_common_names_form_pairs(numbers, name, tmp_path):
    folder = tmp_path / "set"
    target, reference, caption = BEGINNINGS[name]
    for index, number in enumerate(numbers):
        add_picture(folder / target.format(number), index)
        add_picture(folder / reference.format(number), index + 3)
        write_text(folder / caption.format(number), f"make it {number}")
    found = find(folder)
    assert found.problems == ()
    assert [pair.caption for pair in found.pairs] == [f"make it {number}" for number in numbers]
    for pair, number in zip(found.pairs, numbers, strict=True):
        assert pair.target.path.name == Path(target.format(number)).name
        assert [r.path.name for r in pair.references] == [Path(reference.format(number)).name]


@pytest.mark.parametrize(
    ("patterns", "hint"),
    [
        (("A/{}.png", "B/{}.png"), "'A' and 'B' hold equal names: rename the folder"),
        (("trainA/{}.png", "trainB/{}.png"), "'trainA' and 'trainB' hold equal names"),
        (("{}_A.png", "{}_B.png"), "many end in '_A' or '_B': let the originals end in '_start'"),
        (("x/{}.png", "x/{}.jpg"), "expected folders such as 'target' and 'control'"),
    ],
)
def test_ambiguous_names_are_refused_with_how_to_name_them(patterns, hint, tmp_path):
    folder = tmp_path / "set"
    for index in range(3):
        for pattern in patterns:
            add_picture(folder / pattern.format(index), index)
    with pytest.raises(FileError) as caught:
        find(folder)
    assert hint in str(caught.value)
    assert len(str(caught.value)) <= 400


def test_several_sets_in_one_folder_are_refused_by_name(tmp_path):
    for part in ("train", "val"):
        write_pairs(tmp_path / "set" / part, 2)
    with pytest.raises(FileError, match=r"holds several sets \(train, val\); expected one"):
        find(tmp_path / "set")


# --- how it is reported ---


def test_what_is_left_out_is_a_line_on_the_node_and_an_entry_in_the_json(tmp_path):
    folder = write_pairs(tmp_path / "set", 3)
    add_picture(folder / "garment" / "a.png")
    (folder / "target" / "photo_9.heic").write_bytes(b"\0")
    (folder / "control" / "photo_2.png").write_bytes(b"")
    found = find(folder)
    preflight = check_pairs(found, name="set", megapixels=0.01, max_references=3)
    lines = describe_preflight(preflight).splitlines()
    assert sum(line.startswith("Warning: images that belong to no pair: 1,") for line in lines)
    assert sum(line.startswith("Warning: files of kinds that are not read (.he") for line in lines)
    reported = json.loads(json.dumps(preflight.to_dict(), allow_nan=False))
    assert (reported["num_pairs"], reported["num_found"]) == (2, 3)
    entries = {(entry["kind"], entry["severity"], entry["count"]) for entry in reported["findings"]}
    assert entries >= {
        ("pair_unusable", "error", 1),
        ("pictures_unused", "warning", 1),
        ("pictures_unread", "warning", 1),
    }
    assert reported["findings"][0]["severity"] == "error"


def test_an_error_of_many_pairs_is_short_and_a_pair_is_left_out_by_its_kind(tmp_path):
    from qwen_edit_lora.lora_core import ConfigError
    from qwen_edit_lora.lora_core.pairs.preflight import LEAVE_OUT

    folder = write_pairs(tmp_path / "set", 30)
    for index in range(20):
        (folder / "control" / f"photo_{index}.png").write_bytes(b"")
    found = find(folder)
    options = {"name": "set", "megapixels": 0.01, "max_references": 3}
    with pytest.raises(ConfigError) as caught:
        check_pairs(found, **options).raise_stops()
    assert len(str(caught.value)) <= 400
    assert "More problems that stop the run: 19" in str(caught.value)
    left = check_pairs(found, **options, on_problem=LEAVE_OUT)
    (finding,) = [f for f in left.findings if f.kind == "pair_left_out"]
    assert (finding.severity, finding.count, len(left.pairs)) == ("warning", 20, 10)
