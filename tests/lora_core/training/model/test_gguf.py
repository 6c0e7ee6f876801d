"""The cost of keeping a GGUF's own codes, and that this is never the default."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from counted_bytes import ByteCount
from demo_base import dit
from qwen_edit_lora.lora_core.training.config.presets import GIB, BaseSize, choose_storage
from qwen_edit_lora.lora_core.training.model.loading import load_transformer
from qwen_edit_lora.lora_core.training.model.model_config import ModelConfig
from qwen_edit_lora.lora_core.training.model.quantization import (
    AS_STORED,
    GGUF_COST,
    GgufCodes,
    import_gguf_kernels,
)
from torch._subclasses.fake_tensor import FakeTensorMode

ROWS, COLUMNS = 256, 1024
CUDA = torch.device("cuda:0")


def write_gguf(path, kind):
    import gguf

    writer = gguf.GGUFWriter(path, "qwen_image")
    for key, tensor in dit.make_dit("2509").items():
        type_ = gguf.GGMLQuantizationType[kind if tensor.ndim == 2 else "F32"]
        codes = gguf.quants.quantize(tensor.numpy(), type_)
        writer.add_tensor(key, codes, raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_decoding_on_a_gpu_moves_the_stated_number_of_bytes():
    gguf_utils = import_gguf_kernels()
    moved = {}
    for kind in gguf_utils.dequantize_functions:
        if kind in gguf_utils.UNQUANTIZED_TYPES:
            continue
        block, num_bytes = gguf_utils.GGML_QUANT_SIZES[kind]
        with FakeTensorMode():
            codes = torch.empty(ROWS, COLUMNS // block * num_bytes, dtype=torch.uint8, device=CUDA)
            with ByteCount() as count:
                values = GgufCodes(kind)(torch.bfloat16, codes)
        assert (values.shape, values.dtype, values.device) == (
            (ROWS, COLUMNS),
            torch.bfloat16,
            CUDA,
        )
        moved[kind.name] = round(count.num_bytes / (ROWS * COLUMNS))
    assert f"{min(moved.values())} to {max(moved.values())} bytes" in GGUF_COST
    assert min(moved, key=moved.get) == "Q8_0"


@pytest.mark.parametrize("storage", ["as stored", "fp8", "bf16"])
@pytest.mark.parametrize("kind", ["Q8_0", "BF16"])
def test_keeping_a_ggufs_codes_is_reported_with_its_cost(kind, storage, tmp_path):
    model = load_transformer(write_gguf(tmp_path / "dit.gguf", kind), storage)
    assert model.notes == ([GGUF_COST] if (kind, storage) == ("Q8_0", AS_STORED) else [])


def test_auto_never_chooses_a_gguf_files_own_storage():
    (default,) = (f.default for f in dataclasses.fields(ModelConfig) if f.name == "storage")
    sizes = [None, *(size * GIB for size in range(1, 200, 3))]
    base = BaseSize(60, 339_830_784, 40_519_744, 3072)  # Qwen-Image
    chosen = {choose_storage(base, size, 6 * GIB).storage for size in sizes}
    assert AS_STORED not in chosen | {default}
    assert len(chosen) > 2
