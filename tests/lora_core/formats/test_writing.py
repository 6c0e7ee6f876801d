"""Written adapters read back unchanged, in every format that can express them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from qwen_edit_lora.lora_core import (
    Adapter,
    ConfigError,
    DiffWeights,
    FileError,
    LoraWeights,
    build_state_dict,
    read_adapter,
    read_state_dict,
    write_adapter,
)
from qwen_edit_lora.lora_core.disk.writing import write_then_rename
from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[3]
TO_Q = "transformer_blocks.0.attn.to_q"
TO_K = "transformer_blocks.0.attn.to_k"
FORMATS = ["comfyui", "kohya", "diffusers", "peft"]
KINDS = ["LoRA", "DoRA", "LoHa", "LoKr", "LoKr half", "LoKr factored", "OFT", "diff"]
RSLORA = {"lora_adapter_metadata": json.dumps({"lora_alpha": 3, "use_rslora": True})}


def write(adapter, folder: Path, key_format: str) -> Path:
    """Into a file or, for "peft", a folder."""
    return write_adapter(
        adapter, folder / ("peft" if key_format == "peft" else "ours.safetensors"), key_format
    )


def read_header(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def assert_same_weights(ours, theirs):
    assert set(ours.modules) == set(theirs.modules)
    for path, weights in theirs.modules.items():
        other = ours.modules[path]
        assert (other.kind, other.scale, other.alpha) == (
            weights.kind,
            weights.scale,
            weights.alpha,
        )
        assert other.parts.keys() == weights.parts.keys()
        for name in weights.parts:
            assert other.part(name).dtype == weights.part(name).dtype
            assert torch.equal(other.part(name), weights.part(name))


@pytest.mark.parametrize("key_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_lora_reads_back_bit_identical(dtype, key_format, make_state_dict, tmp_path):
    adapter = read_state_dict(make_state_dict("musubi", rank=3, alpha=1.25, dtype=dtype))
    again = read_adapter(write(adapter, tmp_path, key_format))
    assert_same_weights(again, adapter)
    assert again.key_format == key_format


@pytest.mark.parametrize("key_format", FORMATS)
def test_an_alpha_that_float32_cannot_hold_comes_back_exactly(
    key_format, make_state_dict, tmp_path
):
    adapter = read_state_dict(make_state_dict("diffusers", rank=3), RSLORA)
    assert torch.tensor(adapter.modules[TO_Q].alpha).item() != adapter.modules[TO_Q].alpha
    again = read_adapter(write(adapter, tmp_path, key_format))
    assert again.modules[TO_Q].scale == adapter.modules[TO_Q].scale


@pytest.mark.parametrize("key_format", FORMATS)
def test_modules_keep_their_own_rank_and_alpha(key_format, make_state_dict, tmp_path):
    state_dict = make_state_dict("musubi", [TO_Q], rank=2, alpha=1.0)
    state_dict |= make_state_dict("musubi", [TO_K, "img_in"], rank=3, alpha=7.0)
    adapter = read_state_dict(state_dict)
    assert_same_weights(read_adapter(write(adapter, tmp_path, key_format)), adapter)


@pytest.mark.parametrize("key_format", ["comfyui", "kohya"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_lycoris_kind_comes_back(kind, key_format, make_state_dict, tmp_path):
    adapter = read_state_dict(make_state_dict("lycoris", kind=kind, alpha=1.5))
    assert_same_weights(read_adapter(write(adapter, tmp_path, key_format)), adapter)


@pytest.mark.parametrize("key_format", ["diffusers", "peft"])
def test_a_dora_comes_back_from_pefts_formats(key_format, make_state_dict, tmp_path):
    adapter = read_state_dict(make_state_dict("musubi", kind="DoRA", alpha=1.5))
    again = read_adapter(write(adapter, tmp_path, key_format))
    base = torch.ones(4, 4)
    assert torch.equal(again.modules[TO_Q].delta(base), adapter.modules[TO_Q].delta(base))


@pytest.mark.parametrize(
    ("key_format", "shape"),
    [("comfyui", (4, 1)), ("kohya", (4, 1)), ("diffusers", (4,)), ("peft", (4,))],
)
@pytest.mark.parametrize("stored", [(4,), (4, 1)])
def test_a_dora_magnitude_is_stored_in_the_shape_its_readers_expect(
    stored, key_format, shape, make_state_dict
):
    key = f"diffusion_model.{TO_Q}.dora_scale"
    adapter = read_state_dict(make_state_dict(modules=[TO_Q]) | {key: torch.ones(stored)})
    written = build_state_dict(adapter, key_format)
    (magnitude,) = (t for k, t in written.items() if k.endswith(("dora_scale", "vector.weight")))
    assert magnitude.shape == shape


@pytest.mark.parametrize("key_format", ["diffusers", "peft"])
@pytest.mark.parametrize("kind", ["LoHa", "LoKr", "LoKr half", "OFT", "diff"])
def test_a_format_that_cannot_express_a_kind_refuses_it(
    kind, key_format, make_state_dict, tmp_path
):
    adapter = read_state_dict(make_state_dict(modules=[TO_Q], kind=kind))
    message = f"{TO_Q} holds {kind.split()[0]} weights .* which the {key_format} format cannot"
    with pytest.raises(ConfigError, match=f"{message} express.*Write it as comfyui instead"):
        write(adapter, tmp_path, key_format)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key_format", ["diffusers", "peft"])
def test_pefts_formats_refuse_what_they_would_change_silently(
    key_format, make_state_dict, tmp_path
):
    lora = make_state_dict(modules=[TO_K])
    mixed = lora | make_state_dict(modules=[TO_Q], kind="DoRA")
    with pytest.raises(ConfigError, match=r"mixes DoRA and LoRA modules.*write it as comfyui"):
        write(read_state_dict(mixed), tmp_path, key_format)
    columns = lora | {f"diffusion_model.{TO_K}.dora_scale": torch.ones(1, 4)}
    with pytest.raises(ConfigError, match=r"per input column.*write it as comfyui"):
        write(read_state_dict(columns), tmp_path, key_format)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key_format", FORMATS)
def test_metadata_is_kept_and_extended(key_format, make_state_dict, tmp_path):
    metadata = {"ss_steps": "500", "modelspec.title": "My style", "note": "é"}
    adapter = read_state_dict(make_state_dict("musubi", rank=4, alpha=2.0), metadata)
    header = read_header(write(adapter, tmp_path, key_format))
    assert metadata.items() <= header.items()
    assert (header["ss_network_dim"], header["ss_network_alpha"]) == ("4", "2")
    assert header["modelspec.sai_model_spec"] == "1.0.0"


def test_a_file_without_a_title_is_titled_by_its_name(make_state_dict, tmp_path):
    path = write_adapter(read_state_dict(make_state_dict()), tmp_path / "my style.safetensors")
    assert read_header(path)["modelspec.title"] == "my style"


def test_whole_deltas_do_not_blur_the_rank_in_the_metadata(make_state_dict, tmp_path):
    state_dict = make_state_dict(rank=2, alpha=1.0) | {"txt_norm.diff": torch.ones(8)}
    header = read_header(write(read_state_dict(state_dict), tmp_path, "comfyui"))
    assert (header["ss_network_dim"], header["ss_network_alpha"]) == ("2", "1")


@pytest.mark.parametrize(
    ("key_format", "expected"), [("comfyui", False), ("kohya", False), ("diffusers", True)]
)
def test_alpha_is_written_once(key_format, expected, make_state_dict, tmp_path):
    adapter = read_state_dict(make_state_dict("diffusers"), RSLORA)
    path = write(adapter, tmp_path, key_format)
    assert ("lora_adapter_metadata" in read_header(path)) is expected
    with safe_open(path, framework="pt") as file:
        assert any(key.endswith(".alpha") for key in file.keys()) is not expected


@pytest.mark.parametrize(
    "name", ["画像編集 🎨.safetensors", "n" * 200 + ".safetensors", "new/folder/ours.safetensors"]
)
def test_unusual_names_and_missing_folders_are_written(name, make_state_dict, tmp_path):
    write_adapter(read_state_dict(make_state_dict()), tmp_path / name)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files == [tmp_path / name]


def test_a_file_can_be_written_over_itself(make_state_dict, write_file):
    adapter = read_adapter(write_file(make_state_dict("musubi", alpha=1.0)))
    before = build_state_dict(adapter)
    path = write_adapter(adapter, adapter.file.path)
    again = build_state_dict(read_adapter(path))
    assert again.keys() == before.keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in before.items())


def test_modules_may_share_a_tensor(tmp_path):
    lora_A, lora_B = torch.ones(2, 4), torch.ones(4, 2)
    adapter = Adapter({TO_Q: LoraWeights(lora_A, lora_B), TO_K: LoraWeights(lora_A, lora_B)})
    assert_same_weights(read_adapter(write(adapter, tmp_path, "comfyui")), adapter)


def test_a_transposed_tensor_is_written_in_its_own_order(tmp_path):
    lora_A = torch.arange(8.0).reshape(4, 2).T
    adapter = Adapter({TO_Q: LoraWeights(lora_A, torch.ones(4, 2))})
    again = read_adapter(write(adapter, tmp_path, "comfyui"))
    assert torch.equal(again.modules[TO_Q].lora_A, lora_A)


# In its own process: the limit would also truncate the log of this one.
WRITE_WITHOUT_ROOM = """
import importlib.util, resource, sys
root, target, key_format = sys.argv[1:]
spec = importlib.util.spec_from_file_location(
    "lora_core", root + "/lora_core/__init__.py", submodule_search_locations=[root + "/lora_core"]
)
lora_core = sys.modules["lora_core"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(lora_core)
import torch
weights = lora_core.LoraWeights(torch.ones(512, 16), torch.ones(16, 512))
adapter = lora_core.Adapter({"transformer_blocks.0.attn.to_q": weights})
resource.setrlimit(resource.RLIMIT_FSIZE, (1024, resource.RLIM_INFINITY))
try:
    lora_core.write_adapter(adapter, target, key_format)
except lora_core.FileError as error:
    print(error)
"""


@pytest.mark.parametrize("key_format", FORMATS)
def test_a_failed_write_leaves_the_old_file_and_nothing_else(key_format, make_state_dict, tmp_path):
    pytest.importorskip("resource")
    old = write(read_state_dict(make_state_dict()), tmp_path, key_format)
    before = {path: path.read_bytes() for path in old.parent.iterdir()}
    command = [sys.executable, "-c", WRITE_WITHOUT_ROOM, str(ROOT), str(old), key_format]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"{old.name} cannot be written: " in done.stdout
    assert {path: path.read_bytes() for path in old.parent.iterdir()} == before


def test_a_write_that_stops_half_way_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "ours.safetensors"
    path.write_bytes(b"old")

    def write_half(temporary):
        temporary.write_bytes(b"ne")
        raise OSError("power cut")

    with pytest.raises(OSError, match="power cut"):
        write_then_rename(path, write_half)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {path.name: b"old"}


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
def test_file_permissions_follow_the_umask(make_state_dict, tmp_path):
    before = os.umask(0o022)
    try:
        path = write_adapter(read_state_dict(make_state_dict()), tmp_path / "ours.safetensors")
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.skipif(os.name == "nt", reason="Windows has no read-only folders")
def test_a_read_only_folder_is_a_clear_error(make_state_dict, read_only_folder):
    message = r"ours.safetensors cannot be written: the folder is read-only; choose another one"
    with pytest.raises(FileError, match=message):
        write_adapter(read_state_dict(make_state_dict()), read_only_folder / "ours.safetensors")
    assert list(read_only_folder.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("n" * 300 + ".safetensors", "the name is too long; choose a shorter one"),
        ("n" * 300 + "/ours.safetensors", "the name is too long; choose a shorter one"),
        ("file/ours.safetensors", "cannot be written: "),
    ],
    ids=["long name", "long folder", "below a file"],
)
def test_a_path_that_cannot_be_written_is_a_clear_error(name, message, make_state_dict, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(FileError, match=message) as caught:
        write_adapter(read_state_dict(make_state_dict()), tmp_path / name)
    assert len(str(caught.value)) < 200
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_error_for_an_unknown_format_lists_the_known_ones(make_state_dict, tmp_path):
    adapter = read_state_dict(make_state_dict())
    with pytest.raises(ConfigError, match="'flux'; expected one of comfyui, diffusers, kohya"):
        write_adapter(adapter, tmp_path / "x.safetensors", "flux")


def test_the_peft_format_requires_a_folder(make_state_dict, tmp_path):
    with pytest.raises(ConfigError, match=r"adapter_config.json, not x.safetensors; give the fold"):
        write_adapter(read_state_dict(make_state_dict()), tmp_path / "x.safetensors", "peft")


@pytest.mark.parametrize("key_format", FORMATS)
def test_an_adapter_without_modules_is_not_written(key_format, tmp_path):
    with pytest.raises(ConfigError, match="pruned holds no modules, so there is nothing to write"):
        write(Adapter({}, name="pruned"), tmp_path, key_format)


def test_a_bias_delta_alone_comes_back(tmp_path):
    adapter = Adapter({TO_Q: DiffWeights(bias_delta=torch.ones(4))})
    assert_same_weights(read_adapter(write(adapter, tmp_path, "comfyui")), adapter)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_what_is_no_file_is_never_replaced_by_one(kind, make_state_dict, tmp_path):
    path = tmp_path / "taken.safetensors"
    path.mkdir() if kind == "folder" else os.mkfifo(path)
    adapter = read_state_dict(make_state_dict("musubi"))
    with pytest.raises(FileError, match="is a folder, pipe or device; expected the name of a file"):
        write_adapter(adapter, path)
    assert path.is_dir() if kind == "folder" else path.is_fifo()
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
