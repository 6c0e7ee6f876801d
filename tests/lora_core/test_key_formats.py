"""Every spelling in the wild reads as the same adapter."""

from __future__ import annotations

import pytest
import torch
from qwen_edit_lora.lora_core import compute_delta, read_adapter, read_state_dict, targets

TO_Q = "transformer_blocks.0.attn.to_q"
LINEARS = [
    *(f"transformer_blocks.{block}.{name}" for block in (0, 59) for name in targets.BLOCK_LINEARS),
    *targets.TOP_LINEARS,
]
NORMS = [*(f"transformer_blocks.3.{name}" for name in targets.BLOCK_NORMS), *targets.TOP_NORMS]


def test_every_spelling_gives_the_same_deltas(key_style, make_state_dict, write_file):
    adapter = read_adapter(write_file(make_state_dict(key_style, LINEARS, rank=2, alpha=3.0)))
    assert set(adapter.modules) == set(LINEARS)
    reference = make_state_dict("lightning", LINEARS, rank=2)
    for path, weights in adapter.modules.items():
        lora_A, lora_B = (reference[f"{path}.lora_{end}.weight"].double() for end in ("down", "up"))
        expected = (3.0 / 2) * lora_B @ lora_A
        torch.testing.assert_close(compute_delta(weights).double(), expected, rtol=1e-5, atol=1e-6)


def test_no_key_of_any_spelling_is_left_over(key_style, make_state_dict):
    report = read_state_dict(make_state_dict(key_style, LINEARS, alpha=1.0)).report
    assert (report.num_matched_keys, report.warnings) == (3 * len(LINEARS), ())


def test_report_names_the_key_format(key_style, key_styles, make_state_dict):
    adapter = read_state_dict(make_state_dict(key_style))
    expected = key_styles[key_style].key_format
    assert (adapter.key_format, adapter.report.key_format) == (expected, expected)


def test_norms_take_a_whole_delta_under_every_prefix(key_style, spell_key):
    state_dict = {spell_key(path, key_style, ".diff"): torch.ones(128) for path in NORMS}
    adapter = read_state_dict(state_dict)
    assert {path: adapter.modules[path].delta().sum().item() for path in adapter} == dict.fromkeys(
        NORMS, 128.0
    )


@pytest.mark.parametrize("style", ["ai-toolkit", "musubi", "lycoris", "onetrainer-kohya"])
@pytest.mark.parametrize("kind", ["LoHa", "LoKr", "LoKr half", "LoKr factored", "OFT", "DoRA"])
def test_lycoris_kinds_are_read_under_their_prefixes(kind, style, make_state_dict):
    state_dict = make_state_dict(style, LINEARS[:14], kind=kind, alpha=1.0)
    report = read_state_dict(state_dict).report
    assert report.kinds == {kind.split()[0]: 14}
    assert report.num_matched_keys == len(state_dict)


@pytest.mark.parametrize(
    "ending",
    [
        ".dora_scale",
        ".magnitude",
        ".lora_magnitude_vector",
        ".lora_magnitude_vector.weight",
        ".lora_magnitude_vector.default",
        ".lora_magnitude_vector.default.weight",
    ],
)
def test_every_spelling_of_a_dora_magnitude_is_read(ending, make_state_dict):
    style = "diffsynth" if ".default" in ending else "ai-toolkit"
    prefix = "" if style == "diffsynth" else "diffusion_model."
    magnitude = torch.arange(4.0)
    adapter = read_state_dict(make_state_dict(style, [TO_Q]) | {prefix + TO_Q + ending: magnitude})
    assert torch.equal(adapter.modules[TO_Q].magnitude, magnitude)


@pytest.mark.parametrize(("weight", "bias"), [(".diff", ".diff_b"), (".w_norm", ".b_norm")])
def test_both_spellings_of_a_whole_delta_are_read(weight, bias):
    path = "transformer_blocks.0.img_mod.1"
    state_dict = {path + weight: torch.ones(24, 4), path + bias: torch.full((24,), 2.0)}
    weights = read_state_dict(state_dict).modules[path]
    assert (weights.delta().sum().item(), weights.bias_delta.sum().item()) == (96.0, 48.0)


def test_a_bias_delta_may_stand_alone():
    weights = read_state_dict({f"diffusion_model.{TO_Q}.diff_b": torch.ones(4)}).modules[TO_Q]
    assert torch.equal(weights.bias_delta, torch.ones(4))
    assert torch.equal(weights.delta(torch.ones(4, 4)), torch.zeros(4, 4))


def test_mixed_prefixes_in_one_file_are_all_read(make_state_dict):
    state_dict = make_state_dict("musubi", LINEARS[:10]) | make_state_dict(
        "ai-toolkit", LINEARS[10:]
    )
    adapter = read_state_dict(state_dict)
    assert set(adapter.modules) == set(LINEARS)
    assert adapter.report.key_format == "mixed: comfyui, kohya"
    assert adapter.report.prefixes == {"lora_unet_": 20, "diffusion_model.": 48}


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("diffusion_model.transformer_blocks.7.attn.to_qkv.lora_A.weight", "attn.to_q"),
        ("transformer.transformer_blocks.7.attn.to_out.lora_A.weight", "attn.to_out.0"),
        ("lora_unet_transformer_blocks_7_img_mlp_net_0.lora_down.weight", "img_mlp.net.0.proj"),
        ("transformer_blocks.7.txt_modulation.1.lora_A.weight", "txt_mod.1"),
    ],
)
def test_an_unmatched_key_is_reported_with_its_nearest_module(key, nearest, make_state_dict):
    report = read_state_dict(make_state_dict() | {key: torch.ones(2, 4)}).report
    (dropped,) = report.unmatched
    assert (dropped.key, dropped.nearest) == (key, f"transformer_blocks.7.{nearest}")


def test_a_top_level_misspelling_is_reported_with_its_nearest_module(make_state_dict):
    report = read_state_dict(
        make_state_dict() | {"image_in.lora_A.weight": torch.ones(2, 4)}
    ).report
    assert [key.nearest for key in report.unmatched] == ["img_in"]


@pytest.mark.parametrize(
    "key",
    [
        "text_encoder.model.layers.0.self_attn.q_proj.lora_A.weight",
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight",
        "text_encoders.qwen25_7b.model.layers.0.mlp.up_proj.lora_A.weight",
    ],
)
def test_text_encoder_keys_are_left_out_and_called_so(key, make_state_dict):
    report = read_state_dict(make_state_dict() | {key: torch.ones(2, 4)}).report
    assert [dropped.key for dropped in report.unmatched] == [key]
    assert "text encoder" in report.unmatched[0].reason


@pytest.mark.parametrize(
    ("ending", "reason"),
    [
        (".lora_mid.weight", "Tucker"),
        (".hada_t1", "Tucker"),
        (".lokr_t2", "Tucker"),
        (".a1.weight", "GLoRA"),
        (".set_weight", "replaced weight"),
        (".oft_R.weight", "PEFT adapter type"),
        (".vera_lambda_b", "PEFT adapter type"),
        (".lora_embedding_A", "embedding"),
        (".something", "no known adapter type"),
    ],
)
def test_an_unsupported_part_is_reported_with_its_reason(ending, reason, make_state_dict):
    report = read_state_dict(make_state_dict() | {TO_Q + ending: torch.ones(2, 4)}).report
    assert [reason in dropped.reason for dropped in report.unmatched] == [True]


STRANGE_KEYS = {
    "empty": "",
    "a dot": ".",
    "an ending alone": ".lora_A.weight",
    "a prefix alone": "diffusion_model..alpha",
    "a line break": "transformer_blocks.0.attn\n.to_q.alpha",
    "5000 digits": f"transformer_blocks.{'1' * 5000}.attn.to_q.alpha",
    "5000 digits underscored": f"lora_unet_transformer_blocks_{'1' * 5000}_attn_to_q.alpha",
    "other digits": "transformer_blocks.\u0663.attn.to_q.alpha",
}


@pytest.mark.parametrize("key", STRANGE_KEYS.values(), ids=STRANGE_KEYS)
def test_strange_keys_are_reported_instead_of_raised(key, make_state_dict):
    report = read_state_dict(make_state_dict() | {key: torch.ones(1)}).report
    assert [dropped.key for dropped in report.unmatched] == [key]
