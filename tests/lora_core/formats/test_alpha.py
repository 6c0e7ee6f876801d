"""Which alpha applies: the tensor, else the metadata, else adapter_config.json, else the rank."""

from __future__ import annotations

import json
import math
import os

import pytest
import torch
from qwen_edit_lora.lora_core import KeyFormatError, read_adapter, read_state_dict

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
        {"alpha_pattern": {"(?i)to_q": 5}},
        {"alpha_pattern": {"([a-z_.0-9]+)+X": 5}},
        {"alpha_pattern": {"to_[qv]": 5}},
        {"alpha_pattern": {"[" * 500: 5}},
        {"alpha_pattern": ["to_q"]},
        {"alpha_pattern": {"to_q": "much"}},
        {"use_rslora": "true"},
        {"r": "4x"},
    ],
    ids=lambda fields: json.dumps(fields)[:60],
)
def test_a_broken_metadata_field_is_skipped_and_reported(fields, make_state_dict):
    adapter = read_state_dict(make_state_dict("diffusers"), describe(lora_alpha=3, **fields))
    assert read_alphas(adapter) == {TO_Q: 3.0, TO_K: 3.0}
    (warning,) = adapter.report.warnings
    assert next(iter(fields)) in warning


@pytest.mark.parametrize("text", ["", "{}", '{"lora_alpha": null}', '{"r": 2}'])
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


def test_a_config_beside_files_of_other_programs_is_ignored(make_state_dict, write_file):
    path = write_file(make_state_dict("ai-toolkit"))
    write_config(path, lora_alpha=3)
    assert read_adapter(path).report.alpha_rules == {RANK: 2}


UNREADABLE = {
    "UTF-16": json.dumps({"lora_alpha": 3}).encode("utf-16"),
    "cut short": b'{"lora_alpha": 3, "r"',
    "empty": b"",
    "a list": b"[]",
    "deep": b'{"lora_alpha": 3, "x": ' + b"[" * 10**5 + b"]" * 10**5 + b"}",
    "a number beyond float": b'{"lora_alpha": 1%s}' % (b"0" * 400),
    "Infinity": b'{"lora_alpha": Infinity}',
    "a text for alpha": b'{"lora_alpha": "x"}',
    "true for alpha": b'{"lora_alpha": true}',
    "a list for alpha": b'{"lora_alpha": [3]}',
}


@pytest.mark.parametrize("text", UNREADABLE.values(), ids=UNREADABLE)
def test_an_unreadable_config_is_reported_and_named_in_the_rule(text, make_state_dict, write_file):
    path = write_file(make_state_dict("peft"))
    path.with_name("adapter_config.json").write_bytes(text)
    report = read_adapter(path).report
    assert report.alpha_rules == {"rank (adapter_config.json cannot be read)": 2}
    assert [text for text in report.warnings if "adapter_config.json" in text]


@pytest.mark.parametrize("text", UNREADABLE.values(), ids=UNREADABLE)
def test_an_unreadable_header_is_reported_and_named_in_the_rule(text, make_state_dict):
    text = text.decode("utf-8", "replace")
    report = read_state_dict(make_state_dict("ai-toolkit"), {"lora_adapter_metadata": text}).report
    if text:
        (rule,) = report.alpha_rules
        assert "cannot be read" in rule
        assert len(report.warnings) == 1


def test_a_config_with_a_byte_order_mark_is_read(make_state_dict, write_file):
    path = write_file(make_state_dict("peft"))
    path.with_name("adapter_config.json").write_bytes(b'\xef\xbb\xbf{"lora_alpha": 3}')
    adapter = read_adapter(path)
    assert read_alphas(adapter) == {TO_Q: 3.0, TO_K: 3.0}
    assert adapter.report.warnings == ()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes with names")
def test_a_pipe_for_a_config_does_not_hang(make_state_dict, write_file):
    path = write_file(make_state_dict("peft"))
    os.mkfifo(path.with_name("adapter_config.json"))
    (warning,) = read_adapter(path).report.warnings
    assert "is a pipe" in warning


@pytest.mark.parametrize(
    "fields",
    [
        {"r": 8},
        {"r": 2, "rank_pattern": {"to_k": 3}},
        {"r": 2, "target_modules": ["to_v"]},
        {"r": 2, "target_modules": ["to_q", "add_k_proj"]},
        {"r": 2, "target_modules": r"transformer_blocks\.\d+\.attn\.to_q"},
    ],
    ids=json.dumps,
)
def test_the_config_of_another_adapter_gives_no_alpha_and_is_reported(
    fields, make_state_dict, write_file
):
    path = write_file(make_state_dict("peft"))
    write_config(path, lora_alpha=3, **fields)
    report = read_adapter(path).report
    assert report.alpha_rules == {"rank (adapter_config.json is another adapter's)": 2}
    (warning,) = report.warnings
    assert "belongs to another adapter" in warning


@pytest.mark.parametrize(
    "fields",
    [
        {"r": 2},
        {"r": 8, "rank_pattern": {"to_q": 2, r"transformer_blocks\.\d+\.attn\.to_k": 2}},
        {"r": 2, "target_modules": ["to_q", "attn.to_k", "proj_out"]},
        {"r": 2, "target_modules": "all-linear"},
        {"r": 2, "target_modules": r".*attn\.(to_q|to_k)"},
        {"r": 2, "target_modules": r".*attn\.to_.*"},
    ],
    ids=json.dumps,
)
def test_a_config_that_fits_gives_alpha(fields, make_state_dict, write_file):
    path = write_file(make_state_dict("peft"))
    write_config(path, lora_alpha=3, **fields)
    report = read_adapter(path).report
    assert (report.alpha_rules, report.warnings) == ({"adapter_config.json": 2}, ())


START_FIELDS = ("pissa", "pissa_niter_4", "olora", "OLoRA", "corda", "lora_ga", "loftq")


@pytest.mark.parametrize("start", START_FIELDS)
@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize("alpha", [None, 3.0], ids=["no alpha tensor", "alpha tensor"])
def test_an_initialization_that_changed_the_base_is_refused(start, prefix, alpha, make_state_dict):
    metadata = describe(prefix, lora_alpha=3, init_lora_weights=start)
    with pytest.raises(KeyFormatError, match="which moved part of the model into the LoRA"):
        read_state_dict(make_state_dict("diffusers", alpha=alpha), metadata)


def test_an_initialization_that_changed_the_base_is_refused_by_the_config_beside(
    make_state_dict, write_file
):
    path = write_file(make_state_dict("peft"))
    write_config(path, lora_alpha=3, r=2, init_lora_weights="pissa")
    with pytest.raises(KeyFormatError, match="PiSSA start"):
        read_adapter(path)
    write_config(path, lora_alpha=3, r=16, init_lora_weights="pissa")  # another adapter's
    assert len(read_adapter(path).modules) == 2


@pytest.mark.parametrize("start", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_an_initialization_that_left_the_base_unchanged_is_read(start, make_state_dict):
    metadata = describe(lora_alpha=3, init_lora_weights=start)
    adapter = read_state_dict(make_state_dict("diffusers"), metadata)
    assert (read_alphas(adapter), adapter.report.warnings) == ({TO_Q: 3.0, TO_K: 3.0}, ())


def test_an_unknown_initialization_is_reported(make_state_dict):
    metadata = describe(lora_alpha=3, init_lora_weights="sparse_start")
    (warning,) = read_state_dict(make_state_dict("diffusers"), metadata).report.warnings
    assert "sparse_start" in warning


@pytest.mark.parametrize(
    "fields",
    [
        {"use_qalora": True},
        {"use_bdlora": {"nblocks": 2}},
        {"kasa_config": {"beta": 1}},
        {"alora_invocation_tokens": [1]},
    ],
    ids=json.dumps,
)
def test_a_peft_variant_that_computes_something_else_is_refused(fields, make_state_dict):
    with pytest.raises(KeyFormatError, match="compute something other than a LoRA"):
        read_state_dict(make_state_dict("diffusers"), describe(lora_alpha=3, **fields))


@pytest.mark.parametrize("header_field", ["alpha", "lora_alpha", "network_alpha"])
@pytest.mark.parametrize("value", ["8", "8.0", " 8 "])
@pytest.mark.parametrize("style", ["ai-toolkit", "lightning", "diffusers", "peft"])
def test_a_plain_header_field_gives_alpha_and_is_reported(
    header_field, value, style, make_state_dict
):
    state_dict = make_state_dict(style, rank=4)
    adapter = read_state_dict(state_dict, {header_field: value, "rank": "4"})
    assert read_alphas(adapter) == {TO_Q: 8.0, TO_K: 8.0}
    assert adapter.report.alpha_rules == {f"the header's {header_field}": 2}
    assert "alpha_from_field" in [finding.kind for finding in adapter.report.findings]
    assert f"alpha of 2 modules is 8, from the header's {header_field}" in adapter.report.to_text()


def test_an_alpha_tensor_beats_a_plain_header_field(make_state_dict):
    adapter = read_state_dict(make_state_dict("musubi", alpha=3.0), {"alpha": "8"})
    assert read_alphas(adapter) == {TO_Q: 3.0, TO_K: 3.0}


@pytest.mark.parametrize("value", ["much", "1_0", "0x8", "[8]", "1e999x"])
def test_a_plain_header_field_that_is_not_a_number_is_reported(value, make_state_dict):
    report = read_state_dict(make_state_dict("ai-toolkit"), {"alpha": value}).report
    assert report.alpha_rules == {"rank (the header's alpha cannot be read)": 2}
    assert len(report.warnings) == 1


def test_headers_that_contradict_each_other_are_reported(make_state_dict):
    metadata = describe(lora_alpha=3) | {"alpha": "8"}
    report = read_state_dict(make_state_dict("diffusers"), metadata).report
    assert report.alpha_rules == {"metadata": 2}
    assert [finding.kind for finding in report.findings][:1] == ["alpha_contradiction"]


def test_a_header_of_another_rank_is_reported(make_state_dict):
    metadata = describe(lora_alpha=3, r=16)
    report = read_state_dict(make_state_dict("diffusers"), metadata).report
    assert [finding.kind for finding in report.findings][:1] == ["config_mismatch"]


def test_a_leftover_alpha_of_converters_is_reported_and_not_used(make_state_dict):
    metadata = {"ss_network_alpha": "1", "ss_network_dim": "2"}
    report = read_state_dict(make_state_dict("ai-toolkit"), metadata).report
    assert report.alpha_rules == {RANK: 2}
    assert "alpha_field_unused" in [finding.kind for finding in report.findings]


@pytest.mark.parametrize("alpha", [1e10, 1e38, -1e38, 1e-30])
def test_a_scale_that_no_trainer_chooses_is_reported(alpha, make_state_dict):
    (warning,) = read_state_dict(make_state_dict("musubi", alpha=alpha)).report.warnings
    assert "alpha is probably wrong" in warning


def test_alpha_defaults_to_the_rank(make_state_dict):
    adapter = read_state_dict(make_state_dict("ai-toolkit", rank=3))
    assert adapter.modules[TO_Q].scale == 1.0
    assert adapter.report.alpha_rules == {RANK: 2}


@pytest.mark.parametrize("alpha", [math.inf, -math.inf, math.nan])
def test_a_non_finite_alpha_is_replaced_by_the_rank_and_reported(alpha, make_state_dict):
    adapter = read_state_dict(make_state_dict("musubi", alpha=alpha))
    assert read_alphas(adapter) == {TO_Q: 2.0, TO_K: 2.0}
    assert set(adapter.report.non_finite) == {TO_Q, TO_K}
    assert any("alpha is NaN or Inf in 2 modules" in text for text in adapter.report.warnings)


def test_an_alpha_beyond_float32_is_replaced_as_infinity_is(make_state_dict):
    state_dict = make_state_dict("musubi")
    for path in (TO_Q, TO_K):
        key = f"lora_unet_{path.replace('.', '_')}.alpha"
        state_dict[key] = torch.tensor(1e300, dtype=torch.float64)
    report = read_state_dict(state_dict).report
    assert set(report.non_finite) == {TO_Q, TO_K}
    metadata = {"lora_adapter_metadata": '{"lora_alpha": 1e300}'}
    report = read_state_dict(make_state_dict("diffusers"), metadata).report
    assert set(report.non_finite) == {TO_Q, TO_K}


@pytest.mark.parametrize("alpha", [1e10, math.inf])
def test_a_lokr_of_whole_factors_ignores_alpha(alpha, make_state_dict):
    adapter = read_state_dict(make_state_dict(kind="LoKr", alpha=alpha))
    assert adapter.modules[TO_Q].scale == 1.0
    assert adapter.report.non_finite == ()
    assert adapter.report.alpha_rules == {"fixed (both LoKr factors whole)": 2}


def test_an_oft_ignores_alpha_metadata_for_its_constraint(make_state_dict):
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
