"""Checks before anything is encoded: images of every kind, and what would ruin a run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from demo_base.pair_folders import (
    CAPTION,
    edit,
    load_photograph,
    write_pairs,
    write_picture,
    write_text,
)
from PIL import Image
from qwen_edit_lora.lora_core import ConfigError, FileError
from qwen_edit_lora.lora_core.pairs.graph_pairs import split_captions
from qwen_edit_lora.lora_core.pairs.images import FileImage
from qwen_edit_lora.lora_core.pairs.layouts import find_pairs
from qwen_edit_lora.lora_core.pairs.pair import Level
from qwen_edit_lora.lora_core.pairs.preflight import LEAVE_OUT, Preflight, check_pairs
from qwen_edit_lora.lora_core.pairs.preview import build_table, describe_preflight, draw_pairs
from qwen_edit_lora.lora_core.pairs.sizes import choose_reference_size, choose_target_size

SMALL = 64 * 96 / 1024**2  # megapixels of the test images


def check(folder: Path, **options) -> Preflight:
    options = {"megapixels": SMALL, "max_references": 3, **options}
    found = find_pairs(folder, lambda path: True, options.pop("reference_folders", ()))
    return check_pairs(found, name=folder.name, **options)


def list_texts(preflight: Preflight, level: Level) -> list[str]:
    return [problem.text for problem in preflight.problems if problem.level == level]


# --- images -------------------------------------------------------------------------------------


def test_ordinary_images_are_read_as_in_comfyui(tmp_path):
    image = load_photograph(0)
    picture = FileImage(write_picture(image, tmp_path / "a.png"))
    expected = np.asarray(image).astype(np.float32) / 255
    assert picture.read().dtype == np.float32
    assert np.array_equal(picture.read(), expected)
    assert picture.read_header().traits == ()


def test_an_image_turned_by_exif_stands_upright(tmp_path):
    image = load_photograph(0)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored in landscape, to be rotated clockwise
    path = write_picture(image.transpose(Image.Transpose.ROTATE_90), tmp_path / "a.png", exif=exif)
    picture = FileImage(path)
    assert np.array_equal(
        picture.read(), FileImage(write_picture(image, tmp_path / "b.png")).read()
    )
    header = picture.read_header()
    assert (header.width, header.height) == image.size
    assert header.traits == ("turned by EXIF",)


def test_sixteen_bits_keep_their_brightness(tmp_path):
    ramp = np.linspace(0, 65535, 64 * 96).reshape(64, 96).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    picture = FileImage(tmp_path / "a.png")
    assert picture.read_header().traits == ("16-bit",)
    assert np.allclose(picture.read()[..., 0], ramp / 65535, atol=1e-6)
    assert np.ptp(picture.read(), axis=2).max() == 0


def test_cmyk_is_converted_and_an_animation_gives_its_first_frame(tmp_path):
    image = load_photograph(0)
    cmyk = FileImage(write_picture(image.convert("CMYK"), tmp_path / "a.tif"))
    assert cmyk.read_header().traits == ("CMYK",)
    assert np.abs(cmyk.read() - np.asarray(image) / 255).max() < 0.02
    others = [load_photograph(1)]
    path = write_picture(
        image, tmp_path / "a.webp", save_all=True, append_images=others, lossless=True
    )
    animated = FileImage(path)
    assert animated.read_header().traits == ("2 frames, the first is used",)
    assert np.array_equal(animated.read(), np.asarray(image).astype(np.float32) / 255)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_becomes_white_whatever_colour_lies_behind_it(mode, tmp_path):
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    image.paste((0, 0, 255, 255), (0, 0, 4, 8))
    options = {}
    if mode == "P":
        image = Image.new("P", (8, 8), 0)
        image.putpalette([0, 0, 255, 255, 0, 0])
        image.paste(1, (4, 0, 8, 8))
        options = {"transparency": 1}
    picture = FileImage(write_picture(image.convert(mode), tmp_path / "a.png", **options))
    assert picture.read_header().traits == ("transparent",)
    assert (picture.read()[:, 4:] == 1).all()
    assert (picture.read()[:, :4] != 1).any()


BAD_FILES = {
    "empty": (b"", "is an empty file; expected a PNG"),
    "text": (b"<html>not found</html>", "is not a readable image"),
    "noise": (bytes(range(256)) * 9, "is not a readable image"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_is_not_an_image_is_a_clear_error(name, tmp_path):
    content, sentence = BAD_FILES[name]
    path = tmp_path / "bad.png"
    path.write_bytes(content)
    with pytest.raises(FileError, match=f"^bad.png {sentence}"):
        FileImage(path).read()


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".gif", ".tif", ".bmp"])
def test_a_truncated_image_is_an_error_or_complete(suffix, tmp_path):
    whole = write_picture(load_photograph(0), tmp_path / f"whole{suffix}").read_bytes()
    path = tmp_path / f"cut{suffix}"
    refused = 0
    for share in range(1, 20):
        path.write_bytes(whole[: len(whole) * share // 20])
        for read in (FileImage(path).read, lambda: FileImage(path).read_small(256)):
            try:
                assert read().ndim == 3
            except FileError as e:
                assert str(e).startswith(f"cut{suffix} ")  # noqa: PT017 - the only way to fail
                refused += 1
    assert refused > 20


def test_an_image_of_20000_pixels_is_refused_by_its_header(tmp_path):
    path = tmp_path / "huge.png"
    Image.new("1", (20_000, 20_000)).save(path)
    with pytest.raises(FileError, match=r"huge.png .*million pixels; expected at most 16,384 px"):
        FileImage(path).read_header()
    Image.new("1", (20_000, 64)).save(path)
    with pytest.raises(FileError, match=r"huge.png is 20,000 x 64 px; expected at most 16,384"):
        FileImage(path).read_header()


# --- sizes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("megapixels", [0.0625, 0.25, 1.0, 2.0])
def test_sizes_keep_area_and_aspect_in_steps(megapixels):
    generator = np.random.default_rng(0)
    for width, height in generator.integers(100, 6000, (300, 2)):
        if max(width / height, height / width) > 4:
            continue
        w, h = choose_target_size(int(width), int(height), megapixels)
        assert (w % 16, h % 16) == (0, 0)
        assert w / h == pytest.approx(width / height, rel=16 / min(w, h))
        assert w * h == pytest.approx(megapixels * 1024**2, rel=17 / min(w, h))
    assert choose_target_size(4000, 4000, 1.0) == (1024, 1024)
    assert choose_target_size(1, 16000, 0.01)[0] == 16
    assert choose_reference_size(1000, 777, 1.0) == (1160, 904)  # rounds as the stock node does


# --- pairs ----------------------------------------------------------------------------------------


def test_a_good_folder_has_no_findings(tmp_path):
    preflight = check(write_pairs(tmp_path / "set", 5))
    assert preflight.problems == ()
    assert not preflight.needs_attention
    preflight.raise_stops()
    report = describe_preflight(preflight)
    assert report.splitlines() == [
        "set: 5 of 5 pairs can be used",
        "layout: targets in target/, references in control/",
        "sizes: 96 x 64 (5)",
        "references per pair: 1",
    ]
    table = build_table(preflight).splitlines()
    assert len(table) == 6
    assert table[1].split()[:7] == ["photo_0", "96", "x", "64", "96", "x", "64"]


def test_what_would_ruin_the_run_stops_it_with_one_message_first(tmp_path):
    folder = write_pairs(tmp_path / "set", 4)
    (folder / "control" / "photo_2.png").write_bytes(b"")
    (folder / "target" / "photo_1.txt").unlink()
    preflight = check(folder)
    with pytest.raises(ConfigError) as caught:
        preflight.raise_stops()
    lines = str(caught.value).splitlines()
    assert lines[0].startswith(
        "target/photo_1.png has no caption; write the instruction into a .txt"
    )
    assert lines[1] == "More problems that stop the run: 1"
    assert lines[2].startswith("control/photo_2.png is an empty file")
    assert "Stop: control/photo_2.png is an empty file" in describe_preflight(preflight)
    assert "control/photo_2.png is an empty file" in build_table(preflight)
    left = check(folder, on_problem=LEAVE_OUT)
    left.raise_stops()
    assert [one.pair.name for one in left.pairs] == ["photo_0", "photo_3"]
    assert left.num_found == 4
    assert all(t.startswith("Left out: ") for t in list_texts(left, Level.WARNING))


def test_leaving_out_everything_still_stops(tmp_path):
    folder = write_pairs(tmp_path / "set", 2, caption=None)
    with pytest.raises(ConfigError, match="no pair of set can be used"):
        check(folder, on_problem=LEAVE_OUT).raise_stops()
    preflight = check(folder, default_caption=f"{CAPTION}\n")
    assert {one.pair.caption for one in preflight.pairs} == {CAPTION}


def test_identical_target_and_reference_are_found_by_bytes_and_by_pixels(tmp_path):
    folder = write_pairs(tmp_path / "set", 5)
    first = folder / "control" / "photo_0.png"
    (folder / "target" / "photo_0.png").write_bytes(first.read_bytes())
    Image.open(folder / "control" / "photo_1.png").save(
        folder / "target" / "photo_1.png", compress_level=1
    )
    almost = np.asarray(Image.open(folder / "control" / "photo_2.png")).copy()
    almost[3, 4] += 1
    Image.fromarray(almost).save(folder / "target" / "photo_2.png")
    preflight = check(folder)
    preflight.raise_stops()  # two of five may be intended
    same = [p.pair for p in preflight.problems if "are the same image" in p.text]
    assert same == ["photo_0", "photo_1"]


def test_a_set_of_identical_pairs_stops(tmp_path):
    folder = write_pairs(tmp_path / "set", 3)
    for index in range(3):
        source = folder / "control" / f"photo_{index}.png"
        (folder / "target" / source.name).write_bytes(source.read_bytes())
    with pytest.raises(
        ConfigError, match="in 3 of 3 pairs of set target and reference are the same"
    ):
        check(folder).raise_stops()


def test_repeated_pairs_are_used_once_and_equal_targets_named(tmp_path):
    folder = write_pairs(tmp_path / "set", 4)
    for part in ("target/{}.png", "control/{}.png", "target/{}.txt"):
        source = folder / part.format("photo_0")
        (folder / part.format("photo_9")).write_bytes(source.read_bytes())
    image = Image.open(folder / "target" / "photo_1.png")
    image.save(folder / "target" / "photo_2.png", compress_level=1)
    preflight = check(folder)
    assert len(preflight.pairs) == 4
    assert list_texts(preflight, Level.WARNING) == [
        "photo_9 repeats photo_0 and is used once",
        "2 pairs have the same target: photo_1, photo_2",
    ]


def test_other_proportions_and_small_images_are_warned_about(tmp_path):
    folder = write_pairs(tmp_path / "set", 3)
    write_picture(load_photograph(5, 96, 80), folder / "control" / "photo_0.png")
    texts = list_texts(check(folder), Level.WARNING)
    assert len(texts) == 1
    assert (
        "target/photo_0.png is 96 x 64 px and its reference 96 x 80: other proportions" in texts[0]
    )
    texts = list_texts(check(folder, megapixels=SMALL * 4), Level.WARNING)
    assert sum("would be enlarged to 192 x 128" in text for text in texts) == 3


SWAPS = {
    "by colour": ("colorize this photo", lambda image: image.convert("L").convert("RGB")),
    "by detail": ("deblur the image", lambda image: image.resize((12, 8)).resize((96, 64))),
    "by less colour": ("make it black and white", None),
}


@pytest.mark.parametrize("name", SWAPS)
@pytest.mark.parametrize("is_swapped", [True, False])
def test_swapped_pairs_raise_a_question_from_their_captions(name, is_swapped, tmp_path):
    caption, weaken = SWAPS[name]
    folder = tmp_path / "set"
    for index in range(4):
        image = load_photograph(index)
        weak = (weaken or SWAPS["by colour"][1])(image)
        source, result = (weak, image) if weaken else (image, weak)
        if is_swapped:
            source, result = result, source
        write_picture(source, folder / "control" / f"{index}.png")
        write_picture(result, folder / "target" / f"{index}.png")
        write_text(folder / "target" / f"{index}.txt", caption)
    questions = list_texts(check(folder), Level.QUESTION)
    assert len(questions) == is_swapped
    assert all(
        q.startswith("Are targets and references swapped? Captions such as") for q in questions
    )
    check(folder).raise_stops()  # a question, not an error


def test_swapped_folders_raise_a_question_by_name_and_by_sharing(tmp_path):
    write_pairs(tmp_path, 3, "before/{}.png", "after/{}.png", "before/{}.txt")
    preflight = check(tmp_path / "before", reference_folders=[tmp_path / "after"])
    (question,) = list_texts(preflight, Level.QUESTION)
    assert "photo_0.png is taken as the target" in question
    assert list_texts(check(write_pairs(tmp_path / "set", 3)), Level.QUESTION) == []
    for index in range(3):
        write_picture(load_photograph(0), tmp_path / "set" / "target" / f"photo_{index}.png")
    (question,) = list_texts(check(tmp_path / "set"), Level.QUESTION)
    assert "3 pairs have only 1 different targets but 3 different references" in question


@pytest.mark.parametrize("name", ["x_original_{}.png", "{}_original.png", "{} source.png"])
def test_a_word_that_target_and_reference_share_raises_no_question(name, tmp_path):
    folder = write_pairs(tmp_path / "set", 3, f"target/{name}", f"control/{name}")
    preflight = check(folder, default_caption="x")
    assert len(preflight.pairs) == 3
    assert list_texts(preflight, Level.QUESTION) == []
    swapped = write_pairs(tmp_path, 3, f"before/{name}", f"after/{name}", None) / "before"
    preflight = check(swapped, reference_folders=[tmp_path / "after"], default_caption="x")
    assert len(list_texts(preflight, Level.QUESTION)) == 1


def test_captions_that_would_break_the_template_stop_and_placeholders_warn(tmp_path):
    folder = write_pairs(tmp_path / "set", 3)
    write_text(folder / "target" / "photo_0.txt", "a <|vision_start|> b")
    write_text(folder / "target" / "photo_1.txt", "[trigger] style")
    write_text(folder / "target" / "photo_2.txt", "")
    preflight = check(folder)
    assert "holds <|vision_start|>, which belongs to" in list_texts(preflight, Level.STOP)[0]
    warnings = list_texts(preflight, Level.WARNING)
    assert any("holds [trigger]" in text for text in warnings)
    assert "the caption of target/photo_2.png is empty" in warnings
    left = check(folder, on_problem=LEAVE_OUT)
    assert [one.pair.name for one in left.pairs] == ["photo_1", "photo_2"]


@pytest.mark.parametrize("end", [b"\r\n", b"\r"])
def test_a_caption_of_two_lines_from_windows_or_an_old_mac_is_that_of_other_systems(tmp_path, end):
    """ComfyUI's text field has no line end but \\n: a LoRA trained with \\r would be prompted with
    other tokens."""
    folder = write_pairs(tmp_path / "set", 1, caption=None)
    lines = (b"make it red", b"and large")
    rows = {
        "photo_0.txt": end.join(lines),
        "photo_0.json": json.dumps({"caption": end.join(lines).decode()}).encode(),
    }
    for name, data in rows.items():
        path = folder / "target" / name
        path.write_bytes(data)
        (one,) = check(folder).pairs
        assert one.pair.caption == "make it red\nand large"
        path.unlink()
    (one,) = check(folder, default_caption=end.join(lines).decode()).pairs
    assert one.pair.caption == "make it red\nand large"
    assert split_captions([end.join(lines).decode()], 1) == ["make it red\nand large"]
    assert split_captions([end.join(lines).decode()], 2) == ["make it red", "and large"]


@pytest.mark.parametrize("text", ["\0", "\u200b", "\ufeff\ufeff", "\x7f", " \u3164\n\u2800"])
def test_a_caption_of_invisible_characters_is_reported_as_empty(tmp_path, text):
    folder = write_pairs(tmp_path / "set")
    (folder / "target" / "photo_0.txt").write_text(text, encoding="utf-8")
    preflight = check(folder)
    assert [p.pair for p in preflight.problems if p.kind == "caption_empty"] == ["photo_0"]
    assert preflight.pairs[0].pair.caption == ""
    assert split_captions([text], 1) == [None]


@pytest.mark.parametrize("text", ["می‌خواهم", "👩‍🚀", "❤️", "a\u200bb"])
def test_invisible_characters_within_a_caption_stay(tmp_path, text):
    folder = write_pairs(tmp_path / "set")
    (folder / "target" / "photo_0.txt").write_text(text, encoding="utf-8")
    assert check(folder).pairs[0].pair.caption == text


def test_the_original_model_takes_one_reference(tmp_path):
    folder = write_pairs(tmp_path / "set", 2, reference="control_1/{}.png")
    write_pairs(folder, 1, reference="control_2/{}.png")
    with pytest.raises(ConfigError, match=r"photo_0.png has 2 references, but the original"):
        check(folder, max_references=1).raise_stops()


def test_a_black_mask_stops_and_a_strip_is_warned_about(tmp_path):
    folder = write_pairs(tmp_path / "set", 2)
    write_picture(Image.new("L", (96, 64)), folder / "mask" / "photo_0.png")
    write_picture(Image.new("L", (96, 64), 255), folder / "mask" / "photo_1.png")
    write_picture(Image.new("RGB", (960, 64)), folder / "target" / "photo_1.png")
    preflight = check(folder)
    assert "photo_0.png is entirely black" in list_texts(preflight, Level.STOP)[0]
    assert any("960 x 64 px, a strip" in text for text in list_texts(preflight, Level.WARNING))


def test_one_pair_is_warned_about(tmp_path):
    preflight = check(write_pairs(tmp_path / "set", 1))
    assert list_texts(preflight, Level.WARNING) == ["only one pair: a LoRA will memorise it"]


def test_checking_can_be_stopped(tmp_path):
    folder = write_pairs(tmp_path / "set", 3)
    seen = []
    with pytest.raises(InterruptedError):
        check(folder, progress=lambda *p: seen.append(p), should_stop=lambda: len(seen) == 2)
    assert seen == [(0, 3), (1, 3)]


def test_the_contact_sheet_shows_doubtful_pairs_first_and_reference_beside_target(tmp_path):
    folder = write_pairs(tmp_path / "set", 3)
    red = Image.new("RGB", (96, 64), (255, 0, 0))
    blue = edit(red)
    write_picture(red, folder / "control" / "photo_2.png")
    write_picture(blue, folder / "target" / "photo_2.png")
    write_text(folder / "target" / "photo_2.txt", "")
    sheet = draw_pairs(check(folder))
    assert sheet.dtype == np.uint8
    ys, xs = np.nonzero((sheet == (255, 0, 0)).all(axis=2))
    yt, xt = np.nonzero((sheet == (0, 0, 255)).all(axis=2))
    assert abs(np.median(ys) - np.median(yt)) < 2
    assert xs.max() < xt.min()
    assert xt.max() < sheet.shape[1] / 3  # the first of three: its caption is empty
    empty = check_pairs(
        find_pairs(write_pairs(tmp_path / "none", 2, caption=None), lambda path: True),
        name="none",
        megapixels=SMALL,
        max_references=3,
    )
    assert draw_pairs(empty).ndim == 3
