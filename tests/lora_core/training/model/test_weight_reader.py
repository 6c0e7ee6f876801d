"""Weights are read from their file once, in chunks, and nothing waits for the GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from demo_base import dit
from qwen_edit_lora.lora_core.base_model.base_files import BaseFile, open_base_file
from qwen_edit_lora.lora_core.base_model.base_weight import BaseWeight
from qwen_edit_lora.lora_core.disk.safetensors_file import UnmappedFile
from qwen_edit_lora.lora_core.errors import NonFiniteWeightsError
from qwen_edit_lora.lora_core.training.model import weight_reader
from qwen_edit_lora.lora_core.training.model.loading import load_transformer
from qwen_edit_lora.lora_core.training.model.quantization import build_linear
from qwen_edit_lora.lora_core.training.model.weight_reader import Staging, WeightReader
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensorMode

TO_Q = "transformer_blocks.0.attn.to_q"
CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")


class OneWeight:
    """Stands in for a base file with one weight in memory, and no bias."""

    name = "one"
    file = None

    def __init__(self, weight):
        self.weight = weight

    def read_weight(self, module_path):
        return self.weight

    def read_tensor(self, key):
        return None


@pytest.fixture
def narrow_chunks(monkeypatch):
    """Splits a small weight into several chunks of 64 rows each."""
    monkeypatch.setattr(weight_reader, "CHUNK", 64 * dit.WIDTH)


@pytest.mark.parametrize("storage", ["bf16", "fp32", "fp8", "int8", "nf4", "as stored"])
@pytest.mark.parametrize("kind", ["fp32", "fp8_scaled"])
def test_small_chunks_give_the_same_codes(kind, storage, tmp_path, monkeypatch):
    path = dit.write_dit(tmp_path / "dit.safetensors", "2509", kind)
    whole = load_transformer(path, storage).transformer.get_submodule(TO_Q)
    monkeypatch.setattr(weight_reader, "CHUNK", 64 * dit.WIDTH)
    chunked = load_transformer(path, storage).transformer.get_submodule(TO_Q)
    assert chunked.weight.dtype == whole.weight.dtype
    pairs = zip(list_tensors(whole), list_tensors(chunked), strict=True)
    assert all(torch.equal(as_bytes(found), as_bytes(expected)) for expected, found in pairs)


def list_tensors(module):
    return [*module.parameters(), *module.buffers()]


def as_bytes(tensor):
    return tensor.detach().reshape(-1).view(torch.uint8)


class CountedFile(UnmappedFile):
    num_read = 0

    def read_rows(self, key, rows, buffer=None):
        values = super().read_rows(key, rows, buffer)
        self.num_read += values.numel() * values.dtype.itemsize
        return values


@pytest.mark.parametrize(
    ("kind", "storage"), [("fp8_scaled", "fp8"), ("fp8", "as stored"), ("bf16", "int8")]
)
def test_every_byte_of_a_weight_is_read_once(kind, storage, tmp_path, narrow_chunks):
    path = dit.write_dit(tmp_path / "dit.safetensors", "2509", kind)
    file = CountedFile(path)
    build_linear(WeightReader(BaseFile(file), CPU), TO_Q, storage, torch.bfloat16)
    sizes = [
        t.numel() * t.dtype.itemsize
        for key, t in file.tensors.items()
        if key.startswith(f"{TO_Q}.")
    ]
    assert file.num_read == sum(sizes)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads Linux's /proc")
def test_a_file_is_never_mapped_while_it_is_loaded(tmp_path):
    path = dit.write_dit(tmp_path / "dit.safetensors")
    looked = []

    def look():
        looked.append(path.name in Path("/proc/self/maps").read_text())
        return False

    load_transformer(path, should_stop=look)
    assert len(looked) > 10
    assert not any(looked)
    handles = Path("/proc/self/fd").iterdir()
    assert path not in [entry.readlink() for entry in handles if entry.exists()]


def test_rows_of_a_file_are_its_rows(tmp_path):
    path = dit.write_dit(tmp_path / "dit.safetensors", "2509", "fp8_scaled")
    file, expected = UnmappedFile(path), load_file(path)
    assert file.tensors.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(as_bytes(file.read(key)), as_bytes(tensor))
    key = f"{TO_Q}.weight"
    buffer = torch.zeros(2**16, dtype=torch.uint8)
    rows = file.tensors[key].load_rows(slice(3, 9), buffer)
    assert torch.equal(as_bytes(rows), as_bytes(expected[key][3:9]))
    assert rows.data_ptr() == buffer.data_ptr()
    small = file.tensors[key].load_rows(slice(3, 9), buffer[:5])
    assert torch.equal(as_bytes(small), as_bytes(expected[key][3:9]))


def make_fake(kind: str) -> BaseWeight:
    """A weight on a fake GPU; inside a FakeTensorMode."""
    if kind == "float":
        return BaseWeight(torch.randn(256, 64, device=CUDA), None)
    codes = torch.zeros(256, 64, dtype=torch.uint8, device=CUDA).view(torch.int8)
    return BaseWeight(codes, torch.ones(256, 1, device=CUDA), 64 if kind == "rotated" else 0)


@pytest.mark.parametrize(
    ("kind", "storage"),
    [
        *(("float", storage) for storage in ("bf16", "fp32", "fp8", "int8", "as stored")),
        *(("int8", storage) for storage in ("bf16", "fp8", "int8", "as stored")),
        *(("rotated", storage) for storage in ("bf16", "fp8", "as stored")),
    ],
)
def test_building_a_linear_on_a_gpu_reads_no_value_back(kind, storage, narrow_chunks):
    # Tensors have no data: FakeTensorMode raises if a value is read.
    with FakeTensorMode():
        reader = WeightReader(OneWeight(make_fake(kind)), CUDA)
        linear = build_linear(reader, TO_Q, storage, torch.bfloat16)
        x = torch.randn(3, 64, dtype=torch.bfloat16, device=CUDA)
        out = linear(x)
        assert (out.device, out.dtype, out.shape) == (CUDA, torch.bfloat16, (3, 256))
        assert {t.device for t in (*linear.parameters(), *linear.buffers())} == {CUDA}
        assert reader.extremes


def test_the_check_names_the_first_wrong_tensor():
    reader = WeightReader(OneWeight(None), CPU)
    reader.check(torch.ones(3), "first in file")
    reader.check(torch.tensor([1.0, float("inf")]), "second in file")
    reader.check(torch.tensor([float("nan")]), "third in file")
    reader.check(torch.empty(0), "fourth in file")
    with pytest.raises(NonFiniteWeightsError, match="second in file holds NaN or Inf"):
        reader.finish()
    reader.finish()  # reported once


class Mark:
    def __init__(self, log, turn):
        self.log, self.turn = log, turn

    def synchronize(self):
        self.log.append(("waited", self.turn))


class WatchedStaging(Staging):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.log = []

    def mark(self):
        turn = 1 - self.turn
        self.log.append(("copied", turn))
        return Mark(self.log, turn)


def test_a_pinned_buffer_is_filled_again_only_after_its_copy_is_done(tmp_path, narrow_chunks):
    path = dit.write_dit(tmp_path / "dit.safetensors")
    key = f"{TO_Q}.weight"
    base = open_base_file(path)
    reader = WeightReader(base, CPU)
    buffers = tuple(torch.empty(2**16, dtype=torch.uint8) for _ in range(2))
    reader.staging = WatchedStaging(CPU, buffers)
    chunks = [chunk for _, chunk in reader.read_values(base.read_weight(TO_Q), "w")]
    assert torch.equal(torch.cat(chunks), load_file(path)[key].float())
    assert reader.staging.log == [
        ("copied", 0),
        ("copied", 1),
        ("waited", 0),
        ("copied", 0),
    ]
