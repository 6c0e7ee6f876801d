"""Tensors stay in their file, as stored, until they are requested."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from qwen_edit_lora.lora_core import FileError, NonFiniteWeightsError, read_adapter
from qwen_edit_lora.lora_core.adapter.adapter import is_finite
from qwen_edit_lora.lora_core.disk.safetensors_file import SafetensorsFile, StoredTensor

TO_Q = "transformer_blocks.0.attn.to_q"
DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_are_read_in_the_dtype_they_are_stored_in(dtype, make_state_dict, write_file):
    state_dict = make_state_dict(dtype=dtype)
    adapter = read_adapter(write_file(state_dict))
    lora_A = adapter.modules[TO_Q].lora_A
    assert lora_A.dtype == dtype
    assert torch.equal(
        lora_A.view(torch.uint8),
        state_dict[f"diffusion_model.{TO_Q}.lora_A.weight"].view(torch.uint8),
    )
    assert adapter.report.dtypes == {str(dtype).removeprefix("torch."): 2}


def test_an_unknown_dtype_is_refused_with_the_ones_expected(write_file):
    path = write_file({f"{TO_Q}.lora_A.weight": torch.ones(2, 4, dtype=torch.complex64)})
    with pytest.raises(FileError, match=r"stored as C64; expected one of.*Save it again as bf16"):
        read_adapter(path)


def test_shapes_and_sizes_are_known_before_any_tensor_is_read(make_state_dict, write_file):
    adapter = read_adapter(write_file(make_state_dict(rank=3, dtype=torch.bfloat16)))
    part = adapter.modules[TO_Q].parts["lora_A"]
    assert isinstance(part, StoredTensor)
    assert (part.shape, part.ndim, part.numel()) == (torch.Size([3, 4]), 2, 12)
    assert (adapter.modules[TO_Q].num_parameters(), adapter.modules[TO_Q].size_bytes()) == (24, 48)


def write_sparse_file(path: Path) -> int:
    """A LoRA of zeros that takes no disk space; returns its size in bytes."""
    header, end = {}, 0
    for block in range(50):
        for name, shape in {"A": (64, 16384), "B": (16384, 64)}.items():
            key = f"diffusion_model.transformer_blocks.{block}.attn.to_q.lora_{name}.weight"
            offsets = [end, end := end + 2 * shape[0] * shape[1]]
            header[key] = {"dtype": "BF16", "shape": shape, "data_offsets": offsets}
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw)
    os.truncate(path, 8 + len(raw) + end)
    return end


def read_resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_opening_a_big_file_takes_no_memory_for_its_tensors(tmp_path):
    size_bytes = write_sparse_file(tmp_path / "big.safetensors")
    before = read_resident_bytes()
    adapter = read_adapter(tmp_path / "big.safetensors")
    opened = read_resident_bytes() - before
    adapter.check_finite()  # reads every tensor, so the measure would show it
    assert read_resident_bytes() - before > size_bytes / 2 > 100e6
    assert opened < size_bytes / 20


def test_reading_opens_nothing_but_the_alphas(make_state_dict, write_file, monkeypatch):
    read = []
    original = SafetensorsFile.read
    monkeypatch.setattr(
        SafetensorsFile, "read", lambda self, key: read.append(key) or original(self, key)
    )
    read_adapter(write_file(make_state_dict("musubi", alpha=1.0)))
    assert sorted(read) == [
        "lora_unet_transformer_blocks_0_attn_to_k.alpha",
        "lora_unet_transformer_blocks_0_attn_to_q.alpha",
    ]


def test_a_released_file_is_mapped_again_when_needed(make_state_dict, write_file):
    adapter = read_adapter(write_file(make_state_dict()))
    before = adapter.modules[TO_Q].lora_A.clone()
    adapter.release()
    assert torch.equal(adapter.modules[TO_Q].lora_A, before)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")
def test_no_mapping_stays_open_after_release(make_state_dict, write_file):
    adapter = read_adapter(write_file(make_state_dict(), name="mapped.safetensors"))
    adapter.modules[TO_Q].delta()
    assert "mapped.safetensors" in Path("/proc/self/maps").read_text()
    adapter.release()
    assert "mapped.safetensors" not in Path("/proc/self/maps").read_text()


def test_a_file_deleted_after_opening_is_a_clear_error(make_state_dict, write_file):
    path = write_file(make_state_dict())
    adapter = read_adapter(path)
    path.unlink()
    with pytest.raises(FileError, match=r"my lora.safetensors does not exist.*Put it back"):
        adapter.modules[TO_Q].delta()


@pytest.mark.parametrize("released", [False, True])
def test_a_file_replaced_after_opening_is_refused(released, make_state_dict, write_file, tmp_path):
    adapter = read_adapter(write_file(make_state_dict()))
    if released:
        adapter.release()
    other = write_file(make_state_dict(), name="other.safetensors")
    os.replace(other, tmp_path / "my lora.safetensors")  # noqa: PTH105
    with pytest.raises(FileError, match=r"changed on disk since it was opened.*Queue the prompt"):
        adapter.modules[TO_Q].delta()


def test_a_file_cut_short_after_opening_is_refused_instead_of_a_crash(make_state_dict, write_file):
    path = write_file(make_state_dict(rank=64))
    adapter = read_adapter(path)
    os.truncate(path, 100)
    with pytest.raises(FileError, match="changed on disk"):
        adapter.modules[TO_Q].delta()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_non_finite_weights_are_found_in_every_dtype(dtype, bad, make_state_dict, write_file):
    if dtype == torch.float8_e4m3fn and bad == bad:
        bad = float("nan")  # the format has no Inf
    state_dict = make_state_dict(dtype=torch.float32)
    state_dict[f"diffusion_model.{TO_Q}.lora_B.weight"][1, 1] = bad
    adapter = read_adapter(write_file({key: t.to(dtype) for key, t in state_dict.items()}))
    message = rf"my lora.safetensors holds NaN or Inf in {TO_Q} \(lora_B\); expected finite"
    with pytest.raises(NonFiniteWeightsError, match=message):
        adapter.check_finite()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_largest_finite_numbers_pass(dtype):
    info = torch.finfo(dtype)
    numbers = torch.tensor([info.min, info.max, 0.0, -0.0], dtype=torch.float64).to(dtype)
    assert is_finite(numbers)


def test_more_than_one_bad_tensor_is_counted(make_state_dict, write_file):
    state_dict = {key: tensor * torch.inf for key, tensor in make_state_dict().items()}
    adapter = read_adapter(write_file(state_dict))
    with pytest.raises(NonFiniteWeightsError, match=r"and 3 more tensors.*earlier checkpoint"):
        adapter.check_finite()


def test_finite_weights_pass_the_check(make_state_dict, write_file):
    adapter = read_adapter(write_file(make_state_dict()))
    adapter.check_finite()
    Path(adapter.file.path).unlink()
    adapter.check_finite()  # cached: the file is not read a second time
