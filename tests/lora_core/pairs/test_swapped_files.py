"""Files that become others between the check and the read: nothing outside is read, and no image is
cached under another's name.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from demo_base.pair_folders import load_photograph, write_pairs, write_picture, write_text
from qwen_edit_lora.lora_core import FileError
from qwen_edit_lora.lora_core.disk import literal_paths
from qwen_edit_lora.lora_core.disk.regular_files import open_regular
from qwen_edit_lora.lora_core.pairs.cache import cache_pairs, find_items
from qwen_edit_lora.lora_core.pairs.layouts import find_pairs
from qwen_edit_lora.lora_core.pairs.listing import list_files
from qwen_edit_lora.lora_core.pairs.metadata_files import find_list
from qwen_edit_lora.lora_core.pairs.pair import open_file, read_caption
from qwen_edit_lora.lora_core.pairs.preflight import check_pairs
from qwen_edit_lora.lora_core.training.data.dataset import CachedItem

BECAME = "became a link after it was checked; put the file itself there"


class Judge:
    """Allows what is inside a folder, and just after it allowed `when` somebody puts a link in the
    place of `path`.
    """

    def __init__(self, root: Path, path: Path, target: Path, when: str = ""):
        self.root, self.path, self.target = root.resolve(), path, target
        self.when = when or path.name

    def __call__(self, path: Path) -> bool:
        is_inside = path.resolve().is_relative_to(self.root)
        if is_inside and path.name == self.when and not self.path.is_symlink():
            self.swap()
        return is_inside

    def swap(self) -> None:
        self.path.rename(self.path.with_name(f"{self.path.name}.old"))
        self.path.symlink_to(self.target, target_is_directory=self.target.is_dir())


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    folder = tmp_path / "outside"
    write_text(folder / "a.txt", "secret")
    write_text(folder / "metadata.csv", "image,edit_image,prompt\na.png,b.png,secret\n")
    write_picture(load_photograph(1), folder / "a.png")
    return folder


@pytest.fixture(params=["walked", "compared"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also as on Windows, where no folder can be opened by the handle of another."""
    if request.param == "walked" and not literal_paths.CAN_WALK:
        pytest.skip("this system opens nothing below a folder's handle")
    monkeypatch.setattr(literal_paths, "CAN_WALK", request.param == "walked")


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("is_folder", [False, True])
def test_a_caption_that_becomes_a_link_is_not_read(tmp_path, outside, is_folder):
    path = write_text(tmp_path / "set" / "in" / "a.txt", "make it dusk")
    swapped, target = (path.parent, outside) if is_folder else (path, outside / "a.txt")
    with pytest.raises(FileError, match=rf"a\.txt .*{BECAME}"):
        read_caption(path, Judge(tmp_path / "set", swapped, target, when="a.txt"))
    assert swapped.is_symlink()


@pytest.mark.usefixtures("way")
def test_a_list_of_pairs_that_becomes_a_link_is_not_read(tmp_path, outside):
    folder = write_pairs(tmp_path / "set", 2)
    path = write_text(folder / "metadata.csv", "image,edit_image,prompt\n")
    judge = Judge(tmp_path / "set", path, outside / "metadata.csv")
    with pytest.raises(FileError, match=BECAME):
        find_list(list_files(folder, judge), judge)


@pytest.mark.usefixtures("way")
def test_an_image_or_mask_that_becomes_a_link_is_not_read(tmp_path, outside):
    """However long after the check."""
    path = write_picture(load_photograph(0), tmp_path / "set" / "a.png")
    image = open_file(path, tmp_path, lambda path: True)
    assert image.read().shape == (64, 96, 3)
    Judge(tmp_path, path, outside / "a.png").swap()
    for read in (
        image.read,
        image.read_header,
        image.compute_digest,
        lambda: image.read_small(32),
        lambda: list(image.read_bands()),
    ):
        with pytest.raises(FileError, match=rf"set/a\.png cannot be opened: it {BECAME}"):
            read()


def test_a_link_that_was_there_only_while_the_file_was_opened_is_noticed(
    tmp_path, outside, monkeypatch
):
    """Where handles cannot be walked: what is open is compared with what the path names now."""
    monkeypatch.setattr(literal_paths, "CAN_WALK", False)
    path = write_text(tmp_path / "set" / "a.txt", "make it dusk").resolve()
    judge = Judge(tmp_path, path, outside / "a.txt")
    realpath = os.path.realpath

    def put_back(asked: object) -> str:
        if path.is_symlink():
            path.with_name("a.txt.old").replace(path)
        return realpath(asked)

    judge.swap()
    monkeypatch.setattr(literal_paths.os.path, "realpath", put_back)
    with pytest.raises(FileError, match=BECAME):
        open_regular(path, follow_links=False)


@pytest.mark.usefixtures("way")
def test_links_inside_the_allowed_folders_still_work(tmp_path):
    folder = write_pairs(tmp_path / "roots" / "set", 2)
    real = tmp_path / "roots" / "real"
    shutil.move(folder / "control", real)
    (folder / "control").symlink_to(real, target_is_directory=True)
    caption = folder / "target" / "photo_0.txt"
    caption.rename(real / "zero.txt")
    caption.symlink_to(real / "zero.txt")
    found = find_pairs(folder, lambda path: path.resolve().is_relative_to(tmp_path / "roots"))
    assert [pair.caption for pair in found.pairs] == [
        "exchange red and blue, number 0",
        "exchange red and blue, number 1",
    ]
    assert all(image.read().size for pair in found.pairs for image in pair.images)


@pytest.mark.skipif(not hasattr(os, "O_PATH"), reason="needs Linux' O_PATH")
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root lists any folder")
def test_a_folder_that_may_be_entered_but_not_listed_is_no_obstacle(tmp_path):
    path = write_text(tmp_path / "closed" / "a" / "x.txt", "x")
    (tmp_path / "closed").chmod(0o100)
    try:
        with open_regular(path.resolve(), follow_links=False) as file:
            assert file.read() == b"x"
    finally:
        (tmp_path / "closed").chmod(0o700)


def test_no_handle_is_left_open(tmp_path):
    path = write_text(tmp_path / "a" / "b" / "x.txt", "x").resolve()
    link = path.with_name("link.txt")
    link.symlink_to(path)
    fds = Path("/proc/self/fd")
    if not fds.is_dir():
        pytest.skip("counts handles in /proc")
    before = len(list(fds.iterdir()))
    for _ in range(20):
        open_regular(path, follow_links=False).close()
        for bad in (link, path.parent, path / "y", path.with_name("none")):
            with pytest.raises(FileError):
                open_regular(bad, follow_links=False)
    assert len(list(fds.iterdir())) == before


@pytest.mark.parametrize("which", ["target", "control"])
def test_an_image_that_changes_while_it_is_encoded_is_not_cached_under_its_old_key(tmp_path, which):
    folder = write_pairs(tmp_path / "set", 2)
    path = folder / which / "photo_1.png"
    found = find_pairs(folder, lambda path: True)
    pairs = check_pairs(found, name="set", megapixels=0.01, max_references=3).pairs

    def encode(checked) -> CachedItem:
        if checked.pair.name == "photo_1":
            write_picture(load_photograph(7), path)
        latents = torch.zeros(16, checked.size[1] // 8, checked.size[0] // 8)
        return CachedItem(latents, (latents.clone(),), torch.ones(3, 5), torch.ones(3, 5))

    keyed = find_items(tmp_path / "store", pairs, {})
    with pytest.raises(FileError, match=rf"{which}/photo_1\.png changed while it was read"):
        cache_pairs(tmp_path / "store", "set", keyed, encode, {})
    assert len(list((tmp_path / "store" / "items").iterdir())) == 1  # photo_0
    assert not (tmp_path / "store" / "sets").exists()
