"""Generated base models: single files, GGUFs, folders, quantisation notes.

The oracle is the state dict that a file was written from, and an independent implementation of
scales and rotations. Anything else must be an error of our own family in one short sentence; a
model with more blocks than the file contains fails the test too.
"""

from __future__ import annotations

import json
import struct
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qwen_edit_lora.lora_core import Adapter, LoraError, LoraWeights, extract_adapter
from qwen_edit_lora.lora_core.base_model.base_files import open_base_file
from qwen_edit_lora.lora_core.base_model.base_weights import open_base
from qwen_edit_lora.lora_core.inspection.inspection import inspect_adapter
from qwen_edit_lora.lora_core.training.model import architecture
from qwen_edit_lora.lora_core.training.model.loading import load_transformer
from safetensors.torch import save, save_file

MAX_MESSAGE = 400
SHARE = settings.default.max_examples
WEIGHTS = "diffusion_pytorch_model.safetensors"
TO_Q = "transformer_blocks.0.attn.to_q"
MAX_BLOCKS = 3


@pytest.fixture(autouse=True)
def few_blocks(monkeypatch):
    """No file here has more, so building more would mean falling for a decompression bomb."""
    build = architecture.Architecture.build_empty

    def check(self):
        assert self.num_layers <= MAX_BLOCKS
        return build(self)

    monkeypatch.setattr(architecture.Architecture, "build_empty", check)


def check_refusal(error: LoraError) -> None:
    assert 0 < len(str(error)) <= MAX_MESSAGE, str(error)
    assert str(error).isprintable(), repr(str(error))


@contextmanager
def make_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def build_state_dict(num_blocks: int = 1, head: int = 8, heads: int = 2, text: int = 6):
    """A complete model of a few kilobytes."""
    sizes = {"attention_head_dim": head, "num_attention_heads": heads, "joint_attention_dim": text}
    model = architecture.Architecture(num_layers=num_blocks, **sizes).build_empty()
    generator = torch.Generator().manual_seed(num_blocks)
    return {
        name: torch.randn(tuple(p.shape), generator=generator)
        for name, p in model.named_parameters()
    }


BASE = build_state_dict()
MATRICES = [key for key, tensor in BASE.items() if tensor.ndim == 2]


# --- changed by one thing ---

ODD_NUMBERS = st.one_of(
    st.sampled_from(["1", "2", "99999", "999999999", "00", "-1", "+1", "1_0", "\u0663", "", "x"]),
    st.integers(0, 10**40).map(str),
)
ODD_KEYS = st.one_of(
    ODD_NUMBERS.map(lambda number: f"transformer_blocks.{number}.attn.to_q.weight"),
    ODD_NUMBERS.map(lambda number: f"transformer_blocks.{number}"),
    st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=30),
    st.sampled_from([500, 30_000]).map(lambda size: "k" * size),
    st.sampled_from([f"{TO_Q}.comfy_quant", f"{TO_Q}.weight_scale", "scaled_fp8", f"{TO_Q}.diff"]),
)
SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 4, 7, 8, 16, 64]), max_size=4)
DTYPES = st.sampled_from(
    [
        *(torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn),
        *(torch.float8_e5m2, torch.int8, torch.uint8, torch.int64, torch.bool),
    ]
)


class Model(dict):
    """A state dict whose repr shows what is odd about it."""

    def __repr__(self) -> str:
        odd = {
            key[:80]: (str(tensor.dtype), tuple(tensor.shape), tensor.flatten()[:1].tolist())
            for key, tensor in self.items()
            if not any(tensor is whole for whole in BASE.values())
        }
        return f"Model({odd}, lacks={sorted(BASE.keys() - self.keys())})"


@st.composite
def changes(draw) -> Model:
    """The model with some tensors missing, of other shapes or dtypes, or odd ones beside them."""
    state_dict = dict(BASE)
    for _ in range(draw(st.integers(0, 3))):
        kind = draw(st.sampled_from(["key", "lacks", "shape", "dtype", "value"]))
        key = draw(st.sampled_from(sorted(BASE)))
        if kind == "key":
            shape, dtype = draw(SHAPES), draw(DTYPES)
            state_dict[draw(ODD_KEYS)] = torch.ones(shape).to(dtype)
        elif kind == "lacks":
            state_dict.pop(key, None)
        elif kind == "shape":
            state_dict[key] = torch.ones(draw(SHAPES))
        elif kind == "dtype":
            state_dict[key] = BASE[key].to(draw(DTYPES))
        else:
            value = draw(st.sampled_from([float("nan"), float("inf"), 1e38, 0.0]))
            state_dict[key] = torch.full_like(BASE[key], value)
    prefix = draw(st.sampled_from(["", "model.diffusion_model.", "transformer.", "x."]))
    return Model({prefix + key: tensor for key, tensor in state_dict.items()})


def load(source: Path, storage: str = "as stored") -> dict[str, torch.Tensor] | None:
    """Key -> values; None if it is refused, which is allowed."""
    try:
        model = load_transformer(source, storage, compute_dtype=torch.float32)
    except LoraError as e:
        check_refusal(e)
        return None
    values = {}
    for path, module in model.transformer.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            is_coded = name == "weight" and hasattr(module, "dequantize")
            values[f"{path}.{name}"] = module.dequantize() if is_coded else parameter.float()
    return values


def use(source: Path) -> None:
    """Other ways to open a base: beside a LoRA, and for the difference to itself."""
    try:
        base = open_base(source)
        shape = next(iter(base.list_matrices().values()), torch.ones(4, 4)).shape
        weights = LoraWeights(torch.ones(2, shape[1]), torch.ones(shape[0], 2))
        inspected = inspect_adapter(Adapter({TO_Q: weights}), base, exact=True)
        json.dumps(inspected.to_dict(), allow_nan=False)
    except LoraError as e:
        check_refusal(e)
    try:
        extract_adapter(source, source, 1)
    except LoraError as e:
        check_refusal(e)


def is_plain(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() and bool(tensor.float().isfinite().all())


@settings(max_examples=SHARE // 4)
@given(changes())
def test_a_changed_file_is_loaded_as_is_or_refused_with_a_message(state_dict):
    with make_folder() as folder:
        path = folder / "base.safetensors"
        path.write_bytes(save(state_dict))
        found = load(path)
        if found is not None:
            prefix = next(key for key in state_dict if key.endswith("img_in.weight"))
            prefix = prefix.removesuffix("img_in.weight")
            expected = {key.removeprefix(prefix): t for key, t in state_dict.items()}
            assert all(torch.equal(found[key], expected[key].float()) for key in found)
            assert all(is_plain(expected[key]) for key in found)
        use(path)


@settings(max_examples=SHARE // 8)
@given(
    st.integers(1, MAX_BLOCKS),
    st.sampled_from([2, 4, 6, 8, 12, 16]),
    st.integers(1, 3),
    st.integers(1, 9),
    st.sampled_from(["", "model.diffusion_model."]),
)
def test_a_whole_model_of_any_size_is_loaded_bit_exactly(num_blocks, head, heads, text, prefix):
    state_dict = build_state_dict(num_blocks, head, heads, text)
    with make_folder() as folder:
        path = folder / "base.safetensors"
        save_file({prefix + key: tensor for key, tensor in state_dict.items()}, path)
        found = load(path, "fp32")
        assert found is not None
        assert found.keys() == state_dict.keys()
        assert all(torch.equal(found[key], state_dict[key]) for key in found)


VECTORS = [key for key, tensor in BASE.items() if tensor.ndim == 1]


@settings(max_examples=SHARE)
@given(
    st.sampled_from(VECTORS) | st.sampled_from(MATRICES),
    DTYPES,
    st.none() | SHAPES,
    st.none() | ODD_KEYS,
)
def test_one_odd_tensor_is_loaded_as_is_or_refused(key, dtype, shape, odd_key):
    """One thing at a time, so that no other refusal hides what is let through."""
    tensor = BASE[key] if shape is None else torch.ones(shape)
    state_dict = {**BASE, key: tensor.to(dtype)}
    if odd_key is not None:
        state_dict = {**BASE, odd_key: torch.ones(2, 2)}
    with make_folder() as folder:
        path = folder / "base.safetensors"
        path.write_bytes(save(state_dict))
        found = load(path)
    # "scaled_fp8" marks a file: it means nothing where no weight is fp8.
    is_whole = odd_key in (None, "scaled_fp8", *BASE) and state_dict[key].shape == BASE[key].shape
    if found is None:
        assert not (is_whole and is_plain(state_dict[key])) or odd_key is not None
    else:
        assert is_whole
        assert all(is_plain(tensor) for tensor in state_dict.values())
        assert all(torch.equal(found[key], state_dict[key].float()) for key in found)


FLIPS = st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), max_size=6)
SAVED = save(dict(list(BASE.items())[:12]))


@settings(max_examples=SHARE)
@given(FLIPS, st.floats(0, 1))
def test_a_file_with_flipped_or_missing_bytes_is_a_model_or_an_error(flips, share):
    data = bytearray(SAVED)
    for place, value in flips:
        data[place % len(data)] = value
    if share < 0.3:
        data = data[: round(share / 0.3 * len(data))]
    with make_folder() as folder:
        path = folder / "base.safetensors"
        path.write_bytes(data)
        for act in (open_base_file, open_base):
            try:
                act(path).release()
            except LoraError as e:
                check_refusal(e)


# --- GGUF ---


def build_gguf(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """Version 3, float32, by the specification."""
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), 1)
    head += pack_text(b"general.architecture") + struct.pack("<I", 8) + pack_text(b"qwen_image")
    offset, data = 0, b""
    for key, tensor in tensors.items():
        sides = list(reversed(tensor.shape))
        head += pack_text(key.encode()) + struct.pack(f"<I{len(sides)}Q", len(sides), *sides)
        head += struct.pack("<IQ", 0, offset)
        content = tensor.numpy().tobytes()
        content += b"\0" * (-len(content) % 32)
        offset += len(content)
        data += content
    return head + b"\0" * (-len(head) % 32) + data


def pack_text(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


GGUF = build_gguf(BASE)
HEADER = GGUF.index(b"proj_out.weight") + 60


def test_the_gguf_of_this_file_is_read_as_it_was_written():
    with make_folder() as folder:
        path = folder / "base.gguf"
        path.write_bytes(GGUF)
        found = load(path, "fp32")
        assert found is not None
        assert all(torch.equal(found[key], BASE[key]) for key in found)


NUMBERS = st.one_of(
    st.integers(0, 255).map(lambda value: bytes([value])),
    st.integers(0, 2**64 - 1).map(lambda value: struct.pack("<Q", value)),
    st.sampled_from([b"\xff" * 8, b"\0" * 8, struct.pack("<Q", 1 << 40), struct.pack("<I", 9)]),
)


@settings(max_examples=SHARE)
@given(st.lists(st.tuples(st.integers(4, HEADER), NUMBERS), min_size=1, max_size=3), st.booleans())
def test_a_gguf_with_a_changed_header_is_a_model_or_an_error(flips, is_cut):
    data = bytearray(GGUF)
    for place, value in flips:
        data[place : place + len(value)] = value
    with make_folder() as folder:
        path = folder / "base.gguf"
        path.write_bytes(data[: flips[0][0]] if is_cut else data)
        try:
            base = open_base_file(path)
            for key in base.tensors:
                base.read_tensor(key)
        except LoraError as e:
            check_refusal(e)


# --- folders ---

ANY = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(st.characters(exclude_categories=("Cs",)), max_size=20),
        st.sampled_from(["..", "../x", "/etc/passwd", "n" * 5000, WEIGHTS, "a.safetensors", "\0"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)
AXES = st.one_of(ANY, st.lists(st.integers(-4, 20), max_size=4), st.sampled_from([[2, 4, 2]]))


@settings(max_examples=SHARE // 2)
@given(
    st.fixed_dictionaries({}, optional={"axes_dims_rope": AXES, "zero_cond_t": ANY}) | ANY,
    st.none() | st.dictionaries(st.sampled_from(MATRICES), ANY, max_size=3) | ANY,
    st.booleans(),
)
def test_a_folder_is_loaded_with_its_configuration_or_refused_with_a_message(config, index, is_one):
    with make_folder() as folder:
        names = [WEIGHTS] if is_one else ["a.safetensors", "b.safetensors"]
        parts = [dict(list(BASE.items())[i :: len(names)]) for i in range(len(names))]
        for name, part in zip(names, parts, strict=True):
            save_file(part, folder / name)
        (folder / "config.json").write_text(json.dumps(config))
        if index is not None:
            text = json.dumps({"weight_map": index})
            (folder / f"{WEIGHTS}.index.json").write_text(text)
        found = load(folder)
        if found is not None:
            assert all(torch.equal(found[key], BASE[key]) for key in found)
            axes = config.get("axes_dims_rope")
            assert axes is None or sum(axes) == 8
            base = open_base_file(folder)
            assert base.zero_cond_t is bool(config.get("zero_cond_t"))


@settings(max_examples=SHARE // 4)
@given(ANY)
def test_a_marker_is_true_false_or_refused(marker):
    with make_folder() as folder:
        save_file(BASE, folder / WEIGHTS)
        (folder / "config.json").write_text(json.dumps({"zero_cond_t": marker}))
        try:
            found = open_base_file(folder).zero_cond_t
        except LoraError as e:
            check_refusal(e)
            assert not isinstance(marker, bool | None)
        else:
            assert found is (marker or False)


@settings(max_examples=SHARE // 8)
@given(st.sampled_from(["../outside.safetensors", "sub/inside.safetensors", "{}", "link/x"]))
def test_an_index_that_leads_out_of_its_folder_is_refused(name):
    """To a whole model, which would be read if it were followed."""
    with make_folder() as folder:
        (folder / "model" / "sub").mkdir(parents=True)
        for path in (folder / "outside.safetensors", folder / "model/sub/inside.safetensors"):
            save_file(BASE, path)
        name = name.replace("{}", str(folder / "outside.safetensors"))
        index = {"weight_map": dict.fromkeys(BASE, name)}
        (folder / "model" / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
        assert load(folder / "model") is None


@settings(max_examples=SHARE // 2)
@given(st.binary(max_size=60), st.sampled_from(["config.json", f"{WEIGHTS}.index.json", WEIGHTS]))
def test_noise_in_a_folders_files_is_an_error(content, name):
    with make_folder() as folder:
        save_file(BASE, folder / WEIGHTS)
        (folder / name).write_bytes(content)
        load(folder)


# --- notes of quantised weights ---

GROUPS = st.one_of(ANY, st.sampled_from([4, 16, 4.0, 16.0, 0, -4, 3, 64, 10**30, True]))
NOTES = st.one_of(
    ANY,
    st.fixed_dictionaries(
        {},
        optional={
            "format": st.sampled_from(["int8_tensorwise", "float8_e4m3fn", "mxfp8", "nvfp4"]) | ANY,
            "convrot": st.booleans() | ANY,
            "convrot_groupsize": GROUPS,
            "params": st.fixed_dictionaries({}, optional={"convrot_groupsize": GROUPS}) | ANY,
        },
    ),
)
SCALES = st.one_of(
    st.none(),
    st.sampled_from([(), (1,), (4,), (4, 1), (1, 4), (16,), (0,), (2, 2), (512,), (128, 4)]),
)
STORED = st.sampled_from([(4, 16), (4, 16), (4, 16), (4, 3), (16,), (), (0, 16), (4, 0), (4, 64)])


def rotate_densely(values: torch.Tensor, group: int) -> torch.Tensor:
    """By the whole matrix: Kronecker powers of the 4 x 4 one with a -1 on its antidiagonal."""
    factor = (torch.ones(4, 4) - 2 * torch.eye(4).flip(1)) / 2
    matrix = torch.ones(1, 1)
    while len(matrix) < group:
        matrix = torch.kron(matrix, factor)
    return (values.reshape(-1, group) @ matrix.T).reshape(values.shape)


def is_group(group: Any) -> bool:
    is_number = type(group) in (int, float) and group > 1
    return is_number and group in [4**n for n in range(1, 10)]


@settings(max_examples=SHARE)
@given(NOTES, DTYPES, STORED, SCALES, st.booleans())
def test_a_quantisation_note_gives_its_values_or_an_error(
    note, dtype, shape, scale_shape, in_header
):
    generator = torch.Generator().manual_seed(0)
    stored = (torch.randn(shape, generator=generator) * 9).to(dtype)
    tensors = {f"{TO_Q}.weight": stored, "img_in.weight": torch.ones(2, 2)}
    tensors["transformer_blocks.0.attn.to_k.weight"] = torch.ones(2, 2)
    scale = None
    if scale_shape is not None:
        scale = torch.rand(scale_shape, generator=generator) + 0.1
        tensors[f"{TO_Q}.weight_scale"] = scale
    metadata = None
    if in_header:
        metadata = {"_quantization_metadata": json.dumps({"layers": {TO_Q: note}})}
    else:
        content = list(json.dumps(note).encode())
        tensors[f"{TO_Q}.comfy_quant"] = torch.tensor(content, dtype=torch.uint8)
    with make_folder() as folder:
        path = folder / "base.safetensors"
        save_file(tensors, path, metadata)
        try:
            weight = open_base(path).get(TO_Q)
            values = weight.values
        except LoraError as e:
            check_refusal(e)
        else:
            assert isinstance(note, dict)
            # Block scales: tests/lora_core/inspection/test_survival.py.
            if weight.scaling != "block":
                expected = stored.float()
                if scale is not None:
                    expected = (
                        expected * scale.reshape(-1, 1)
                        if scale.numel() > 1
                        else (expected * scale.flatten()[0])
                    )
                if weight.rotation:
                    inner = note.get("params")
                    both = {**(inner if isinstance(inner, dict) else {}), **note}
                    assert both["convrot"]
                    assert is_group(both.get("convrot_groupsize", 256))
                    assert weight.rotation == both.get("convrot_groupsize", 256)
                    expected = rotate_densely(expected, weight.rotation)
                torch.testing.assert_close(values, expected, equal_nan=True)
        use(path)
