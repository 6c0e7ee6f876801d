"""Public LoRAs by their keys: names, shapes and alphas as published, no weights.

Each row was compiled from public descriptions of the file (the source beside it); ranks that no
source states are 16. The tensors have the real shapes and take no memory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import NamedTuple

import pytest
import torch
from qwen_edit_lora.lora_core import TARGET_PRESETS, read_state_dict
from qwen_edit_lora.lora_core.base_model.module_paths import split_path
from qwen_edit_lora.lora_core.base_model.qwen_image import QWEN_IMAGE
from qwen_edit_lora.lora_core.base_model.qwen_image_21 import GATE_UP, QWEN_IMAGE_21

DOWN_UP = (".lora_down.weight", ".lora_up.weight")
AB = (".lora_A.weight", ".lora_B.weight")
DEFAULT = (".lora_A.default.weight", ".lora_B.default.weight")
OLD = (".lora.down.weight", ".lora.up.weight")
BY_RANK = "rank (the file names none)"
#: 60 blocks of two streams, four attention projections and one more of each.
NUM_FULL, NUM_WITH_MODULATION, NUM_IMAGE_ATTENTION = 720, 840, 240


class Public(NamedTuple):
    file: str
    prefix: str
    endings: tuple[str, str]
    preset: str
    rank: int
    alpha: float | None
    num_modules: int
    variants: tuple[str, ...]
    source: str


def name_lightning(file: str, variants: tuple[str, ...] = ()) -> Public:
    """lightx2v's files of 849 MB: alpha 8 at rank 64."""
    source = "sgl-project/sglang/issues/17086, huggingface/diffusers/pull/12119"
    return Public(file, "", DOWN_UP, "full", 64, 8.0, NUM_FULL, variants, source)


def name_diffsynth(file: str, variants: tuple[str, ...] = (), rank: int = 64) -> Public:
    """DiffSynth-Studio's, saved with the prefix pipe.dit. removed: 1440 keys."""
    source = (
        "ussoewwin/ComfyUI-QwenImageLoraLoader (Lowres-Fix: 1440 keys), "
        "deepbeepmeep/Wan2GP/issues/1100 (Multiple-Angles); the others as DiffSynth-Studio saves"
    )
    return Public(file, "", DEFAULT, "diffsynth", rank, None, NUM_FULL, variants, source)


def name_ai_toolkit(file: str, variants: tuple[str, ...] = ()) -> Public:
    source = "prithivMLmods' collection of Qwen-Image-Edit-2511 LoRAs; the last as ai-toolkit saves"
    return Public(file, "diffusion_model.", AB, "full", 16, None, NUM_FULL, variants, source)


PUBLIC = [
    name_lightning("Qwen-Image-Lightning-8steps-V1.0.safetensors"),
    name_lightning("Qwen-Image-Lightning-4steps-V2.0-bf16.safetensors"),
    name_lightning("Qwen-Image-Edit-Lightning-4steps-V1.0-bf16.safetensors"),
    name_lightning("Qwen-Image-Edit-2509-Lightning-8steps-V1.0-bf16.safetensors", ("2509",)),
    name_lightning("Qwen-Image-Edit-2511-Lightning-4steps-V1.0-bf16.safetensors", ("2511",)),
    name_lightning("Qwen-Image-2512-Lightning-4steps-V1.0-bf16.safetensors"),
    name_diffsynth("Qwen-Image-Edit-Lowres-Fix.safetensors"),
    name_diffsynth("Qwen-Image-Edit-Multiple-Angles.safetensors"),
    name_diffsynth("Qwen-Image-EliGen.safetensors"),
    name_diffsynth("Qwen-Image-EliGen-V2.safetensors"),
    name_diffsynth("Qwen-Image-In-Context-Control-Union.safetensors"),
    name_diffsynth("Qwen-Image-Distill-LoRA.safetensors"),
    name_ai_toolkit("Photo-to-Anime.safetensors"),
    name_ai_toolkit("Qwen-Image-Edit-2511-Upscaler.safetensors", ("2511",)),
    name_ai_toolkit("Style-Transfer.safetensors"),
    name_ai_toolkit("Qwen-Edit-2511-Any-light_000002511.safetensors", ("2511",)),
    name_ai_toolkit("qwen_image_edit_2509_shirt_design.safetensors", ("2509",)),
    Public(
        *("Anything2Real_2601.safetensors", "transformer.", OLD, "full", 16, None, NUM_FULL, ()),
        "prithivMLmods' collection of Qwen-Image-Edit-2511 LoRAs, by their headers",
    ),
    Public(
        *("qwen-image-realism.safetensors", "transformer.", OLD, "image-attention", 16, None),
        *(NUM_IMAGE_ATTENTION, (), "SwarmUI's T2IModelClassSorter, isQwenImageLora"),
    ),
    Public(
        *("Manga-Tone.safetensors", "lora_unet_", DOWN_UP, "full + modulation", 32, 16.0),
        *(NUM_WITH_MODULATION, (), "the same collection: musubi-tuner's keys with img_mod"),
    ),
    Public(
        *("Wuli-Qwen-Image-2512-Turbo.safetensors", "diffusion_model.", AB, "full + modulation"),
        *(64, None, NUM_WITH_MODULATION, (), "mflux: 840 modules, 1680 of 1680 keys"),
    ),
    Public(
        *("qwen-2511-lora.safetensors", "transformer.", AB, "full + modulation", 16, None),
        *(NUM_WITH_MODULATION, ("2511",), "mflux: diffusers' keys of attention and modulation"),
    ),
]


#: Of Qwen-Image-2.1: 32 blocks, four attention projections and the MLP, fused or split, and what
#: is outside the blocks. Rank, alpha and where alpha is: by their cards and key dumps.
class Public21(NamedTuple):
    file: str
    prefix: str
    endings: tuple[str, str]
    names: tuple[str, ...]
    on_top: tuple[str, ...]
    rank: int
    alpha: float | None
    header: Mapping[str, int]
    source: str


ATTENTION = QWEN_IMAGE_21.presets["attention"]
SPLIT = tuple(QWEN_IMAGE_21.block_linears)
JOINED = (*ATTENTION, GATE_UP, "img_mlp.out")
TIME = tuple(name for name in QWEN_IMAGE_21.top_linears if name.startswith("time_text_embed"))
ON_TOP = tuple(QWEN_IMAGE_21.top_linears)


def name_viggle(version: str, rank: int, alpha: int) -> Public21:
    file = f"Qwen-Image-2.1-viggle-turbo-{version}-r{rank}.safetensors"
    header = {"transformer.r": rank, "transformer.lora_alpha": alpha}
    source = "Viggle's card: split, with modulation.1 and the time embedding, alpha in the header"
    on_top = ("modulation.1", *TIME)
    return Public21(file, "transformer.", AB, SPLIT, on_top, rank, None, header, source)


PUBLIC_21 = [
    name_viggle("v0.2", 64, 64),
    name_viggle("v0.2.1", 128, 128),
    name_viggle("v0.3", 256, 128),
    Public21(
        *("pruna-qwen-image-2.1.safetensors", "transformer.", AB, SPLIT, (), 64, None),
        *({"transformer.r": 64, "transformer.lora_alpha": 128}, "Pruna's card: a scale of 2"),
    ),
    Public21(
        *("bfs_face_swap_2.1.safetensors", "diffusion_model.", AB, JOINED, (), 64, None, {}),
        "BFS's card: trained on the fused file",
    ),
    Public21(
        *("prithiv-edit.safetensors", "diffusion_model.", AB, JOINED, (), 16, None, {}),
        "prithivMLmods' edit LoRAs: ai-toolkit's keys, fused",
    ),
    Public21(
        *("diffusers-dreambooth.safetensors", "transformer.", AB, ATTENTION, (), 16, None),
        *({"transformer.r": 16, "transformer.lora_alpha": 16}, "the default of diffusers' scripts"),
    ),
    Public21(
        *("diffsynth.safetensors", "", DEFAULT, SPLIT, (), 32, None, {}),
        "DiffSynth: every Linear inside the blocks",
    ),
    Public21(
        *("musubi.safetensors", "lora_unet_", DOWN_UP, SPLIT, (), 16, 16.0, {}),
        "musubi-tuner's default",
    ),
    Public21(
        *("musubi-fork.safetensors", "lora_unet_", DOWN_UP, JOINED, ON_TOP, 16, 8.0, {}),
        "pyros-projects' fork: fused, with the modules on top",
    ),
    Public21(
        *("pdd.safetensors", "", (".lora_down", ".lora_up"), SPLIT, ON_TOP, 32, None, {}),
        "alibaba-pai's PDD: no .weight",
    ),
    Public21(
        *("converted.safetensors", "diffusion_model.transformer.", AB, SPLIT, (), 64, None, {}),
        "naive conversions in the wild",
    ),
]


def build_state_dict(public: Public) -> dict[str, torch.Tensor]:
    state_dict = {}
    for block in range(QWEN_IMAGE.num_blocks):
        for name in TARGET_PRESETS[public.preset]:
            path = f"transformer_blocks.{block}.{name}"
            state_dict |= build_module(public, path, QWEN_IMAGE.compute_shape(name))
    return state_dict


def build_module(
    public: Public | Public21, path: str, shape: tuple[int, int]
) -> dict[str, torch.Tensor]:
    stem = public.prefix + path
    if public.prefix.endswith("_"):
        stem = public.prefix + path.replace(".", "_")
    down, up = public.endings
    one = torch.zeros((), dtype=torch.bfloat16)
    module = {
        stem + down: one.expand(public.rank, shape[1]),
        stem + up: one.expand(shape[0], public.rank),
    }
    if public.alpha is not None:
        module[f"{stem}.alpha"] = torch.tensor(public.alpha)
    return module


def build_state_dict_21(public: Public21) -> dict[str, torch.Tensor]:
    tables = {**QWEN_IMAGE_21.block_linears, GATE_UP: (24576, 4096), **QWEN_IMAGE_21.top_linears}
    paths = [f"transformer_blocks.{i}.{name}" for i in range(32) for name in public.names]
    state_dict = {}
    for path in (*paths, *public.on_top):
        state_dict |= build_module(public, path, tables[split_path(path)[1]])
    return state_dict


@pytest.mark.parametrize("public", PUBLIC, ids=[public.file for public in PUBLIC])
def test_a_public_lora_is_read_whole_under_the_alpha_its_trainer_meant(public):
    state_dict = build_state_dict(public)
    report = read_state_dict(state_dict, name=public.file).report
    assert (report.num_modules, report.num_matched_keys) == (public.num_modules, len(state_dict))
    assert (report.unmatched, report.duplicates, report.warnings) == ((), (), ())
    assert report.preset == public.preset
    assert report.width == QWEN_IMAGE.width
    rule = BY_RANK if public.alpha is None else "tensor"
    assert report.alpha_rules == {rule: public.num_modules}
    alpha = public.rank if public.alpha is None else public.alpha
    assert report.scales == {alpha / public.rank: public.num_modules}
    assert report.variants == public.variants


def test_the_public_loras_are_twenty_and_more_in_six_spellings():
    assert len(PUBLIC) >= 20
    assert len({(public.prefix, public.endings) for public in PUBLIC}) >= 6


@pytest.mark.parametrize("public", PUBLIC_21, ids=[public.file for public in PUBLIC_21])
def test_a_public_lora_of_2_1_is_read_whole_under_the_alpha_its_trainer_meant(public):
    state_dict = build_state_dict_21(public)
    metadata = {"lora_adapter_metadata": json.dumps(public.header)} if public.header else {}
    adapter = read_state_dict(state_dict, metadata, name=public.file)
    report = adapter.report
    per_block = len(public.names) + (GATE_UP in public.names)
    assert report.num_modules == 32 * per_block + len(public.on_top)
    assert report.num_matched_keys == len(state_dict)
    assert (report.unmatched, report.duplicates, report.warnings) == ((), (), ())
    assert (adapter.family, report.width, report.blocks) == ("qwen-image-2.1", 4096, "0-31")
    assert report.preset == ("attention" if public.names is ATTENTION else "full")
    alpha = public.header.get("transformer.lora_alpha", public.alpha or public.rank)
    assert report.scales == {alpha / public.rank: report.num_modules}
    assert report.variants == ()
    assert ("fused_split" in [f.kind for f in report.findings]) == (GATE_UP in public.names)
