"""What a reader reports, as data and as text."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from qwen_edit_lora.lora_core import LoadReport, read_adapter, read_state_dict
from qwen_edit_lora.lora_core.adapter.load_report import DroppedKey
from qwen_edit_lora.lora_core.text import join_counts, shorten_list

MLP = "transformer_blocks.0.img_mlp.net.2"


@pytest.fixture
def messy(make_state_dict):
    """Two blocks of attention, one module of another rank and kind, and keys without a module."""
    modules = [f"transformer_blocks.{i}.attn.{name}" for i in (0, 1) for name in ("to_q", "to_v")]
    state_dict = make_state_dict("musubi", modules, rank=2, alpha=1.0, dtype=torch.bfloat16)
    state_dict |= make_state_dict("musubi", [MLP], kind="LoHa", rank=3, alpha=0.0)
    state_dict |= {f"nothing.{i}.lora_A.weight": torch.ones(1, 1) for i in range(5)}
    metadata = {"modelspec.architecture": "Qwen-Image-Edit-2511/lora"}
    return read_state_dict(state_dict, metadata, "messy.safetensors").report


def test_the_report_counts_modules_by_kind_rank_scale_and_dtype(messy):
    assert messy.kinds == {"LoRA": 4, "LoHa": 1}
    assert messy.ranks == {2: 4, 3: 1}
    assert messy.scales == {0.5: 4, 0.0: 1}
    assert messy.dtypes == {"bfloat16": 4, "float32": 1}


def test_the_report_names_blocks_and_width(messy):
    assert (messy.blocks, messy.width, messy.num_modules) == ("0-1", 4, 5)


def test_the_text_has_every_fact_a_user_asks_for(messy):
    text = messy.to_text()
    for fact in (
        "messy.safetensors: matched 5 modules, 17 of 22 keys",
        "format kohya (lora_unet_)",
        "rank 2 (4), 3 (1); scale 0.5 (4), 0 (1)",
        "from tensor",
        "blocks 0-1; model width 4",
        "made for 2511, says metadata modelspec.architecture",
    ):
        assert fact in text


def test_the_warnings_are_in_the_text(messy):
    warnings = [
        "5 of 22 keys were not loaded: nothing.0.lora_A.weight: names no module",
        "alpha is 0 in some modules",
    ]
    for warning in warnings:
        assert f"Warning: {warning}" in messy.to_text()
    assert len(messy.warnings) == len(warnings)


def test_a_clean_adapter_has_no_warnings(make_state_dict):
    assert read_state_dict(make_state_dict("lightning", alpha=1.0)).report.warnings == ()


@pytest.mark.parametrize(
    ("variants", "warns"), [(("text-to-image",), True), (("text-to-image", "2511"), False)]
)
def test_a_text_to_image_adapter_is_warned_about(variants, warns):
    report = LoadReport(variants=variants)
    assert any("text-to-image" in warning for warning in report.warnings) is warns


def test_the_report_becomes_json(messy):
    plain = json.loads(json.dumps(messy.to_dict()))
    assert (plain["num_keys"], plain["kinds"]) == (22, {"LoRA": 4, "LoHa": 1})
    assert plain["unmatched"][0]["key"] == "nothing.0.lora_A.weight"
    assert plain["warnings"] == list(messy.warnings)


def test_the_size_is_that_of_the_tensors(make_state_dict, write_file):
    state_dict = make_state_dict(rank=5, dtype=torch.float16)
    report = read_adapter(write_file(state_dict)).report
    assert report.size_bytes == sum(tensor.nbytes for tensor in state_dict.values())


@pytest.mark.parametrize(
    ("counts", "text"),
    [
        ({64: 720}, "64"),
        ({0.125: 3}, "0.125"),
        ({64: 20, 32: 700}, "32 (700), 64 (20)"),
        ({i: 9 - i for i in range(7)}, "0 (9), 1 (8), 2 (7), 3 (6), 3 more"),
    ],
)
def test_counts_are_shown_most_common_first(counts, text):
    assert join_counts(counts) == text


@pytest.mark.parametrize(("num", "text"), [(0, ""), (2, "a; b"), (3, "a; b; and 1 more")])
def test_long_lists_are_shortened(num, text):
    assert shorten_list(list("abc")[:num], 2) == text


def test_a_dropped_key_is_reported_with_its_reason_and_nearest_module():
    dropped = DroppedKey("img_on.alpha", "names no module", "img_in")
    assert str(dropped) == "img_on.alpha: names no module (nearest known module: img_in)"


def test_a_report_never_changes(messy):
    with pytest.raises(dataclasses.FrozenInstanceError):
        messy.num_keys = 0


def test_every_warning_is_a_finding_with_a_kind_a_severity_and_a_number(messy):
    findings = {finding.kind: finding for finding in messy.findings}
    assert (findings["unmatched_keys"].severity, findings["unmatched_keys"].count) == ("warning", 5)
    assert (findings["alpha_zero"].severity, findings["alpha_zero"].count) == ("warning", 1)
    assert messy.warnings == tuple(f.text for f in messy.findings if f.severity == "warning")


def test_the_json_holds_the_findings_and_the_text_a_line_for_each(make_state_dict):
    report = read_state_dict(make_state_dict("ai-toolkit", rank=2), {"alpha": "3"}).report
    values = json.loads(json.dumps(report.to_dict()))
    (finding, family) = values["findings"]
    assert (family["kind"], family["severity"]) == ("family_unknown", "note")
    assert (finding["kind"], finding["severity"]) == ("alpha_from_field", "note")
    assert finding["count"] == 2
    assert f"Note: {finding['text']}" in report.to_text().splitlines()
    assert "found" not in values


def test_an_alpha_taken_from_the_rank_is_noted_and_warns_of_nothing(make_state_dict):
    report = read_state_dict(make_state_dict("ai-toolkit")).report
    (finding, _) = report.findings
    assert (finding.kind, finding.severity, finding.count) == ("alpha_from_rank", "note", 2)
    assert report.warnings == ()


def test_findings_come_with_the_warnings_first(make_state_dict):
    state_dict = make_state_dict("ai-toolkit") | {"nothing": torch.ones(1)}
    severities = [f.severity for f in read_state_dict(state_dict).report.findings]
    assert severities == ["warning", "note", "note"]
