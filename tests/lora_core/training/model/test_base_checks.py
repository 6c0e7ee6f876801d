"""Damaged or forged base files: a one-sentence error, before anything is built."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from demo_base import dit
from qwen_edit_lora.lora_core.base_model.base_files import MARKER, open_base_file
from qwen_edit_lora.lora_core.base_model.base_weights import open_base
from qwen_edit_lora.lora_core.errors import FileError, KeyFormatError, LoraError
from qwen_edit_lora.lora_core.training.data.dataset import read_dataset
from qwen_edit_lora.lora_core.training.estimate.estimate import estimate_run
from qwen_edit_lora.lora_core.training.model import architecture
from qwen_edit_lora.lora_core.training.model.architecture import read_architecture
from qwen_edit_lora.lora_core.training.model.loading import load_transformer
from safetensors.torch import save_file
from tiny import make_config, make_dataset

PATH = "transformer_blocks.0.attn.to_q"
MAX_MESSAGE = 400


@pytest.fixture
def never_build(monkeypatch):
    """Fails if a model with more blocks than the demo's is built, which might never end."""
    build = architecture.Architecture.build_empty

    def check(self):
        assert self.num_layers <= dit.NUM_BLOCKS, self
        return build(self)

    monkeypatch.setattr(architecture.Architecture, "build_empty", check)


def write_gguf(path, state_dict, alter=lambda data: data):
    import gguf

    writer = gguf.GGUFWriter(path, "qwen_image")
    for key, tensor in state_dict.items():
        writer.add_tensor(key, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path.write_bytes(alter(path.read_bytes()))
    return path


def write_folder(folder, state_dict, config=None, index=None):
    folder.mkdir(exist_ok=True)
    save_file(state_dict, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps(config or {}))
    if index is not None:
        text = json.dumps({"weight_map": index})
        (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(text)
    return folder


WRITERS = {
    "single file": lambda path, tensors: (
        save_file(tensors, path / "b.safetensors") or path / "b.safetensors"
    ),
    "gguf": lambda path, tensors: write_gguf(path / "b.gguf", tensors),
    "folder": lambda path, tensors: write_folder(path / "b", tensors),
}


def check_refusal(caught) -> str:
    text = str(caught.value)
    assert isinstance(caught.value, LoraError)
    assert 0 < len(text) <= MAX_MESSAGE
    assert text.isprintable()
    return text


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("number", ["99999", "999999999", "9" * 5000, "3"])
def test_a_block_far_behind_the_others_is_refused_before_anything_is_built(
    kind, number, tmp_path, never_build
):
    if kind == "gguf" and len(number) > 60:
        pytest.skip("GGUF's names are short")
    state_dict = dit.make_dit("2509") | {f"transformer_blocks.{number}.x": torch.zeros(1)}
    source = WRITERS[kind](tmp_path, state_dict)
    with pytest.raises(KeyFormatError, match=r"expected 0, 1, .* without a gap") as caught:
        load_transformer(source)
    check_refusal(caught)


@pytest.mark.parametrize("odd", ["x", "attn.to_q.weight"])
def test_many_blocks_of_one_tensor_each_are_refused_before_they_are_built(
    odd, tmp_path, never_build
):
    state_dict = dit.make_dit("2509") | {
        f"transformer_blocks.{n}.{odd}": torch.zeros(1) for n in range(2, 500)
    }
    with pytest.raises(KeyFormatError, match="lacks"):
        load_transformer(WRITERS["single file"](tmp_path, state_dict))


@pytest.mark.parametrize("change", ["a gap", "a tensor less", "a tensor more"])
def test_an_estimate_of_such_a_file_is_refused_in_the_same_words(change, tmp_path, never_build):
    state_dict = dit.make_dit("2509")
    if change == "a tensor less":
        del state_dict[f"{PATH}.bias"]
    else:
        number = 77 if change == "a gap" else 1
        state_dict[f"transformer_blocks.{number}.x"] = torch.zeros(1)
    path = WRITERS["single file"](tmp_path, state_dict)
    make_dataset(tmp_path / "data")
    config = make_config(tmp_path, **{"model.source": str(path)})
    with pytest.raises(KeyFormatError) as caught:
        estimate_run(config, read_dataset(tmp_path / "data"))
    with pytest.raises(KeyFormatError) as loading:
        load_transformer(path)
    assert str(caught.value) == str(loading.value)


SHAPES = {key: tuple(shape) for key, shape in dit.list_shapes()}


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("img_in.weight", (0, 64)),
        ("img_in.weight", (160, 0)),
        ("img_in.weight", (161, 64)),
        ("img_in.weight", (160, 32)),
        ("img_in.weight", (160,)),
        ("txt_norm.weight", (0,)),
        ("transformer_blocks.0.attn.norm_q.weight", (0,)),
        ("transformer_blocks.0.attn.norm_q.weight", (5,)),
        ("transformer_blocks.0.attn.norm_q.weight", ()),
        ("proj_out.weight", (3, 160)),
        ("proj_out.weight", (0, 160)),
    ],
)
def test_impossible_model_sizes_are_a_clear_error(key, shape):
    with pytest.raises(KeyFormatError, match="is not a Qwen-Image model") as caught:
        read_architecture({**SHAPES, key: shape}, "b" * 300)
    check_refusal(caught)


AXES = [
    *(3, "16, 56, 56", {}, [], [4, 14], [4, 14, 14, 0], ["4", "14", "14"], [4.0, 14.0, 14.0]),
    *([True, 14, 17], [-4, 18, 18], [3, 15, 14], [4, 14, 16], [1e300] * 3, [[4], 14, 14]),
]


@pytest.mark.parametrize("axes", AXES, ids=str)
def test_axes_of_any_shape_are_a_clear_error(axes, tmp_path):
    folder = write_folder(tmp_path / "b", dit.make_dit("2509"), {"axes_dims_rope": axes})
    with pytest.raises(KeyFormatError, match=r"axes_dims_rope is .* expected 3 even") as caught:
        load_transformer(folder)
    check_refusal(caught)


@pytest.mark.parametrize("value", ["false", 0, [], {}])
def test_a_marker_that_is_not_a_boolean_is_not_a_2511(value, tmp_path):
    folder = write_folder(tmp_path / "b", dit.make_dit("2509"), {"zero_cond_t": value})
    with pytest.raises(FileError, match=r"zero_cond_t is .* expected true or false"):
        open_base_file(folder)


@pytest.mark.parametrize(
    "name",
    [
        *("..", ".", "", "../b/x.safetensors", "/etc/passwd"),
        "x" * 5000,
        "\0",
        7,
        None,
        ["x"],
        "\ud800",
    ],
)
def test_a_missing_file_named_in_an_index_is_a_clear_error(name, tmp_path):
    folder = write_folder(tmp_path / "b", dit.make_dit("2509"), index={"img_in.weight": name})
    with pytest.raises(FileError, match=r"lacks .* its index names") as caught:
        open_base_file(folder)
    check_refusal(caught)


def test_two_files_with_the_same_tensor_are_refused(tmp_path):
    folder = tmp_path / "b"
    folder.mkdir()
    for name in ("a.safetensors", "b.safetensors"):
        save_file(dit.make_dit("2509"), folder / name)
    with pytest.raises(FileError, match="in two files"):
        open_base_file(folder)


def test_a_source_with_an_invalid_or_too_long_name_is_a_clear_error(tmp_path):
    for name in ("n" * 5000, "a\0b", "\ud800"):
        with pytest.raises(FileError) as caught:
            load_transformer(tmp_path / name)
        check_refusal(caught)


# markers of quantised bases

GROUPS = [
    *("16", None, [16], {"a": 1}, 1e300, 0, -4, 4.5, 3, True, 10**30, 64, "x" * 1000),
]


def build_int8(**note):
    return {
        f"{PATH}.weight": torch.ones(4, 16, dtype=torch.int8),
        f"{PATH}.weight_scale": torch.ones(4, 1),
        f"{PATH}.comfy_quant": torch.tensor(list(json.dumps(note).encode()), dtype=torch.uint8),
    }


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("group", GROUPS, ids=lambda group: str(group)[:20])
def test_an_invalid_rotation_group_is_refused(group, inner):
    note = {"convrot": True, "convrot_groupsize": group}
    note = {"params": note} if inner else note
    base = open_base(build_int8(format="int8_tensorwise", **note))
    with pytest.raises(FileError, match="which cannot be read here yet") as caught:
        base.get(PATH)
    check_refusal(caught)


@pytest.mark.parametrize("group", [4, 16, 16.0])
def test_a_valid_rotation_group_is_read(group):
    note = {"convrot": True, "convrot_groupsize": group}
    assert open_base(build_int8(format="int8_tensorwise", **note)).get(PATH).rotation == group


@pytest.mark.parametrize("convrot", ["false", [0], 1.5])
def test_a_rotation_that_is_neither_on_nor_off_is_refused(convrot):
    with pytest.raises(FileError, match="which cannot be read here yet"):
        open_base(build_int8(format="int8_tensorwise", convrot=convrot)).get(PATH)


@pytest.mark.parametrize("entry", ["int8", 3, ["format"], True, "x" * 3000])
def test_a_layer_entry_of_the_header_that_is_not_a_table_is_refused(entry, tmp_path):
    state_dict = build_int8()
    del state_dict[f"{PATH}.comfy_quant"]
    note = json.dumps({"layers": {PATH: entry}})
    save_file(state_dict, tmp_path / "b.safetensors", {"_quantization_metadata": note})
    with pytest.raises(FileError, match="an unreadable note") as caught:
        open_base(tmp_path / "b.safetensors").get(PATH)
    check_refusal(caught)


@pytest.mark.parametrize(
    ("stored", "scale"),
    [
        (torch.ones((), dtype=torch.int8), torch.ones(3)),
        (torch.ones(0, 16, dtype=torch.int8), torch.ones(1)),
        (torch.ones(4, 16, dtype=torch.int8), torch.ones(0)),
        (torch.ones(4, 0), None),
    ],
)
def test_weights_and_scales_without_numbers_are_refused(stored, scale):
    known = {"transformer_blocks.0.attn.to_k.weight": torch.ones(2, 2)}
    scales = {} if scale is None else {f"{PATH}.weight_scale": scale}
    base = open_base({**known, f"{PATH}.weight": stored, **scales})
    with pytest.raises(FileError, match=r"which cannot be read here yet|as a single number"):
        base.get(PATH)


# GGUF


def test_a_gguf_whose_array_claims_more_than_the_file_holds_is_refused(tmp_path):
    """The gguf package's own reader would count to 2^60."""
    name = b"general.tags"
    value = struct.pack("<IIQ", 9, 0, 1 << 60)
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 1)
    path = tmp_path / "b.gguf"
    path.write_bytes(head + struct.pack("<Q", len(name)) + name + value + b"\0" * 64)
    with pytest.raises(FileError, match="array that is too long"):
        open_base_file(path)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (struct.pack("<IQQIQ", 2, 1 << 32, 1 << 32, 0, 0), "a tensor is larger than the file"),
        (struct.pack("<I", 1 << 31), "a tensor has"),
        (struct.pack("<IQIQ", 1, 1, 0, 2**64 - 1), "begins after the file's end"),
        (struct.pack("<IQIQ", 1, 1, 9999, 0), "is damaged"),
    ],
)
def test_a_gguf_with_impossible_tensors_is_a_clear_error(tensor, message, tmp_path):
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 0)
    path = tmp_path / "b.gguf"
    path.write_bytes(head + struct.pack("<Q", 1) + b"a" + tensor + b"\0" * 64)
    with pytest.raises(FileError, match=message) as caught:
        open_base_file(path)
    check_refusal(caught)


def test_a_big_endian_gguf_is_refused(tmp_path):
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "b.gguf", "qwen_image", endianess=gguf.GGUFEndian.BIG)
    writer.add_tensor("img_in.weight", torch.ones(2, 2).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(FileError, match="big-endian"):
        open_base_file(tmp_path / "b.gguf")


@pytest.mark.parametrize("variant", ["2509", "2511"])
@pytest.mark.parametrize("kind", WRITERS)
def test_intact_files_of_every_kind_still_open(kind, variant, tmp_path):
    state_dict = dit.make_dit(variant)
    if kind == "gguf":  # which holds no tensor without numbers
        state_dict.pop(MARKER, None)
    base = open_base_file(WRITERS[kind](tmp_path, state_dict))
    assert set(base.shapes) == state_dict.keys() - {MARKER}
    assert base.zero_cond_t == (MARKER in state_dict)
