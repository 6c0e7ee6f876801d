"""Presets are whole configurations, and a user's own settings win."""

from __future__ import annotations

import pytest
from qwen_edit_lora.lora_core import ConfigError
from qwen_edit_lora.lora_core.training.config_files import config_from_dict
from qwen_edit_lora.lora_core.training.presets import (
    GIB,
    PRESETS,
    apply_preset,
    choose_storage,
)

NUM_WEIGHTS = 20_430_000_000  # of Qwen-Image
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


@pytest.mark.parametrize(
    ("gib", "storage"), [(80, "bf16"), (48, "bf16"), (32, "fp8"), (24, "nf4"), (12, "nf4")]
)
def test_the_most_exact_storage_that_leaves_room_is_chosen(gib, storage):
    assert choose_storage(NUM_WEIGHTS, gib * GIB) == (storage, "bf16")


def test_a_small_model_and_a_cpu_stay_exact():
    assert choose_storage(1_000_000, 12 * GIB) == ("bf16", "bf16")
    assert choose_storage(NUM_WEIGHTS, None) == ("fp32", "fp32")
