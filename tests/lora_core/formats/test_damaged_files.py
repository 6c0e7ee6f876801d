"""Files that are not adapters: a one-sentence error with what was expected and what to do."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile

import pytest
import torch
from qwen_edit_lora.lora_core import FileError, KeyFormatError, ShapeError, read_adapter
from qwen_edit_lora.lora_core.errors import EmptyPartError
from safetensors.torch import save

KEY = "diffusion_model.transformer_blocks.0.attn.to_q.lora_{}.weight"


def build_file(header: dict | bytes, data: bytes = b"", claimed: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if claimed is None else claimed) + raw + data


def entry(shape, offsets, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


DAMAGED = {
    "zero bytes": (b"", r"is empty \(0 bytes\); expected a safetensors file"),
    "five bytes": (b"\x10\x00\x00\x00\x00", "ends early: 5 bytes"),
    "eight bytes": (struct.pack("<Q", 8), "ends early: 8 bytes, but its header alone claims 8"),
    "header longer than the file": (build_file({}, claimed=10**9), "claims 1,000,000,000"),
    "header of the largest size": (build_file({}, claimed=2**64 - 1), "truncated or not a safe"),
    "header no JSON": (build_file(b"{not json  "), "is damaged: its header is not readable"),
    "header no UTF-8": (build_file(b'{"\xff\xfe":1}'), "is damaged: its header is not readable"),
    "header no object": (build_file(b"[1, 2]"), "is damaged: its header is not readable"),
    "data cut off": (
        build_file({KEY.format("A"): entry([2, 4], [0, 32])}, b"\0" * 31),
        "is damaged: its header does not match its data",
    ),
    "data too long": (
        build_file({KEY.format("A"): entry([2, 4], [0, 32])}, b"\0" * 40),
        "is damaged: its header does not match its data",
    ),
    "shape against offsets": (
        build_file({KEY.format("A"): entry([2, 5], [0, 32])}, b"\0" * 32),
        "is damaged: its header does not match its data",
    ),
    "offsets overlap": (
        build_file(
            {KEY.format("A"): entry([2], [0, 8]), KEY.format("B"): entry([2], [4, 12])}, b"\0" * 12
        ),
        "is damaged: its header does not match its data",
    ),
    "offsets backwards": (
        build_file({KEY.format("A"): entry([2], [8, 0])}, b"\0" * 8),
        "is damaged",
    ),
    "dtype unheard of": (
        build_file({KEY.format("A"): entry([2], [0, 8], "F99")}, b"\0" * 8),
        "is damaged: its header is not readable",
    ),
    "text": (b"<!DOCTYPE html><html>404</html>", "truncated or not a safetensors file: download"),
    "GGUF": (b"GGUF\x03\x00\x00\x00" + b"\0" * 64, "is a GGUF file; expected a LoRA file in safet"),
    "pickle": (pickle.dumps({"a": 1}), "is a PyTorch pickle, despite its name"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_file_is_a_one_sentence_error_with_its_name(case, tmp_path):
    content, message = DAMAGED[case]
    path = tmp_path / "broken.safetensors"
    path.write_bytes(content)
    with pytest.raises(FileError, match=message) as caught:
        read_adapter(path)
    assert str(caught.value).startswith("broken.safetensors ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("keep", [0.999, 0.9, 0.5, 0.1])
def test_a_truncated_download_is_recognised(keep, make_state_dict, write_file):
    path = write_file(make_state_dict(rank=16))
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(FileError, match=r"truncated.*download or copy it again"):
        read_adapter(path)


@pytest.mark.parametrize("new_zipfile", [True, False])
def test_a_renamed_pickle_is_refused_without_being_opened(new_zipfile, tmp_path):
    path = tmp_path / "pickle.safetensors"
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=new_zipfile)
    with pytest.raises(FileError, match="refused: if you trust it, convert it"):
        read_adapter(path)


def test_a_zip_archive_is_refused(tmp_path):
    path = tmp_path / "lora.safetensors"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("lora.safetensors", b"0" * 100)
    with pytest.raises(FileError, match="expected safetensors"):
        read_adapter(path)


@pytest.mark.parametrize("header_size", [0x280, 0x380, 0x480, 0x580])
def test_a_header_size_that_looks_like_a_pickle_is_read(header_size, make_state_dict, write_file):
    state_dict = make_state_dict(modules=["img_in"])
    path = write_file(state_dict, {"padding": ""})
    shortest = int.from_bytes(path.read_bytes()[:8], "little")
    path = write_file(state_dict, {"padding": "x" * (header_size - shortest)})
    assert path.read_bytes()[:8] == struct.pack("<Q", header_size)
    assert set(read_adapter(path).modules) == {"img_in"}


def test_a_folder_is_refused(tmp_path):
    (tmp_path / "lora.safetensors").mkdir()
    with pytest.raises(
        FileError, match=r"is a folder without adapter_model.safetensors and pytorch"
    ):
        read_adapter(tmp_path / "lora.safetensors")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.safetensors", "does not exist; expected a LoRA file"),
        ("n" * 300 + ".safetensors", "cannot be opened: File name too long"),
        ("file/inside.safetensors", "cannot be opened: Not a directory"),
    ],
    ids=["missing", "300 characters", "below a file"],
)
def test_a_path_that_cannot_be_opened_is_a_clear_error(name, message, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(FileError, match=message) as caught:
        read_adapter(tmp_path / name)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    "name", ["画像編集 é ü 🎨.safetensors", "n" * 200 + ".safetensors", "a'b\"c %s"]
)
def test_unusual_names_are_read(name, make_state_dict, write_file):
    assert read_adapter(write_file(make_state_dict(), name=name)).name == name


def test_a_file_without_tensors_is_a_clear_error(write_file):
    with pytest.raises(KeyFormatError, match=r"my lora.safetensors holds no tensors; expected"):
        read_adapter(write_file({}))


def test_an_error_for_a_non_utf8_name_shows_the_name_only(make_state_dict, tmp_path):
    path = tmp_path / os.fsdecode(b"\xffx.safetensors")
    try:
        path.write_bytes(save(make_state_dict()))
    except (OSError, UnicodeError):
        pytest.skip("this file system takes no such name")
    with pytest.raises(FileError, match="is not UTF-8 text; rename it") as error:
        read_adapter(path)
    assert str(tmp_path) not in str(error.value)
    assert str(error.value).isprintable()


def make_pair(down, up, ends=("lora_A.weight", "lora_B.weight")):
    stem = KEY.split(".lora_")[0]
    return {f"{stem}.{ends[0]}": torch.ones(down), f"{stem}.{ends[1]}": torch.ones(up)}


@pytest.mark.parametrize(
    ("state_dict", "message"),
    [
        (make_pair((2, 4), (4, 3)), r"lora_B \(4, 3\) and lora_A \(2, 4\) do not fit; expected"),
        (make_pair((2, 4, 1, 1), (4, 2, 1, 1)), "expected .out_features, rank."),
        (make_pair((0, 4), (4, 0)), "with one rank of at least 1"),
        (make_pair((4,), (4,)), "do not fit"),
        (make_pair((2, 2, 2), (2,), ("lokr_w1", "lokr_w2")), "lokr_w1 is .*expected two dimens"),
        (make_pair((2, 2, 3), (4,), ("oft_blocks", "rescale")), r"expected \(blocks, size, size\)"),
        (make_pair((2, 2, 2), (3,), ("oft_blocks", "rescale")), "one gain for each of 4 rows"),
        (make_pair((2, 4), (4, 2)) | {KEY.split(".lora")[0] + ".dora_scale": torch.ones(3)},
         r"the DoRA magnitude is \(3,\); expected \(4,\), \(4, 1\) or \(1, 4\)"),
        (make_pair((2, 4), (4, 2)) | {KEY.split(".lora")[0] + ".alpha": torch.ones(2)},
         r"alpha is \(2,\); expected a single number"),
    ],
)  # fmt: skip
def test_an_error_for_mismatched_tensors_names_the_module(state_dict, message, write_file):
    with pytest.raises(ShapeError, match=message) as caught:
        read_adapter(write_file(state_dict))
    assert str(caught.value).startswith("my lora.safetensors, transformer_blocks.0.attn.to_q: ")


EMPTY = {
    "lora_A without columns": make_pair((2, 0), (4, 2)),
    "lora_B without rows": make_pair((2, 4), (0, 2)),
    "both": make_pair((2, 0), (0, 2)),
    "lokr": make_pair((2, 2), (0, 2), ("lokr_w1", "lokr_w2")),
    "oft": {KEY.split(".lora_")[0] + ".oft_blocks": torch.ones(0, 2, 2)},
    "diff": {KEY.split(".lora_")[0] + ".diff": torch.ones(0, 4)},
}


@pytest.mark.parametrize("case", EMPTY)
def test_an_empty_part_is_explained_by_sharded_training(case, write_file):
    """As DeepSpeed and FSDP save it if it is not gathered: the file is not damaged on disk."""
    with pytest.raises(EmptyPartError, match=r"is empty\. Sharded training .* save the whole") as e:
        read_adapter(write_file(EMPTY[case]))
    assert "damaged" not in str(e.value)


def test_a_diff_without_dimensions_is_refused(write_file):
    with pytest.raises(ShapeError, match=r"transformer_blocks\.0\.attn\.to_q: "):
        read_adapter(write_file({KEY.split(".lora_")[0] + ".diff": torch.tensor(1.0)}))


@pytest.mark.parametrize(
    ("kind", "ending"),
    [
        *(("LoRA", end) for end in (".lora_A.weight", ".lora_B.weight")),
        *(("LoHa", f".hada_{name}") for name in ("w1_a", "w1_b", "w2_a", "w2_b")),
        *(("LoKr", f".lokr_{name}") for name in ("w1", "w2")),
        *(("LoKr half", f".lokr_{name}") for name in ("w1", "w2_a", "w2_b")),
        *(("LoKr factored", f".lokr_{name}") for name in ("w1_a", "w1_b", "w2_a", "w2_b")),
    ],
)
def test_a_missing_partner_key_is_an_error_that_names_the_module(
    kind, ending, make_state_dict, write_file
):
    state_dict = make_state_dict(kind=kind)
    del state_dict["diffusion_model.transformer_blocks.0.attn.to_q" + ending]
    message = "incomplete: transformer_blocks.0.attn.to_q has only .*without the partner keys"
    with pytest.raises(KeyFormatError, match=message):
        read_adapter(write_file(state_dict))
