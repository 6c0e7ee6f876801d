"""Small adapters in every spelling: one factory for state dicts, one for files.

A test that takes `key_style` runs once for each of KEY_STYLES. The tensors depend only on the
module and the part, so two spellings of an adapter have the same values.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from qwen_edit_lora.lora_core.base_model import families, module_paths
from safetensors.torch import save_file

if "dense_algebra" not in sys.modules:  # importable by the tests beside it
    spec = importlib.util.spec_from_file_location(
        "dense_algebra", Path(__file__).with_name("dense_algebra.py")
    )
    sys.modules["dense_algebra"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

WIDTH = 4
TO_Q = "transformer_blocks.0.attn.to_q"
TO_K = "transformer_blocks.0.attn.to_k"


class KeyStyle(NamedTuple):
    prefix: str
    down: str
    up: str
    key_format: str


_AB = (".lora_A.weight", ".lora_B.weight")
_DOWN_UP = (".lora_down.weight", ".lora_up.weight")
_DEFAULT = (".lora_A.default.weight", ".lora_B.default.weight")
#: Every format found in the survey of public files, and its expected name in the report.
KEY_STYLES = {
    "diffusers": KeyStyle("transformer.", *_AB, "diffusers"),
    "diffusers-0.20": KeyStyle("transformer.", ".lora.down.weight", ".lora.up.weight", "diffusers"),
    "diffusers-processors": KeyStyle(
        "transformer.", "_lora.down.weight", "_lora.up.weight", "diffusers"
    ),
    "diffusers-linear-layer": KeyStyle(
        *("transformer.", ".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
        "diffusers",
    ),
    "peft": KeyStyle("base_model.model.", *_AB, "peft"),
    "peft-in-diffusers": KeyStyle("transformer.base_model.model.", *_AB, "peft"),
    "peft-default": KeyStyle("transformer.", *_DEFAULT, "diffusers"),
    "peft-named": KeyStyle("", ".lora_A.my_style.weight", ".lora_B.my_style.weight", "bare"),
    "ai-toolkit": KeyStyle("diffusion_model.", *_AB, "comfyui"),
    "ai-toolkit-checkpoint": KeyStyle("model.diffusion_model.", *_AB, "comfyui"),
    "comfyui-native": KeyStyle("diffusion_model.", *_DOWN_UP, "comfyui"),
    "comfyui-bare-ending": KeyStyle("diffusion_model.", ".lora_A", ".lora_B", "comfyui"),
    "musubi": KeyStyle("lora_unet_", *_DOWN_UP, "kohya"),
    "diffsynth": KeyStyle("", *_DEFAULT, "bare"),
    "diffsynth-pipe": KeyStyle("pipe.dit.", *_DEFAULT, "diffsynth"),
    "diffsynth-dit": KeyStyle("dit.", *_AB, "diffsynth"),
    "lightning": KeyStyle("", *_DOWN_UP, "bare"),
    "onetrainer": KeyStyle("transformer.", *_DOWN_UP, "diffusers"),
    "onetrainer-kohya": KeyStyle("lora_transformer_", *_DOWN_UP, "onetrainer"),
    "lycoris": KeyStyle("lycoris_", *_DOWN_UP, "lycoris"),
    "unet": KeyStyle("unet.", *_AB, "unet"),
    "ddp": KeyStyle("module.diffusion_model.", *_AB, "comfyui"),
    "compiled": KeyStyle("_orig_mod.", *_AB, "bare"),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "key_style" in metafunc.fixturenames:
        metafunc.parametrize("key_style", KEY_STYLES)


def make_tensor(
    name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, generator=generator).to(dtype)


def get_shape(module_path: str) -> tuple[int, int]:
    """(out, in) of a module in a model of WIDTH; the top-level shapes are ours."""
    block, name = module_paths.split_path(module_path)
    if block is None:
        return 2 * WIDTH, WIDTH
    if name in families.FUSED:
        shapes = [get_shape(f"transformer_blocks.0.{m}") for m in families.FUSED[name].members]
        return sum(out for out, _ in shapes), shapes[0][1]
    family = next(family for family in families.FAMILIES if name in family.block_linears)
    return family.compute_shape(name, WIDTH)


def get_part_shapes(kind: str, shape: tuple[int, int], rank: int) -> dict[str, tuple[int, ...]]:
    """Suffix of the key (A and B stand for the style's) -> shape of the tensor."""
    out, in_ = shape
    half = (out // 2, in_ // 2)
    return {
        "LoRA": {"A": (rank, in_), "B": (out, rank)},
        "DoRA": {"A": (rank, in_), "B": (out, rank), ".dora_scale": (out, 1)},
        "LoHa": {
            ".hada_w1_a": (out, rank),
            ".hada_w1_b": (rank, in_),
            ".hada_w2_a": (out, rank),
            ".hada_w2_b": (rank, in_),
        },
        "LoKr": {".lokr_w1": (2, 2), ".lokr_w2": half},
        "LoKr half": {
            ".lokr_w1": (2, 2),
            ".lokr_w2_a": (half[0], rank),
            ".lokr_w2_b": (rank, half[1]),
        },
        "LoKr factored": {
            ".lokr_w1_a": (2, 1),
            ".lokr_w1_b": (1, 2),
            ".lokr_w2_a": (half[0], rank),
            ".lokr_w2_b": (rank, half[1]),
        },
        "OFT": {".oft_blocks": (out // 2, 2, 2), ".rescale": (out, 1)},
        "diff": {".diff": shape, ".diff_b": (out,)},
    }[kind]


def spell(module_path: str, key_style: str, ending: str = "") -> str:
    """The key of one module's part; "A" and "B" stand for the style's own suffixes."""
    style = KEY_STYLES[key_style]
    underscored = style.prefix.endswith("_")
    stem = module_path.replace(".", "_") if underscored else module_path
    return style.prefix + stem + {"A": style.down, "B": style.up}.get(ending, ending)


StateDictFactory = Callable[..., dict[str, torch.Tensor]]


@pytest.fixture(scope="session")
def make_state_dict() -> StateDictFactory:
    """(key_style, modules, rank, alpha, kind, dtype) -> an adapter as trainers save it."""

    def make(
        key_style: str = "ai-toolkit",
        modules: Iterable[str] = (TO_Q, TO_K),
        rank: int = 2,
        alpha: float | None = None,
        kind: str = "LoRA",
        dtype: torch.dtype = torch.float32,
    ) -> dict[str, torch.Tensor]:
        state_dict = {}
        for module_path in modules:
            shapes = get_part_shapes(kind, get_shape(module_path), rank)
            for ending, shape in shapes.items():
                tensor = make_tensor(module_path + ending, shape, dtype)
                state_dict[spell(module_path, key_style, ending)] = tensor
            if alpha is not None:
                state_dict[spell(module_path, key_style, ".alpha")] = torch.tensor(alpha)
        return state_dict

    return make


@pytest.fixture
def write_file(tmp_path: Path) -> Callable[..., Path]:
    """Saves a state dict with metadata in its header and returns the file."""

    def write(
        state_dict: Mapping[str, torch.Tensor],
        metadata: Mapping[str, str] | None = None,
        name: str = "my lora.safetensors",
    ) -> Path:
        path = tmp_path / name
        save_file(dict(state_dict), path, dict(metadata) if metadata else None)
        return path

    return write


@pytest.fixture(scope="session")
def key_styles() -> Mapping[str, KeyStyle]:
    return KEY_STYLES


@pytest.fixture(scope="session")
def spell_key() -> Callable[..., str]:
    return spell


@pytest.fixture
def read_only_folder():
    """A folder this process may not write to; root drops its privileges for the test."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o555)
    is_root = hasattr(os, "geteuid") and os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    yield folder
    if is_root:
        os.seteuid(0)
    folder.chmod(0o755)
    with suppress(OSError):
        folder.rmdir()


@pytest.fixture(scope="session")
def shape_module() -> Callable[[str], tuple[int, int]]:
    return get_shape
