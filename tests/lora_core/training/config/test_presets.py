"""Presets are complete configurations, and a user's own settings take precedence."""

from __future__ import annotations

import re

import pytest
import torch
from qwen_edit_lora.lora_core import ConfigError
from qwen_edit_lora.lora_core.injection.inject import inject
from qwen_edit_lora.lora_core.injection.plan import LoraSettings
from qwen_edit_lora.lora_core.training.config.config_files import config_from_dict
from qwen_edit_lora.lora_core.training.config.presets import (
    GIB,
    PRESETS,
    RESERVE,
    TRANSIENT_TENSORS,
    BaseSize,
    apply_preset,
    choose_storage,
    measure_base,
)
from qwen_edit_lora.lora_core.training.model.architecture import Architecture
from qwen_edit_lora.lora_core.training.model.gradient_checkpointing import LiveBytes
from qwen_edit_lora.lora_core.training.model.transformer import EditTransformer
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

REQUIRED = {
    "name": "a",
    "output": "runs/a",
    "model": {"source": "base.safetensors"},
    "data": {"folder": "cache"},
}


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_configuration(name):
    config = config_from_dict(apply_preset(name, REQUIRED))
    assert config.lora.rank == PRESETS[name].settings["lora"]["rank"]
    assert config.model.source == "base.safetensors"


def test_given_settings_win_and_leave_their_neighbours_and_the_preset_alone():
    given = {**REQUIRED, "lora": {"rank": 5}, "optimizer": {"name": "adafactor"}}
    config = config_from_dict(apply_preset("light", given))
    assert (config.lora.rank, config.lora.targets) == (5, ("attention",))
    assert (config.optimizer.name, config.optimizer.learning_rate) == ("adafactor", 2e-4)
    assert PRESETS["light"].settings["lora"]["rank"] == 8


def test_an_unknown_preset_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match="unknown preset 'fast'; expected one of standard, light"):
        apply_preset("fast", {})


#: Qwen-Image; the numbers in `test_documents` are those of its layers.
SIZE = BaseSize(60, 339_830_784, 40_519_744, 3072)
HEADROOM = SIZE.count_headroom(num_tokens=8448, num_parameters=106_168_320)  # 1 MP, rank 16


def choose(gib, **options):
    return choose_storage(SIZE, int(gib * GIB), HEADROOM, **options)


@pytest.mark.parametrize(("gib", "storage"), [(79, "bf16"), (47, "bf16"), (31, "fp8"), (23, "nf4")])
def test_the_most_exact_storage_that_leaves_room_is_chosen(gib, storage):
    found = choose(gib)
    assert (found.storage, found.compute_dtype, found.offload_blocks) == (storage, "bf16", 0)
    assert not found.problem


@pytest.mark.parametrize("gib", [10, 11.7, 15.6, 20])
def test_where_no_storage_leaves_room_as_few_blocks_as_possible_are_offloaded(gib):
    found = choose(gib)
    assert found.storage == "fp8"
    assert found.host_bytes == found.offload_blocks * 339_830_784
    room = gib * GIB - RESERVE - HEADROOM
    assert SIZE.count_resident("fp8", found.offload_blocks) <= room
    assert SIZE.count_resident("fp8", found.offload_blocks - 1) > room
    text = f"storage auto is fp8 with {found.offload_blocks} of 60 blocks offloaded to main memory"
    assert found.describe(SIZE) == f"{text}, {found.host_bytes / GIB:.3g} GiB"


def test_too_little_main_memory_for_offloaded_blocks_is_reported():
    assert choose(11.7, host_bytes=32 * GIB).storage == "fp8"
    little = choose(11.7, host_bytes=16 * GIB)
    assert (little.storage, little.problem) == ("nf4", "")
    none = choose(11.7, host_bytes=8 * GIB)
    assert none.storage == "nf4"
    assert re.search(
        r"; 1\d\.\d GiB of main memory are needed, and 8 GiB are free$", none.describe(SIZE)
    )
    tiny = choose(6)
    assert tiny.describe(SIZE).endswith("6 GiB of GPU memory leaves no room to train")


def test_a_storage_that_needs_a_missing_package_is_not_chosen():
    found = choose(23, has_nf4=False)
    assert found.storage == "fp8"
    assert found.offload_blocks > 0
    assert choose(11.7, host_bytes=16 * GIB, has_nf4=False).problem


def test_the_users_own_number_of_offloaded_blocks_is_kept():
    assert choose(11.7, offload_blocks=60).storage == "bf16"
    assert choose(11.7, offload_blocks=60, host_bytes=24 * GIB).storage == "fp8"
    assert choose(79, offload_blocks=3).offload_blocks == 3
    assert choose(15.6, offload_blocks=0).problem


def test_a_small_model_and_a_cpu_stay_exact():
    small = BaseSize(2, 100_000, 10_000, 64)
    assert choose_storage(small, 12 * GIB, HEADROOM).storage == "bf16"
    found = choose_storage(SIZE, None, HEADROOM)
    assert (found.storage, found.compute_dtype, found.offload_blocks) == ("fp32", "fp32", 0)


def test_headroom_grows_with_the_sample_and_the_lora():
    assert HEADROOM == 2 * 8448 * 3072 * (60 + TRANSIENT_TENSORS) + 16 * 106_168_320
    assert SIZE.count_headroom(2 * 8448, 0) == 2 * SIZE.count_headroom(8448, 0)
    assert SIZE.count_headroom(0, 10, averaged=True) == 200


def test_a_base_is_measured_by_the_shapes_of_its_file():
    shapes = {"img_in.weight": (8, 4), "norm_out.linear.bias": (5,)}
    for index in range(3):
        shapes |= {f"transformer_blocks.{index}.a.weight": (8, 8)}
        shapes |= {f"transformer_blocks.{index}.a.bias": (8,)}
    assert measure_base(shapes) == BaseSize(3, 72, 37, 8)


def test_the_peak_memory_of_a_step_is_within_the_headroom():
    """Counted on blocks of full width, without their data."""
    peaks = {n: count_peak(n) for n in (1, 2)}
    per_block = peaks[2] - peaks[1]
    whole = peaks[1] + 59 * per_block
    values = SIZE.count_headroom(NUM_TOKENS, 0)
    assert 0.8 * values < whole < values


#: 1024 x 1024, one reference of that size, and a caption.
NUM_TOKENS = 4096 + 4096 + 256


def count_peak(num_blocks: int) -> int:
    """Of a training step with gradient_checkpointing true, LoRA gradients left out."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = Architecture(num_layers=num_blocks).build_empty()
        for path, parameter in list(model.named_parameters()):
            module, _, name = path.rpartition(".")
            data = torch.empty(parameter.shape, dtype=torch.bfloat16)
            setattr(model.get_submodule(module), name, nn.Parameter(data, requires_grad=False))
        model = EditTransformer(model.eval())
        model.enable_gradient_checkpointing(True)
        inject(model.transformer, LoraSettings(rank=1), seed=0)
        latents = torch.zeros(1, 16, 128, 128)
        text = torch.zeros(1, 256, 3584)
        with LiveBytes() as counter:
            out = model(latents, [latents], text, None, torch.zeros(1))
            out.float().square().mean().backward()
    return counter.peak
