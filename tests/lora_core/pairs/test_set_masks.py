"""Masks of a set's pairs: painted, replaced, removed, and read as the training reads them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from demo_base.pair_folders import write_pairs, write_picture
from PIL import Image
from qwen_edit_lora.lora_core import ConfigError, FileError
from qwen_edit_lora.lora_core.pairs.layouts import find_pairs
from qwen_edit_lora.lora_core.pairs.pair_set import PairConflictError, PairSet, SetPair, open_set
from qwen_edit_lora.lora_core.pairs.removed_files import REMOVED_FOLDER, restore_files
from qwen_edit_lora.lora_core.pairs.set_masks import encode_mask, put_mask, remove_mask

SIZE = (96, 64)


def open_at(folder: Path) -> PairSet:
    return open_set(folder, lambda path: path.resolve().is_relative_to(folder.parent.resolve()))


def get(opened: PairSet, name: str) -> SetPair:
    return next(pair for pair in opened.pairs if pair.name == name)


def draw_mask(path: Path, size: tuple[int, int] = SIZE, left: float = 0.5) -> Path:
    """White from `left` on, as a page paints it: RGBA, opaque."""
    mask = Image.new("RGBA", size, "black")
    if left < 1:
        mask.paste("white", (round(left * size[0]), 0, *size))
    mask.save(path, "PNG")
    return path


def put(folder: Path, source: Path, name: str = "photo_1") -> tuple[Path, str]:
    opened = open_at(folder)
    return put_mask(opened, source, get(opened, name), "the mask")


def list_files(folder: Path) -> set[str]:
    files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {path.as_posix() for path in files if path.parts[0] != REMOVED_FOLDER}


LAYOUTS = {
    "target and control": ("target/{}.png", "control/{}.png", "mask/photo_1.png"),
    "targets on top": ("{}.png", "control/{}.png", "mask/photo_1.png"),
    "inside train": ("train/target/{}.png", "train/control/{}.png", "train/mask/photo_1.png"),
    "start and end": ("target/{}_end.png", "control/{}_start.png", "mask/photo_1_end.png"),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
def test_a_painted_mask_is_the_one_that_the_training_reads(tmp_path, layout):
    target, reference, expected = layout
    folder = write_pairs(tmp_path / "set", 3, target, reference, caption=None)
    name = open_at(folder).pairs[1].name
    path, token = put(folder, draw_mask(tmp_path / "mask.png"), name)
    assert (path, token) == (folder / expected, "")
    masks = [pair.mask for pair in find_pairs(folder, lambda path: True).pairs]
    assert [mask is not None for mask in masks] == [False, True, False]
    pixels = masks[1].read()
    assert pixels.shape == (64, 96, 3)
    assert pixels[:, :47].max() == 0
    assert pixels[:, 49:].min() == 1
    assert Image.open(path).mode == "L"


def test_a_mask_painted_small_gets_the_size_of_its_target(tmp_path):
    folder = write_pairs(tmp_path / "set", 2, width=300, height=201)
    path, _ = put(folder, draw_mask(tmp_path / "mask.png", (149, 100)))
    assert Image.open(path).size == (300, 201)
    assert np.asarray(Image.open(path)).mean() == pytest.approx(127, abs=3)


def test_a_mask_in_its_folder_is_replaced_and_removed_and_comes_back(tmp_path):
    folder = write_pairs(tmp_path / "set", 2)
    old = draw_mask(tmp_path / "old.png", left=0.1)
    first = write_picture(Image.open(old).convert("RGB"), folder / "masks" / "photo_1.jpg")
    before = first.read_bytes()
    path, token = put(folder, draw_mask(tmp_path / "mask.png"))
    assert path == folder / "masks" / "photo_1.png"
    painted = path.read_bytes()
    assert not first.exists()
    restore_files(open_at(folder), token)
    assert first.read_bytes() == before
    assert not path.exists()
    put(folder, draw_mask(tmp_path / "mask.png"))
    opened = open_at(folder)
    token = remove_mask(opened, get(opened, "photo_1"))
    assert get(open_at(folder), "photo_1").parts.masks == []
    assert remove_mask(open_at(folder), get(open_at(folder), "photo_1")) == ""
    restore_files(open_at(folder), token)
    assert path.read_bytes() == painted


def test_a_mask_that_would_ruin_its_pair_is_refused(tmp_path):
    folder = write_pairs(tmp_path / "set", 2)
    before = list_files(folder)
    for source, expected in (
        (draw_mask(tmp_path / "a.png", left=1), "is black all over"),
        (draw_mask(tmp_path / "b.png", (64, 64)), "the same proportions"),
        (write_picture(Image.new("L", SIZE, 255), tmp_path / "c.png"), None),
    ):
        if expected is None:
            source.write_bytes(source.read_bytes()[:-40])
            expected = "cannot be read"
        with pytest.raises(ConfigError, match=expected):
            put(folder, source)
    (folder / "target" / "photo_1.png").unlink()
    with pytest.raises(PairConflictError, match="has no target to mask"):
        put(folder, draw_mask(tmp_path / "d.png"))
    assert list_files(folder) == before - {"target/photo_1.png"}


def test_a_mask_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    from qwen_edit_lora.lora_core.pairs import set_images

    def fail(source: Path, path: Path) -> None:
        raise OSError(28, "No space left on device")

    folder = write_pairs(tmp_path / "set", 2)
    path, _ = put(folder, draw_mask(tmp_path / "mask.png"))
    before, content = list_files(folder), path.read_bytes()
    monkeypatch.setattr(set_images, "replace", fail)
    with pytest.raises(FileError, match="the disk is full"):
        put(folder, draw_mask(tmp_path / "mask.png", left=0.2))
    assert list_files(folder) == before
    assert path.read_bytes() == content


def test_a_mask_is_shown_as_white_that_is_opaque_where_the_loss_counts(tmp_path):
    path = draw_mask(tmp_path / "mask.png")
    image = Image.open(io.BytesIO(encode_mask(path, "mask.png", 48)))
    assert (image.mode, image.size) == ("LA", (48, 32))
    white, alpha = (np.asarray(band) for band in image.split())
    assert white.min() == 255
    assert (alpha[:, :23].max(), alpha[:, 25:].min()) == (0, 255)
