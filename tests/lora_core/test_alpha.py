"""Which alpha applies: the tensor, else the metadata, else adapter_config.json, else the rank."""

from __future__ import annotations

import json
import math

import pytest
import torch
from qwen_edit_lora.lora_core import read_adapter, read_state_dict

TO_Q = "transformer_blocks.0.attn.to_q"
TO_K = "transformer_blocks.0.attn.to_k"
RANK = "rank (the file names none)"


def describe(prefix="", **fields) -> dict[str, str]:
    """Metadata as diffusers writes it: a pipeline puts "transformer." before every field."""
    return {"lora_adapter_metadata": json.dumps({prefix + k: v for k, v in fields.items()})}


def read_alphas(adapter) -> dict[str, float]:
    return {path: weights.alpha for path, weights in adapter.modules.items()}


def test_an_alpha_tensor_beats_the_metadata(make_state_dict):
    metadata = describe(lora_alpha=32) | {"ss_network_alpha": "16"}
    adapter = read_state_dict(make_state_dict("musubi", alpha=3.0), metadata)
    assert read_alphas(adapter) == {TO_Q: 3.0, TO_K: 3.0}
    assert adapter.report.alpha_rules == {"tensor": 2}


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_diffusers_metadata_gives_alpha(prefix, make_state_dict):
    adapter = read_state_dict(make_state_dict("diffusers"), describe(prefix, lora_alpha=3, r=2))
    assert read_alphas(adapter) == {TO_Q: 3.0, TO_K: 3.0}
    assert adapter.report.alpha_rules == {"metadata": 2}


def test_rank_stabilised_metadata_scales_by_the_root_of_the_rank(make_state_dict):
    metadata = describe("transformer.", lora_alpha=3, use_rslora=True)
    adapter = read_state_dict(make_state_dict("diffusers", rank=4), metadata)
    assert adapter.modules[TO_Q].scale == pytest.approx(3 / math.sqrt(4))
    assert adapter.report.alpha_rules == {"metadata (rsLoRA)": 2}


@pytest.mark.parametrize(
    "pattern", ["to_q", "attn.to_q", r"transformer_blocks\.\d+\.attn\.to_q", TO_Q, ".*to_q"]
)
def test_an_alpha_pattern_beats_the_common_alpha(pattern, make_state_dict):
    metadata = describe(lora_alpha=3, alpha_pattern={pattern: 5})
    adapter = read_state_dict(make_state_dict("diffusers"), metadata)
    assert read_alphas(adapter) == {TO_Q: 5.0, TO_K: 3.0}


def test_an_alpha_pattern_alone_leaves_the_rank_to_the_others(make_state_dict):
    adapter = read_state_dict(make_state_dict("diffusers"), describe(alpha_pattern={"to_q": 5}))
    assert read_alphas(adapter) == {TO_Q: 5.0, TO_K: 2.0}
    assert adapter.report.alpha_rules == {"metadata": 1, RANK: 1}


@pytest.mark.parametrize(
    "fields",
    [
        {"alpha_pattern": {"(": 5}},
        {"alpha_pattern": ["to_q"]},
        {"alpha_pattern": {"to_q": "much"}},
        {"use_rslora": "true"},
    ],
    ids=lambda fields: json.dumps(fields),
)
def test_a_broken_field_of_the_metadata_is_passed_over(fields, make_state_dict):
    adapter = read_state_dict(make_state_dict("diffusers"), describe(lora_alpha=3, **fields))
    assert read_alphas(adapter) == {TO_Q: 3.0, TO_K: 3.0}


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '{"lora_alpha": true}', '{"r": 4}'])
def test_metadata_without_an_alpha_leaves_it_to_the_rank(text, make_state_dict):
    adapter = read_state_dict(make_state_dict("diffusers"), {"lora_adapter_metadata": text})
    assert read_alphas(adapter) == {TO_Q: 2.0, TO_K: 2.0}


def test_kohya_metadata_gives_alpha(make_state_dict):
    adapter = read_state_dict(make_state_dict("musubi"), {"ss_network_alpha": "1.0"})
    assert read_alphas(adapter) == {TO_Q: 1.0, TO_K: 1.0}
    assert adapter.report.alpha_rules == {"metadata": 2}


@pytest.mark.parametrize("value", ["Dynamic", "None", ""])
def test_kohya_metadata_without_a_number_leaves_it_to_the_rank(value, make_state_dict):
    adapter = read_state_dict(make_state_dict("musubi"), {"ss_network_alpha": value})
    assert adapter.report.alpha_rules == {RANK: 2}


def write_config(path, **fields) -> None:
    path.with_name("adapter_config.json").write_text(json.dumps(fields))


def test_a_peft_file_takes_alpha_from_the_config_beside_it(make_state_dict, write_file):
    path = write_file(make_state_dict("peft"))
    write_config(path, lora_alpha=3, alpha_pattern={"to_k": 4}, use_rslora=True)
    adapter = read_adapter(path)
    root = math.sqrt(2)
    assert read_alphas(adapter) == {TO_Q: 3 * root, TO_K: 4 * root}
    assert adapter.report.alpha_rules == {"adapter_config.json (rsLoRA)": 2}


def test_metadata_beats_the_config_beside_the_file(make_state_dict, write_file):
    path = write_file(make_state_dict("peft"), describe(lora_alpha=5))
    write_config(path, lora_alpha=3)
    assert read_adapter(path).report.alpha_rules == {"metadata": 2}


def test_a_config_beside_files_of_other_programs_is_not_theirs(make_state_dict, write_file):
    path = write_file(make_state_dict("ai-toolkit"))
    write_config(path, lora_alpha=3)
    assert read_adapter(path).report.alpha_rules == {RANK: 2}


@pytest.mark.parametrize("text", [b"\xff\xfe", b"{", b"[]"])
def test_an_unreadable_config_leaves_it_to_the_rank(text, make_state_dict, write_file):
    path = write_file(make_state_dict("peft"))
    path.with_name("adapter_config.json").write_bytes(text)
    assert read_adapter(path).report.alpha_rules == {RANK: 2}


def test_silence_means_alpha_is_the_rank(make_state_dict):
    adapter = read_state_dict(make_state_dict("ai-toolkit", rank=3))
    assert adapter.modules[TO_Q].scale == 1.0
    assert adapter.report.alpha_rules == {RANK: 2}


@pytest.mark.parametrize("alpha", [math.inf, -math.inf, math.nan])
def test_a_non_finite_alpha_is_replaced_by_the_rank_and_reported(alpha, make_state_dict):
    adapter = read_state_dict(make_state_dict("musubi", alpha=alpha))
    assert read_alphas(adapter) == {TO_Q: 2.0, TO_K: 2.0}
    assert set(adapter.report.non_finite) == {TO_Q, TO_K}
    assert any("alpha is NaN or Inf in 2 modules" in text for text in adapter.report.warnings)


def test_a_non_finite_alpha_in_the_metadata_is_replaced_too(make_state_dict):
    metadata = {"lora_adapter_metadata": '{"lora_alpha": Infinity}'}
    report = read_state_dict(make_state_dict("diffusers"), metadata).report
    assert set(report.non_finite) == {TO_Q, TO_K}


@pytest.mark.parametrize("alpha", [1e10, math.inf])
def test_a_lokr_of_whole_factors_ignores_alpha(alpha, make_state_dict):
    adapter = read_state_dict(make_state_dict(kind="LoKr", alpha=alpha))
    assert adapter.modules[TO_Q].scale == 1.0
    assert adapter.report.non_finite == ()
    assert adapter.report.alpha_rules == {"fixed (both LoKr factors whole)": 2}


def test_an_oft_takes_no_constraint_from_metadata_about_alpha(make_state_dict):
    adapter = read_state_dict(make_state_dict(kind="OFT"), {"ss_network_alpha": "1"})
    assert adapter.modules[TO_Q].alpha == 0.0


def test_an_alpha_of_zero_is_warned_about(make_state_dict):
    adapter = read_state_dict(make_state_dict("musubi", alpha=0.0))
    assert adapter.modules[TO_Q].scale == 0.0
    assert any("alpha is 0" in text for text in adapter.report.warnings)


def test_lightning_is_applied_at_an_eighth(make_state_dict):
    adapter = read_state_dict(make_state_dict("lightning", rank=64, alpha=8.0))
    assert adapter.report.scales == {0.125: 2}


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64])
def test_alpha_may_be_any_single_number(shape, dtype, make_state_dict):
    state_dict = make_state_dict("musubi", [TO_Q])
    state_dict["lora_unet_transformer_blocks_0_attn_to_q.alpha"] = torch.full(shape, 4, dtype=dtype)
    assert read_alphas(read_state_dict(state_dict)) == {TO_Q: 4.0}
