"""Every kind of base file loads as the same model; faults are reported in one sentence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from demo_base import dit
from qwen_edit_lora.lora_core.base_model.base_files import MARKER
from qwen_edit_lora.lora_core.errors import (
    ConfigError,
    FileError,
    KeyFormatError,
    NonFiniteWeightsError,
    ShapeError,
)
from qwen_edit_lora.lora_core.training.model.architecture import (
    Architecture,
    choose_axes,
    read_architecture,
)
from qwen_edit_lora.lora_core.training.model.loading import load_transformer
from safetensors.torch import save_file

TO_Q = "transformer_blocks.0.attn.to_q"
WIDTH = dit.NUM_HEADS * dit.HEAD_WIDTH
#: Not the values that would be guessed.
AXES = (dit.HEAD_WIDTH // 2, dit.HEAD_WIDTH // 4, dit.HEAD_WIDTH // 4)


def collect_weights(model) -> dict[str, torch.Tensor]:
    """Key -> values in float32, of every parameter, dequantised."""
    weights = {}
    for path, module in model.transformer.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            is_coded = name == "weight" and hasattr(module, "dequantize")
            value = module.dequantize() if is_coded else parameter.float()
            weights[f"{path}.{name}"] = value
    return weights


@pytest.fixture
def write(tmp_path):
    def write_file(state_dict, name="dit.safetensors", **metadata) -> Path:
        save_file(state_dict, tmp_path / name, metadata or None)
        return tmp_path / name

    return write_file


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
def test_a_single_file_is_loaded_bit_exactly_under_every_prefix(prefix, write):
    state_dict = dit.make_dit("2511")
    other = {"vae.encoder.weight": torch.zeros(2)} if prefix else {}
    path = write({prefix + key: tensor for key, tensor in state_dict.items()} | other)
    model = load_transformer(path, "fp32", compute_dtype=torch.float32)
    weights = collect_weights(model)
    assert model.zero_cond_t
    assert weights.keys() == state_dict.keys() - {MARKER}
    assert all(torch.equal(weights[key], state_dict[key]) for key in weights)
    assert all(type(m) is torch.nn.Linear for m in model.modules() if hasattr(m, "in_features"))


def test_everything_has_data_and_nothing_requires_a_gradient(tmp_path):
    model = load_transformer(dit.write_dit(tmp_path / "dit.safetensors"))
    tensors = [*model.parameters(), *model.buffers()]
    assert not any(tensor.is_meta or tensor.requires_grad for tensor in tensors)
    assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}


def write_folder(folder: Path, num_shards: int, **config) -> Path:
    """A diffusers folder, as written by `save_pretrained`."""
    from diffusers import QwenImageTransformer2DModel

    model = QwenImageTransformer2DModel(
        num_layers=dit.NUM_BLOCKS,
        attention_head_dim=dit.HEAD_WIDTH,
        num_attention_heads=dit.NUM_HEADS,
        joint_attention_dim=dit.TEXT_WIDTH,
        axes_dims_rope=AXES,
        **config,
    )
    model.load_state_dict(dit.make_dit("2509"))
    size = sum(p.numel() * 4 for p in model.parameters())
    model.save_pretrained(folder, max_shard_size=size // num_shards + 1)
    return folder


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("zero_cond_t", [False, True])
def test_a_diffusers_folder_is_loaded_with_its_configuration(num_shards, zero_cond_t, tmp_path):
    folder = write_folder(tmp_path / "transformer", num_shards, zero_cond_t=zero_cond_t)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (num_shards > 1)
    expected = dit.make_dit("2509")
    for source in (folder, tmp_path):  # the pipeline's folder has it below
        model = load_transformer(source, "fp32", compute_dtype=torch.float32)
        weights = collect_weights(model)
        assert all(torch.equal(weights[key], expected[key]) for key in expected)
        assert model.zero_cond_t == zero_cond_t
        assert model.axes == AXES


def test_a_missing_shard_is_named(tmp_path):
    folder = write_folder(tmp_path, 3)
    path = sorted(folder.glob("*.safetensors"))[1]
    path.unlink()
    with pytest.raises(FileError, match=path.name):
        load_transformer(folder)


def write_gguf(path: Path, state_dict, kind: str) -> dict[str, torch.Tensor]:
    """Matrices in `kind` if their rows allow it, the rest as float32; returns decoded values."""
    import gguf

    writer = gguf.GGUFWriter(path, "qwen_image")
    meant = {}
    for key, tensor in state_dict.items():
        type_ = gguf.GGMLQuantizationType[kind if tensor.ndim == 2 else "F32"]
        if tensor.ndim == 2 and tensor.shape[1] % gguf.GGML_QUANT_SIZES[type_][0]:
            type_ = gguf.GGMLQuantizationType.F32
        codes = gguf.quants.quantize(tensor.numpy(), type_)
        writer.add_tensor(key, codes, raw_dtype=type_)
        meant[key] = torch.from_numpy(gguf.quants.dequantize(codes, type_).copy())
        meant[key] = meant[key].reshape(tensor.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant


@pytest.mark.parametrize("storage", ["fp32", "as stored"])
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_1", "F16", "BF16", "F32"])
def test_a_gguf_is_decoded_as_by_the_gguf_package(kind, storage, tmp_path):
    state_dict = dit.make_dit("2509")
    meant = write_gguf(tmp_path / "dit.gguf", state_dict, kind)
    model = load_transformer(tmp_path / "dit.gguf", storage, compute_dtype=torch.float32)
    weights = collect_weights(model)
    for key, expected in meant.items():
        torch.testing.assert_close(weights[key], expected, rtol=0, atol=1e-6)
    codes = model.transformer.get_submodule(TO_Q).weight
    if storage == "as stored":
        is_packed = kind not in ("F16", "BF16", "F32")
        assert (codes.dtype == torch.uint8) == is_packed
        if is_packed:
            assert codes.numel() < 1.1 * WIDTH**2


def test_a_gguf_with_the_marker_is_a_2511(tmp_path):
    import gguf

    write_gguf(tmp_path / "a.gguf", dit.make_dit("2509"), "Q8_0")
    assert not load_transformer(tmp_path / "a.gguf").zero_cond_t
    state_dict = dit.make_dit("2509") | {MARKER: torch.zeros(1)}  # gguf has no empty tensors
    write_gguf(tmp_path / "b.gguf", state_dict, "Q8_0")
    assert load_transformer(tmp_path / "b.gguf").zero_cond_t
    assert gguf.GGUFReader(tmp_path / "b.gguf").tensors


def test_the_marker_can_be_overridden(tmp_path):
    path = dit.write_dit(tmp_path / "dit.safetensors", "2511")
    assert not load_transformer(path, zero_cond_t=False).zero_cond_t
    path = dit.write_dit(tmp_path / "dit.safetensors", "2509")
    assert load_transformer(path, zero_cond_t=True).zero_cond_t


def test_the_full_models_architecture_is_read_from_its_shapes():
    full = Architecture()
    shapes = {name: p.shape for name, p in full.build_empty().named_parameters()}
    assert read_architecture(shapes, "full") == full
    assert choose_axes(32) == (4, 14, 14)


# what is wrong


def expect(error, path, *mentions, storage="bf16"):
    with pytest.raises(error) as caught:
        load_transformer(path, storage)
    text = str(caught.value)
    for mention in mentions:
        assert mention in text
    assert "\n" not in text
    return text


def test_another_architecture_is_refused(write):
    expect(
        KeyFormatError,
        write({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(4, 4)}),
        "is not a Qwen-Image model",
        "dit.safetensors",
    )


def test_flux_whose_blocks_have_the_same_names_is_refused(write):
    # diffusers' FluxTransformer2DModel shares attention paths with Qwen-Image.
    state_dict = {
        f"{TO_Q}.weight": torch.zeros(4, 4),
        "transformer_blocks.0.attn.norm_q.weight": torch.zeros(4),
        "x_embedder.weight": torch.zeros(4, 4),
    }
    expect(KeyFormatError, write(state_dict), "is not a Qwen-Image model", "img_in.weight")


def test_missing_tensors_are_named(write):
    state_dict = dit.make_dit("2509")
    del state_dict["transformer_blocks.1.txt_mlp.net.2.bias"]
    expect(
        KeyFormatError, write(state_dict), "lacks 1 of", "transformer_blocks.1.txt_mlp.net.2.bias"
    )


def test_tensors_that_belong_to_another_model_are_named(write):
    state_dict = dit.make_dit("2509")
    state_dict["time_text_embed.addition_t_embedding.weight"] = torch.zeros(2, WIDTH)
    expect(KeyFormatError, write(state_dict), "holds 1 tensors", "addition_t_embedding")


def test_a_wrong_shape_is_named(write):
    state_dict = dit.make_dit("2509")
    state_dict[f"{TO_Q}.weight"] = torch.zeros(WIDTH, 32)
    expect(ShapeError, write(state_dict), f"{TO_Q}.weight is ({WIDTH}, 32)", str((WIDTH, WIDTH)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("key", [f"{TO_Q}.weight", "txt_norm.weight", f"{TO_Q}.bias"])
@pytest.mark.parametrize("storage", ["bf16", "fp8", "int8", "nf4", "as stored"])
def test_non_finite_weights_are_refused(storage, key, value, write):
    state_dict = dit.make_dit("2509")
    state_dict[key].flatten()[-1] = value
    expect(NonFiniteWeightsError, write(state_dict), key, "NaN or Inf", storage=storage)


def test_nan_among_fp8_codes_is_refused(write):
    state_dict = dit.store_as(dit.make_dit("2509"), "fp8")
    state_dict[f"{TO_Q}.weight"].view(torch.uint8)[3, 3] = 0x7F
    expect(NonFiniteWeightsError, write(state_dict), TO_Q, storage="as stored")


def test_four_bit_codes_of_another_kind_are_refused(write):
    state_dict = dit.make_dit("2509")
    state_dict[f"{TO_Q}.weight"] = torch.zeros(WIDTH, 32, dtype=torch.uint8)
    expect(FileError, write(state_dict), TO_Q, "uint8")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
def test_a_truncated_file_is_refused(share, tmp_path):
    path = dit.write_dit(tmp_path / "dit.safetensors")
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    expect(FileError, path, "dit.safetensors")


@pytest.mark.parametrize("share", [0.00001, 0.001, 0.5, 0.99])
def test_a_truncated_gguf_is_refused(share, tmp_path):
    path = tmp_path / "dit.gguf"
    write_gguf(path, dit.make_dit("2509"), "Q8_0")
    data = path.read_bytes()
    path.write_bytes(data[: max(8, int(share * len(data)))])
    expect(FileError, path, "dit.gguf")


def test_a_missing_source_and_an_empty_folder_are_refused(tmp_path):
    expect(FileError, tmp_path / "none.safetensors", "none.safetensors does not exist")
    expect(FileError, tmp_path, "no .safetensors file")


def test_an_unreadable_configuration_is_refused(tmp_path):
    folder = write_folder(tmp_path, 1)
    (folder / "config.json").write_text("{")
    expect(FileError, folder, "config.json")


def test_an_unknown_storage_is_refused_before_the_file_is_opened(tmp_path):
    with pytest.raises(ConfigError, match="int3"):
        load_transformer(tmp_path / "none.safetensors", "int3")


@pytest.mark.parametrize(
    ("package", "source", "storage"),
    [("bitsandbytes", "dit.safetensors", "nf4"), ("gguf", "dit.gguf", "bf16")],
)
def test_a_missing_package_is_named_with_its_installation(
    package, source, storage, tmp_path, monkeypatch
):
    dit.write_dit(tmp_path / "dit.safetensors")
    write_gguf(tmp_path / "dit.gguf", dit.make_dit("2509"), "Q8_0")
    monkeypatch.setitem(sys.modules, package, None)  # how Python marks what cannot be imported
    expect(ConfigError, tmp_path / source, f"pip install {package}", storage=storage)


def test_loading_can_be_stopped_and_reports_progress(tmp_path):
    path = dit.write_dit(tmp_path / "dit.safetensors")
    reported = []
    load_transformer(path, progress=lambda done, total: reported.append((done, total)))
    assert reported[0][0] == 0
    assert reported[-1][0] == reported[-1][1] == len(reported) - 1
    with pytest.raises(InterruptedError):
        load_transformer(path, should_stop=lambda: True)


# memory

MEASURE = """
import json, sys
sys.path.insert(0, sys.argv[1])
import importlib.util
spec = importlib.util.spec_from_file_location(
    "qwen_edit_lora", sys.argv[1] + "/__init__.py", submodule_search_locations=[sys.argv[1]]
)
sys.modules["qwen_edit_lora"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
from qwen_edit_lora.lora_core.training.model.libraries import import_diffusers_alone
from qwen_edit_lora.lora_core.training.model.loading import load_transformer

def read_kib(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name))

def measure(tiny, wide, storage):
    load_transformer(tiny, storage)  # imports, kernels, allocators
    before = read_kib("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")  # starts the high-water mark anew
    model = load_transformer(wide, storage)
    size = sum(t.numel() * t.dtype.itemsize for t in (*model.parameters(), *model.buffers()))
    return {"peak": (read_kib("VmHWM") - before) * 1024, "size": size}

import_diffusers_alone()
print(json.dumps({storage: measure(*sys.argv[2:4], storage) for storage in sys.argv[4:]}))
"""
STORAGES = ("bf16", "fp8", "int8", "nf4")


@pytest.fixture(scope="module")
def wide_file(tmp_path_factory):
    """One block at full width and narrow text: 0.65 GB in bf16."""
    shapes = Architecture(num_layers=1, joint_attention_dim=64).build_empty().named_parameters()
    state_dict = {
        name: torch.empty(parameter.shape, dtype=torch.bfloat16).normal_(std=0.02)
        for name, parameter in shapes
    }
    path = tmp_path_factory.mktemp("wide") / "wide.safetensors"
    save_file(state_dict, path)
    return path


@pytest.fixture(scope="module")
def measured(wide_file, tmp_path_factory):
    """Storage -> bytes of the peak while the file is loaded, and of the model."""
    tiny = dit.write_dit(tmp_path_factory.mktemp("tiny") / "tiny.safetensors")
    root = Path(__file__).parents[4]
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(root), str(tiny), str(wide_file), *STORAGES],
        capture_output=True, text=True, check=True,
        # glibc keeps what was freed where it likes, 0.1 GB more or less from run to run, unless
        # large blocks go back to the system at once
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "1048576"},
    )  # fmt: skip
    return json.loads(result.stdout)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("storage", STORAGES)
def test_loading_needs_only_some_chunks_beside_the_model(storage, measured, wide_file, capsys):
    found = measured[storage]
    margin = 2**26  # chunks, and what their quantisation takes
    with capsys.disabled():
        print(f"\n{storage}: {found}, file {wide_file.stat().st_size}")  # noqa: T201
    assert found["peak"] < found["size"] + margin
