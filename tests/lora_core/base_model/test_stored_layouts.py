"""Base weights of both families in every storage, split and fused; comfy-kitchen as oracle."""

from __future__ import annotations

import json

import pytest
import torch
from qwen_edit_lora.lora_core import (
    Adapter,
    FileError,
    KeyFormatError,
    LoraWeights,
    extract_adapter,
    inspect_adapter,
)
from qwen_edit_lora.lora_core.base_model.base_files import open_base_file
from qwen_edit_lora.lora_core.base_model.base_weights import open_base
from qwen_edit_lora.lora_core.base_model.families import FAMILIES
from qwen_edit_lora.lora_core.training.model.architecture import read_architecture
from safetensors.torch import save_file

BLOCK = "transformer_blocks.0."
GATE, UP, FUSED = (f"{BLOCK}img_mlp.{name}" for name in ("gate_layer", "proj", "gate_up"))
TO_Q = f"{BLOCK}attn.to_q"
ROWS, COLUMNS = 256, 512


def draw(rows: int = 2 * ROWS, columns: int = COLUMNS, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * 0.02


def note(**fields: object) -> torch.Tensor:
    return torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8)


def store(values: torch.Tensor, storage: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """What a file holds of a weight, by ending, and the values it stands for."""
    kitchen = pytest.importorskip("comfy_kitchen")
    if storage == "bf16":
        return {"weight": values.bfloat16()}, values.bfloat16().float()
    if storage == "scaled fp8":
        scale = values.abs().max() / 448
        codes = (values / scale).to(torch.float8_e4m3fn)
        return {"weight": codes, "weight_scale": scale}, codes.float() * scale
    if storage == "int8 convrot":
        from comfy_kitchen.tensor import TensorWiseINT8Layout as layout

        codes, params = layout.quantize(values, per_channel=True, is_weight=True, convrot=True)
        fields = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 256}
        entries = {"weight": codes, "weight_scale": params.scale, "comfy_quant": note(**fields)}
        return entries, layout.dequantize(codes, params).float()
    if storage == "convrot_w4a4":
        from comfy_kitchen.tensor import TensorCoreConvRotW4A4Layout as layout

        codes, params = layout.quantize(values)
        entries = {"weight": codes, "weight_scale": params.scale}
        entries["comfy_quant"] = note(format=storage, convrot_groupsize=256)
        return entries, layout.dequantize(codes, params).float()
    if storage == "nvfp4":
        scale = values.abs().max() / (448 * 6)
        codes, blocks = kitchen.quantize_nvfp4(values, scale)
        entries = {"weight": codes, "weight_scale": blocks, "weight_scale_2": scale}
        entries["comfy_quant"] = note(format=storage)
        return entries, kitchen.dequantize_nvfp4(codes, scale, blocks, torch.float32)
    assert storage == "mxfp8"
    codes, blocks = kitchen.quantize_mxfp8(values)
    entries = {"weight": codes, "weight_scale": blocks, "comfy_quant": note(format=storage)}
    return entries, kitchen.dequantize_mxfp8(codes, blocks, torch.float32)


STORAGES = {
    "bf16": "bfloat16",
    "scaled fp8": "scaled float8_e4m3fn",
    "int8 convrot": "rotated int8",
    "convrot_w4a4": "rotated int4",
    "nvfp4": "nvfp4",
    "mxfp8": "mxfp8",
}


def build_base(path: str, entries: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        f"{TO_Q}.weight": draw(8, 8),
        **{f"{path}.{ending}": tensor for ending, tensor in entries.items()},
    }


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("is_in_file", [False, True], ids=["in memory", "in a file"])
def test_both_halves_of_a_fused_weight_are_read_in_every_storage(storage, is_in_file, tmp_path):
    entries, expected = store(draw(), storage)
    base = build_base(FUSED, entries)
    if is_in_file:
        save_file({k: t.contiguous() for k, t in base.items()}, tmp_path / "base.safetensors")
        base = tmp_path / "base.safetensors"
    weights = open_base(base)
    for path, values in zip((GATE, UP), expected.chunk(2), strict=True):
        weight = weights.get(path)
        assert weight.storage == STORAGES[storage]
        torch.testing.assert_close(weight.values, values, rtol=1e-5, atol=1e-7)
        rows = torch.tensor([0, 77, ROWS - 1])
        torch.testing.assert_close(weight.take_rows(rows).values, weight.values[rows])
    whole = weights.get(FUSED)
    torch.testing.assert_close(whole.values, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("storage", STORAGES)
def test_the_matrices_of_a_base_are_those_of_the_split_layout(storage):
    entries, _ = store(draw(), storage)
    matrices = open_base(build_base(FUSED, entries)).list_matrices()
    shapes = {path: tuple(tensor.shape) for path, tensor in matrices.items()}
    assert shapes == {TO_Q: (8, 8), GATE: (ROWS, COLUMNS), UP: (ROWS, COLUMNS)}


def test_w4a8_is_its_table_times_its_scales_rotated_back():
    """asym_w4a8_int8 as its writers describe it: places in a table, e4m3 scales per 16 columns,
    rounded to int8, one scale per row, ConvRot."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (32, COLUMNS), generator=generator)
    table = torch.sort(torch.randn(16, generator=generator))[0] * 20
    groups = (torch.rand(32, COLUMNS // 16, generator=generator) * 4).to(torch.float8_e4m3fn)
    scale = torch.rand(32, generator=generator) * 1e-3
    packed = (codes[:, 0::2] | codes[:, 1::2] << 4).to(torch.uint8).view(torch.int8)
    numbers = table[codes].double() * groups.double().repeat_interleave(16, dim=1)
    numbers = numbers.round().clamp(-127, 127) * scale.double()[:, None]
    factor = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]).double() / 2
    hadamard = factor
    for _ in range(3):
        hadamard = torch.kron(hadamard, factor)
    expected = torch.cat([part @ hadamard.T for part in numbers.split(256, dim=1)], dim=1)
    for stored_groups in (groups, groups.view(torch.uint8)):
        entries = {
            "weight": packed,
            "weight_codebook": table,
            "weight_s_rel": stored_groups,
            "weight_s_channel": scale,
            "comfy_quant": note(format="asym_w4a8_int8", group_size=16, convrot_groupsize=256),
        }
        weight = open_base(build_base(FUSED, entries)).get(UP)
        assert weight.storage == "rotated w4a8"
        torch.testing.assert_close(weight.values.double(), expected[16:], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("broken", "storage"),
    [
        ({"weight_scale": torch.ones(3)}, "convrot_w4a4"),
        ({"weight_scale": None}, "convrot_w4a4"),
        ({"comfy_quant": note(format="convrot_w4a4", convrot_groupsize=48)}, "convrot_w4a4"),
        ({"comfy_quant": note(format="convrot_w4a4", convrot_groupsize="256")}, "convrot_w4a4"),
        ({"weight_scale_2": None}, "nvfp4"),
        ({"weight_scale": torch.ones(4).to(torch.float8_e4m3fn)}, "nvfp4"),
        ({"weight": torch.ones(2 * ROWS, COLUMNS)}, "nvfp4"),
        ({"comfy_quant": note(format="asym_w4a8_int8")}, "convrot_w4a4"),
        ({"comfy_quant": note(format="awq_w4a16")}, "convrot_w4a4"),
        ({"comfy_quant": note(format=["nvfp4"])}, "nvfp4"),
    ],
)
def test_a_packed_weight_with_wrong_parts_is_named_in_a_sentence(broken, storage):
    entries, _ = store(draw(), storage)
    entries = {k: t for k, t in {**entries, **broken}.items() if t is not None}
    with pytest.raises(FileError, match=rf"stores {FUSED} as .* which cannot be read here yet"):
        open_base(build_base(FUSED, entries)).get(GATE)


def test_a_fused_weight_of_an_odd_number_of_rows_is_refused():
    base = open_base(build_base(FUSED, {"weight": draw(7, 8)}))
    with pytest.raises(FileError, match="a matrix of 2 equal parts"):
        base.get(GATE)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_base_tells_its_family(family, prefix):
    shapes = dict.fromkeys(family.list_module_paths(1), (2,))
    tensors = {f"{prefix}{path}.weight": torch.empty(2, 2) for path in shapes}
    assert open_base(tensors).family is family


def test_nothing_is_trained_on_another_family():
    family = next(one for one in FAMILIES if one.name == "qwen-image-2.1")
    shapes = {f"{path}.weight": (2, 2) for path in family.list_module_paths(1)}
    with pytest.raises(KeyFormatError, match=r"is a Qwen-Image-2\.1 model, on which"):
        read_architecture(shapes, "base.safetensors")


def test_packed_weights_are_refused_for_training(tmp_path):
    entries, _ = store(draw(), "nvfp4")
    tensors = build_base(GATE, entries)
    save_file({k: t.contiguous() for k, t in tensors.items()}, tmp_path / "base.safetensors")
    with pytest.raises(FileError, match="as nvfp4, which training cannot read here yet"):
        open_base_file(tmp_path / "base.safetensors").read_weight(GATE)


def make_adapter() -> Adapter:
    torch.manual_seed(0)
    return Adapter(
        {
            path: LoraWeights(torch.randn(4, COLUMNS), torch.randn(ROWS, 4) * 1e-3)
            for path in (GATE, UP)
        }
    )


@pytest.mark.parametrize("storage", STORAGES)
def test_an_inspection_against_a_fused_base_is_that_against_a_split_one(storage):
    fused, values = store(draw(), storage)
    split = {f"{TO_Q}.weight": draw(8, 8)}
    for path, part in zip((GATE, UP), values.chunk(2), strict=True):
        split[f"{path}.weight"] = part
    adapter = make_adapter()
    found = inspect_adapter(adapter, build_base(FUSED, fused))
    expected = inspect_adapter(adapter, split)
    assert found.skipped == {}
    for path in (GATE, UP):
        ours, theirs = found.modules[path].base, expected.modules[path].base
        assert ours.storage == STORAGES[storage]
        for name in ("frobenius", "ratio", "spectral", "cosine", "alignment"):
            assert getattr(ours, name) == pytest.approx(getattr(theirs, name), rel=1e-3, abs=1e-6)
    kinds = [finding.kind for finding in found.findings]
    assert ("merge_unknown" in kinds) == (storage == "nvfp4")


def test_an_adapter_of_another_family_is_not_compared_with_the_base():
    base = {f"{BLOCK}txt_mlp.net.2.weight": draw(8, 8)}
    inspection = inspect_adapter(make_adapter(), base)
    assert inspection.modules == {}
    assert set(inspection.misfits) == {GATE, UP}
    (text,) = inspection.verdict
    assert "the base is a Qwen-Image model, the adapter was made for Qwen-Image-2.1" in text


@pytest.mark.parametrize("storage", ["bf16", "int8 convrot", "convrot_w4a4"])
def test_a_lora_is_extracted_between_a_split_and_a_fused_file(storage):
    """The difference of a fused file, quantised or not, and a split one is in split modules."""
    fused, values = store(draw(), storage)
    delta = torch.zeros(2 * ROWS, COLUMNS)
    delta[:ROWS] = draw(ROWS, 2, seed=1) @ draw(2, COLUMNS, seed=2) * 50
    tuned = {f"{TO_Q}.weight": draw(8, 8)}
    for path, part in zip((GATE, UP), (values + delta).chunk(2), strict=True):
        tuned[f"{path}.weight"] = part
    composition = extract_adapter(build_base(FUSED, fused), tuned, rank=2)
    assert composition.adapter.family == "qwen-image-2.1"
    found = composition.adapter.modules[GATE].delta()
    torch.testing.assert_close(found, delta[:ROWS], rtol=1e-3, atol=1e-5)


def write_gguf(tensors: dict[str, torch.Tensor], path, kind: str):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "qwen_image21")
    type_ = gguf.GGMLQuantizationType[kind]
    for key, tensor in tensors.items():
        writer.add_tensor(key, gguf.quants.quantize(tensor.numpy(), type_), raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "F16"])
@pytest.mark.parametrize("is_fused", [False, True], ids=["split", "fused"])
def test_a_gguf_of_2_1_is_read_by_its_halves(kind, is_fused, tmp_path):
    gguf = pytest.importorskip("gguf")
    values = draw()
    stored = {FUSED: values} if is_fused else dict(zip((GATE, UP), values.chunk(2), strict=True))
    tensors = {f"{TO_Q}.weight": draw(64, 64)} | {f"{p}.weight": w for p, w in stored.items()}
    weights = open_base(write_gguf(tensors, tmp_path / "base.gguf", kind))
    assert weights.family.name == "qwen-image-2.1"
    type_ = gguf.GGMLQuantizationType[kind]
    codes = gguf.quants.quantize(values.numpy(), type_)
    expected = torch.from_numpy(gguf.quants.dequantize(codes, type_)).float()
    for path, part in zip((GATE, UP), expected.chunk(2), strict=True):
        torch.testing.assert_close(weights.get(path).values, part)
        assert weights.get(path).storage == ("float16" if kind == "F16" else f"GGUF {kind}")


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_folder_of_numbered_parts_is_read_as_one_base(family, tmp_path):
    folder = tmp_path / "transformer"
    folder.mkdir()
    paths = family.list_module_paths(1)
    tensors = {f"{path}.weight": draw(4, 4, seed=i) for i, path in enumerate(paths)}
    names = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    weight_map = {key: names[i % 2] for i, key in enumerate(tensors)}
    for name in names:
        save_file({k: t for k, t in tensors.items() if weight_map[k] == name}, folder / name)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text("{}")
    weights = open_base(tmp_path)
    assert weights.family is family
    assert set(weights.list_matrices()) == set(paths)
    assert torch.equal(weights.get(paths[3]).values, tensors[f"{paths[3]}.weight"])
