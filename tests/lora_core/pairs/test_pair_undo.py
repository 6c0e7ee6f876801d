"""Changes of a set undone: replaced images, captions of many pairs; and the trash emptied."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from demo_base.pair_folders import CAPTION, load_photograph, write_pairs, write_text
from qwen_edit_lora.lora_core import FileError
from qwen_edit_lora.lora_core.pairs.pair_set import (
    PairConflictError,
    PairSet,
    SetPair,
    UnknownPairError,
    open_set,
)
from qwen_edit_lora.lora_core.pairs.removed_files import (
    REMOVED_FOLDER,
    Restored,
    remove_pair,
    restore_files,
)
from qwen_edit_lora.lora_core.pairs.removed_trash import Trash, empty_trash, measure_trash
from qwen_edit_lora.lora_core.pairs.set_captions import add_trigger, fill_captions
from qwen_edit_lora.lora_core.pairs.set_images import put_image


def open_at(folder: Path) -> PairSet:
    return open_set(folder, lambda path: path.resolve().is_relative_to(folder.parent.resolve()))


def get(opened: PairSet, name: str) -> SetPair:
    return next(pair for pair in opened.pairs if pair.name == name)


def read_set(folder: Path) -> dict[str, bytes]:
    """Without what was removed."""
    files = (path for path in folder.rglob("*") if path.is_file())
    named = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
    return {name: data for name, data in named.items() if not name.startswith(REMOVED_FOLDER)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_pairs(tmp_path / "set", 3)


def make_upload(tmp_path: Path, kind: str = "JPEG", number: int = 5) -> Path:
    path = tmp_path / f"upload_{number}.tmp"
    load_photograph(number, 40, 30).save(path, kind)
    return path


def replace_target(folder: Path, upload: Path, suffix: str) -> str:
    opened = open_at(folder)
    return put_image(opened, upload, get(opened, "photo_1"), suffix, 0)[1]


@pytest.mark.parametrize(("kind", "suffix"), [("JPEG", ".jpg"), ("PNG", ".png")])
def test_a_replaced_image_comes_back_and_its_successor_is_kept(folder, tmp_path, kind, suffix):
    before = read_set(folder)
    upload = make_upload(tmp_path, kind)
    content = upload.read_bytes()
    token = replace_target(folder, upload, suffix)
    assert read_set(folder) != before
    assert restore_files(open_at(folder), token) == Restored(2 if kind == "JPEG" else 1, 0)
    assert read_set(folder) == before
    kept = list((folder / REMOVED_FOLDER).rglob(f"photo_1{suffix}"))
    assert [path.read_bytes() for path in kept] == [content]
    with pytest.raises(UnknownPairError):
        restore_files(open_at(folder), token)


def test_of_two_replacements_the_first_is_not_undone_before_the_second(folder, tmp_path):
    before = read_set(folder)
    first = replace_target(folder, make_upload(tmp_path, number=4), ".jpg")
    between = read_set(folder)
    second = replace_target(folder, make_upload(tmp_path), ".jpg")
    after = read_set(folder)
    with pytest.raises(PairConflictError, match="changed again since"):
        restore_files(open_at(folder), first)
    assert read_set(folder) == after
    restore_files(open_at(folder), second)
    assert read_set(folder) == between
    restore_files(open_at(folder), first)
    assert read_set(folder) == before


def test_captions_of_many_pairs_come_back_except_those_edited_since(folder):
    (folder / "target" / "photo_2.txt").unlink()
    before = read_set(folder)
    trigger = add_trigger(open_at(folder), "ohwx")
    fill = fill_captions(open_at(folder), "the same")
    assert (trigger.num_changed, fill.num_changed) == (2, 1)
    write_text(folder / "target" / "photo_0.txt", "edited since")
    assert restore_files(open_at(folder), fill.token) == Restored(1, 0)
    assert restore_files(open_at(folder), trigger.token) == Restored(1, 1)
    assert read_set(folder) == {**before, "target/photo_0.txt": b"edited since"}
    with pytest.raises(PairConflictError, match="changed again since"):
        restore_files(open_at(folder), trigger.token)
    kept = folder / REMOVED_FOLDER / trigger.token / "target" / "photo_0.txt"
    assert kept.read_text() == f"{CAPTION}, number 0"


def test_captions_are_changed_all_or_none(folder, monkeypatch):
    from qwen_edit_lora.lora_core.pairs import set_captions

    write = set_captions.write_then_rename

    def fail(path: Path, action: object) -> None:
        if path.name == "photo_2.txt":
            raise OSError(28, "No space left on device")
        write(path, action)

    (folder / "target" / "photo_1.txt").unlink()
    (folder / "target" / "photo_2.txt").unlink()
    before = read_set(folder)
    monkeypatch.setattr(set_captions, "write_then_rename", fail)
    restore_files(open_at(folder), add_trigger(open_at(folder), "ohwx").token)
    assert read_set(folder) == before
    with pytest.raises(FileError, match="the disk is full"):
        fill_captions(open_at(folder), "the same")
    assert read_set(folder) == before


def test_a_record_moves_nothing_but_files_of_the_sets_pairs(folder, tmp_path):
    """A set may come from elsewhere, its `.removed` with it."""
    opened = open_at(folder)
    token = remove_pair(opened, get(opened, "photo_1"))
    mine = write_text(tmp_path / "mine.txt", "mine")
    spare = write_text(folder / "notes.md", "notes")
    record = folder / REMOVED_FOLDER / f"{token}.json"
    for file in ("../mine.txt", "notes.md", str(mine)):
        for digest in ("", "0" * 40):
            text = f'{{"files": [{{"file": "{file}", "digest": "{digest}", "instead_of": ""}}]}}'
            write_text(record, text)
            assert restore_files(open_at(folder), token) == Restored(3, 0)
            opened = open_at(folder)
            token = remove_pair(opened, get(opened, "photo_1"))
            record = folder / REMOVED_FOLDER / f"{token}.json"
    assert (mine.read_text(), spare.read_text()) == ("mine", "notes")
    write_text(record, "{")
    with pytest.raises(PairConflictError, match="damaged"):
        restore_files(open_at(folder), token)


# --- the trash ------------------------------------------------------------------------------------


def test_emptying_deletes_what_was_removed_and_nothing_else(folder, tmp_path):
    def is_allowed(path: Path) -> bool:
        return path.resolve().is_relative_to(tmp_path)

    assert measure_trash(folder, is_allowed) == Trash(0, 0)
    opened = open_at(folder)
    sizes = [path.stat().st_size for path in get(opened, "photo_1").files]
    token = remove_pair(opened, get(opened, "photo_1"))
    add_trigger(open_at(folder), "ohwx")
    trash = measure_trash(folder, is_allowed)
    assert trash.num_files == 5
    assert trash.size_bytes > sum(sizes)
    mine = write_text(folder / REMOVED_FOLDER / "mine.txt", "mine")
    before = read_set(folder)
    empty_trash(folder, is_allowed)
    assert read_set(folder) == before
    assert list((folder / REMOVED_FOLDER).iterdir()) == [mine]
    with pytest.raises(UnknownPairError):
        restore_files(open_at(folder), token)
    mine.unlink()
    empty_trash(folder, is_allowed)
    assert not (folder / REMOVED_FOLDER).exists()


def test_emptying_follows_no_link(folder, tmp_path):
    outside = write_text(tmp_path / "outside" / ("0" * 16) / "mine.txt", "mine")
    kept = folder / REMOVED_FOLDER
    kept.symlink_to(outside.parent.parent)
    empty_trash(folder, lambda path: True)
    assert outside.exists()
    kept.unlink()
    kept.mkdir()
    (kept / ("1" * 16)).symlink_to(outside.parent)
    (kept / ("2" * 16)).mkdir()
    (kept / ("2" * 16) / "link").symlink_to(outside.parent)
    empty_trash(folder, lambda path: True)
    assert outside.read_text() == "mine"
    assert [path.name for path in kept.iterdir()] == ["1" * 16]
    shutil.rmtree(kept)
