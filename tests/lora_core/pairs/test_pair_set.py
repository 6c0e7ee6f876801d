"""Sets of pairs while they are put together: what is read, written, removed and restored."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from demo_base.pair_folders import CAPTION, load_photograph, write_pairs, write_picture, write_text
from qwen_edit_lora.lora_core import ConfigError, FileError
from qwen_edit_lora.lora_core.pairs.layouts import find_pairs
from qwen_edit_lora.lora_core.pairs.pair_set import (
    PairConflictError,
    PairSet,
    SetPair,
    UnknownPairError,
    looks_like_set,
    open_set,
)
from qwen_edit_lora.lora_core.pairs.removed_files import (
    REMOVED_FOLDER,
    remove_pair,
    restore_files,
)
from qwen_edit_lora.lora_core.pairs.set_captions import add_trigger, fill_captions, write_caption
from qwen_edit_lora.lora_core.pairs.set_images import (
    add_image,
    check_image,
    create_set,
    encode_thumbnail,
    put_image,
)


def allow(path: Path) -> bool:
    return True


def open_at(folder: Path) -> PairSet:
    return open_set(folder, lambda path: path.resolve().is_relative_to(folder.parent.resolve()))


def get(opened: PairSet, name: str) -> SetPair:
    return next(pair for pair in opened.pairs if pair.name == name)


def read_tree(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def list_names(folder: Path) -> set[str]:
    return {name for name in read_tree(folder) if not name.startswith(REMOVED_FOLDER)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_pairs(tmp_path / "set", 3)


@pytest.fixture
def upload(tmp_path: Path) -> Path:
    """An image as it was uploaded, under a name that says nothing."""
    path = tmp_path / "upload.tmp"
    load_photograph(5, 40, 30).save(path, "JPEG")
    return path


# --- reading --------------------------------------------------------------------------------------

LAYOUTS = {
    "target and control": ("target/{}.png", "control/{}.png", "target/{}.txt"),
    "images and source": ("images/{}.png", "source/{}.png", "images/{}.txt"),
    "targets on top": ("{}.png", "control/{}.png", "{}.txt"),
    "inside train": ("train/target/{}.png", "train/control/{}.png", "train/target/{}.txt"),
    "captions apart": ("target/{}.png", "control/{}.png", "captions/{}.txt"),
}


@pytest.mark.parametrize("names", LAYOUTS.values(), ids=list(LAYOUTS))
def test_a_set_holds_the_pairs_that_the_training_reads(tmp_path, names):
    folder = write_pairs(tmp_path / "set", 3, *names)
    opened = open_set(folder, allow)
    pairs = [(pair, opened.build_pair(pair)) for pair in opened.pairs]
    found = find_pairs(folder, allow).pairs
    assert [built for _, built in pairs] == list(found)
    assert [opened.read_caption(pair) for pair, _ in pairs] == [one.caption for one in found]
    assert len({pair.id for pair, _ in pairs}) == 3


def test_incomplete_pairs_are_listed_with_what_they_have(folder):
    (folder / "target" / "photo_0.png").unlink()
    (folder / "control" / "photo_1.png").unlink()
    (folder / "target" / "photo_2.txt").unlink()
    opened = open_set(folder, allow)
    assert [pair.name for pair in opened.pairs] == ["photo_0", "photo_1", "photo_2"]
    first, second, third = opened.pairs
    assert first.target is None
    assert second.references == []
    assert opened.read_caption(third) == ""
    with pytest.raises(FileError, match="has no target"):
        opened.build_pair(first)


def test_a_set_of_a_list_is_not_edited_here(folder):
    row = '{"image": "target/photo_0.png", "edit_image": "control/photo_0.png", "prompt": "x"}'
    write_text(folder / "metadata.jsonl", row)
    with pytest.raises(FileError, match=r"is read by metadata\.jsonl"):
        open_set(folder, allow)


def test_folders_that_are_no_sets_are_told_apart(tmp_path, folder):
    assert looks_like_set(folder)
    assert looks_like_set(create_set(tmp_path, "new"))
    write_picture(load_photograph(0), tmp_path / "photos" / "a.png")
    write_picture(load_photograph(0), tmp_path / "album" / "images" / "a.png")
    assert not looks_like_set(tmp_path / "photos")
    assert not looks_like_set(tmp_path / "album")


# --- captions -------------------------------------------------------------------------------------


def test_a_caption_is_written_into_the_file_that_the_training_reads(tmp_path):
    for number, names in enumerate(LAYOUTS.values()):
        folder = write_pairs(tmp_path / f"set_{number}", 2, *names)
        before = list_names(folder)
        opened = open_at(folder)
        text, path = write_caption(opened, get(opened, "photo_1"), "  made blue\r\nnow ")
        assert text == path.read_text() == "made blue\nnow"
        changed = opened.with_caption(get(opened, "photo_1").id, path)
        assert changed.pairs == open_at(folder).pairs
        assert [pair.caption for pair in find_pairs(folder, allow).pairs] == [
            f"{CAPTION}, number 0",
            "made blue\nnow",
        ]
        assert list_names(folder) == before


def test_a_caption_of_a_json_is_not_overwritten_but_comes_after_a_text_file(folder):
    (folder / "target" / "photo_0.txt").unlink()
    write_text(folder / "target" / "photo_0.json", '{"prompt": "from json", "seed": 7}')
    opened = open_at(folder)
    write_caption(opened, get(opened, "photo_0"), "mine", before="from json")
    assert '"seed": 7' in (folder / "target" / "photo_0.json").read_text()
    assert find_pairs(folder, allow).pairs[0].caption == "mine"


def test_a_caption_that_was_changed_elsewhere_is_kept(folder):
    opened = open_at(folder)
    pair = get(opened, "photo_0")
    write_text(folder / "target" / "photo_0.txt", "of another page")
    with pytest.raises(PairConflictError, match="changed elsewhere"):
        write_caption(opened, pair, "mine", before=f"{CAPTION}, number 0")
    assert (folder / "target" / "photo_0.txt").read_text() == "of another page"
    assert write_caption(opened, pair, "mine", before="of another page")[0] == "mine"


@pytest.mark.parametrize("text", ["half \ud800", "x" * 65_537, "a\0b"])
def test_a_text_that_is_no_caption_is_refused_and_nothing_is_written(folder, text):
    before = read_tree(folder)
    opened = open_at(folder)
    with pytest.raises(ConfigError, match="the caption"):
        write_caption(opened, get(opened, "photo_0"), text)
    assert read_tree(folder) == before


def test_a_file_that_is_no_caption_is_never_overwritten(folder):
    (folder / "target" / "photo_0.txt").write_bytes(b"\xff\xfe broken")
    before = read_tree(folder)
    opened = open_at(folder)
    for change in (
        lambda: write_caption(opened, get(opened, "photo_0"), "mine"),
        lambda: fill_captions(opened, "mine"),
        lambda: add_trigger(opened, "mine"),
    ):
        with pytest.raises(PairConflictError, match="save it again as UTF-8"):
            change()
    assert read_tree(folder) == before


def test_only_empty_captions_are_filled(folder):
    (folder / "target" / "photo_0.txt").unlink()
    (folder / "target" / "photo_2.txt").write_text(" \n")
    assert fill_captions(open_at(folder), " the same ") == 2
    captions = [pair.caption for pair in find_pairs(folder, allow).pairs]
    assert captions == ["the same", f"{CAPTION}, number 1", "the same"]
    with pytest.raises(ConfigError, match="is empty"):
        fill_captions(open_at(folder), "  ")


def test_a_trigger_word_is_put_once_before_each_caption(folder):
    (folder / "target" / "photo_0.txt").write_text("ohwxes are not the word")
    (folder / "target" / "photo_1.txt").write_text("ohwx, done already")
    (folder / "target" / "photo_2.txt").unlink()
    for expected in (1, 0):
        assert add_trigger(open_at(folder), "ohwx, ") == expected
    texts = [(folder / "target" / f"photo_{i}.txt") for i in range(3)]
    assert texts[0].read_text() == "ohwx, ohwxes are not the word"
    assert texts[1].read_text() == "ohwx, done already"
    assert not texts[2].exists()
    for word in ("", " , ", "a\nb", "x" * 201):
        with pytest.raises(ConfigError, match="trigger word"):
            add_trigger(open_at(folder), word)


# --- images ---------------------------------------------------------------------------------------


def test_a_new_set_takes_targets_and_references_one_by_one(tmp_path, upload):
    folder = create_set(tmp_path, "new")
    copies = [shutil.copy(upload, tmp_path / f"{slot}.tmp") for slot in range(4)]
    for slot, path in enumerate(copies):
        suffix = check_image(Path(path), "photo.png")
        add_image(open_at(folder), Path(path), "photo", suffix, slot)
    write_caption(opened := open_at(folder), opened.pairs[0], "x")
    (pair,) = find_pairs(folder, allow).pairs
    assert [image.label for image in pair.references] == [
        "control/photo.jpg",
        "control_2/photo.jpg",
        "control_3/photo.jpg",
    ]
    assert (pair.target.label, pair.caption) == ("target/photo.jpg", "x")


def test_an_image_keeps_its_bytes_and_gets_the_ending_of_its_content(folder, upload):
    content = upload.read_bytes()
    path = add_image(open_at(folder), upload, "neu 1.2", check_image(upload, "neu.png"), 0)
    assert path == folder / "target" / "neu 1.2.jpg"
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../a", "a/b", "a\\b", "CON", ".hidden", "a\0", "x" * 252, "a:b"]
)
def test_a_name_that_is_no_name_of_a_file_is_refused(folder, upload, name):
    before = read_tree(folder.parent)
    with pytest.raises(ConfigError, match="name is"):
        add_image(open_at(folder), upload, name, ".jpg", 0)
    assert read_tree(folder.parent) == before


@pytest.mark.parametrize("name", ["photo_0", "PHOTO_0"])
def test_a_taken_name_is_refused_whatever_its_ending_and_case(folder, upload, name):
    before = read_tree(folder.parent)
    with pytest.raises(PairConflictError, match="already"):
        add_image(open_at(folder), upload, name, ".jpg", 0)
    assert read_tree(folder.parent) == before


def test_a_reference_without_the_one_before_it_is_refused(folder, upload):
    with pytest.raises(PairConflictError, match="reference 2 first"):
        add_image(open_at(folder), upload, "new", ".jpg", 3)
    opened = open_at(folder)
    with pytest.raises(PairConflictError, match="add reference 2 first"):
        put_image(opened, upload, get(opened, "photo_0"), ".jpg", 3)
    for slot in (-1, 4):
        with pytest.raises(ConfigError, match="slot is"):
            put_image(opened, upload, get(opened, "photo_0"), ".jpg", slot)


def test_a_replaced_image_can_be_found_again(folder, upload):
    old, new = (folder / "target" / "photo_1.png").read_bytes(), upload.read_bytes()
    opened = open_at(folder)
    path, token = put_image(opened, upload, get(opened, "photo_1"), ".jpg", 0)
    assert path == folder / "target" / "photo_1.jpg"
    assert path.read_bytes() == new
    assert not (folder / "target" / "photo_1.png").exists()
    kept = folder / REMOVED_FOLDER / token / "target" / "photo_1.png"
    assert kept.read_bytes() == old
    assert len(find_pairs(folder, allow).pairs) == 3


def test_a_second_reference_gets_the_pairs_own_name_in_the_next_folder(folder, upload):
    opened = open_at(folder)
    path, token = put_image(opened, upload, get(opened, "photo_1"), ".jpg", 2)
    assert (path, token) == (folder / "control_2" / "photo_1.jpg", "")
    pair = find_pairs(folder, allow).pairs[1]
    assert [image.label for image in pair.references] == [
        "control/photo_1.png",
        "control_2/photo_1.jpg",
    ]


def test_a_target_next_to_folders_of_references_gets_their_pairs_name(tmp_path, upload):
    """With the targets on top, a reference's folder is inside that of the targets."""
    folder = write_pairs(tmp_path / "set", 2, target="{}.png", caption=None)
    (folder / "photo_1.png").unlink()
    opened = open_at(folder)
    path, _ = put_image(opened, upload, get(opened, "photo_1"), ".jpg", 0)
    assert path == folder / "photo_1.jpg"
    assert [pair.name for pair in open_at(folder).pairs] == ["photo_0", "photo_1"]


def test_an_image_that_cannot_be_written_leaves_the_old_one(folder, upload, monkeypatch):
    from qwen_edit_lora.lora_core.pairs import set_images

    def fail(source: Path, path: Path) -> None:
        raise OSError(28, "No space left on device")

    before = read_tree(folder)
    monkeypatch.setattr(set_images, "replace", fail)
    opened = open_at(folder)
    with pytest.raises(FileError, match="the disk is full"):
        put_image(opened, upload, get(opened, "photo_1"), ".png", 0)
    assert read_tree(folder) == before


def test_only_images_that_decode_to_the_end_are_taken(tmp_path, upload):
    load_photograph(5, 300, 200).save(upload, "JPEG")
    assert check_image(upload, "a.png") == ".jpg"
    content = upload.read_bytes()
    for number, damaged in enumerate((content[:-200], b"", b"<svg/>", b"%!PS-Adobe", b"\x89PNG")):
        path = tmp_path / str(number)
        path.write_bytes(damaged)
        with pytest.raises(FileError, match=r"^a\.png (is|cannot)"):
            check_image(path, "a.png")


def test_a_thumbnail_is_a_jpeg_of_the_asked_size(folder):
    import io

    from PIL import Image

    path = write_picture(load_photograph(0, 300, 200), folder / "target" / "large.png")
    image = Image.open(io.BytesIO(encode_thumbnail(path, "large.png", 60)))
    assert (image.format, image.size) == ("JPEG", (60, 40))


# --- removing -------------------------------------------------------------------------------------


def test_a_removed_pair_is_gone_for_the_training_and_comes_back_bit_identical(folder):
    before = read_tree(folder)
    opened = open_at(folder)
    token = remove_pair(opened, get(opened, "photo_1"))
    assert [pair.name for pair in find_pairs(folder, allow).pairs] == ["photo_0", "photo_2"]
    assert find_pairs(folder, allow).problems == ()
    with pytest.raises(UnknownPairError):
        open_at(folder).find(get(opened, "photo_1").id)
    assert restore_files(open_at(folder), token) == 3
    assert read_tree(folder) == before
    assert not (folder / REMOVED_FOLDER / token).exists()
    with pytest.raises(UnknownPairError):
        restore_files(open_at(folder), token)


def test_a_restore_never_overwrites(folder):
    opened = open_at(folder)
    token = remove_pair(opened, get(opened, "photo_1"))
    write_text(folder / "target" / "photo_1.txt", "new")
    before = read_tree(folder)
    with pytest.raises(PairConflictError, match="is there again"):
        restore_files(open_at(folder), token)
    assert read_tree(folder) == before


@pytest.mark.parametrize("token", ["", "..", "../../x", "0" * 15, "G" * 16, "0" * 17, "\0"])
def test_only_a_token_is_restored(folder, token):
    with pytest.raises(ConfigError, match="token"):
        restore_files(open_at(folder), token)


def test_nothing_is_written_or_moved_through_links_that_lead_outside(tmp_path, upload):
    inside, outside = tmp_path / "roots", write_pairs(tmp_path / "outside", 2)
    inside.mkdir()
    folder = create_set(inside, "set")
    (folder / "target").rmdir()
    (folder / "target").symlink_to(outside / "target")
    (folder / REMOVED_FOLDER).symlink_to(outside)
    write_picture(load_photograph(0), folder / "control" / "a.png")
    before = read_tree(outside)
    opened = open_set(folder, lambda path: path.resolve().is_relative_to(inside.resolve()))
    (pair,) = opened.pairs
    for change in (
        lambda: write_caption(opened, pair, "x"),
        lambda: put_image(opened, upload, pair, ".jpg", 0),
        lambda: add_image(opened, upload, "new", ".jpg", 0),
        lambda: remove_pair(opened, pair),
        lambda: restore_files(opened, "0" * 16),
    ):
        with pytest.raises(PairConflictError, match=r"leads outside|there already"):
            change()
    assert read_tree(outside) == before
    assert (folder / "control" / "a.png").exists()
