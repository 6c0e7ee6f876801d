"""Public LoRAs by their keys: names, shapes and alphas as published, no weights.

Each row was compiled from public descriptions of the file (the source beside it); ranks that no
source states are 16. The tensors have the real shapes and take no memory.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from qwen_edit_lora.lora_core import TARGET_PRESETS, read_state_dict
from qwen_edit_lora.lora_core.base_model.qwen_image import QWEN_IMAGE

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


def build_state_dict(public: Public) -> dict[str, torch.Tensor]:
    state_dict = {}
    for block in range(QWEN_IMAGE.num_blocks):
        for name in TARGET_PRESETS[public.preset]:
            out, in_ = QWEN_IMAGE.compute_shape(name)
            path = f"transformer_blocks.{block}.{name}"
            stem = public.prefix + path
            if public.prefix.endswith("_"):
                stem = public.prefix + path.replace(".", "_")
            down, up = public.endings
            one = torch.zeros((), dtype=torch.bfloat16)
            state_dict[stem + down] = one.expand(public.rank, in_)
            state_dict[stem + up] = one.expand(out, public.rank)
            if public.alpha is not None:
                state_dict[f"{stem}.alpha"] = torch.tensor(public.alpha)
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
