"""Every spelling found in public files reads as the same adapter."""

from __future__ import annotations

import json

import pytest
import torch
from qwen_edit_lora.lora_core import KeyFormatError, compute_delta, read_adapter, read_state_dict
from qwen_edit_lora.lora_core.base_model.qwen_image import QWEN_IMAGE

TO_Q = "transformer_blocks.0.attn.to_q"
LINEARS = [
    *(
        f"transformer_blocks.{block}.{name}"
        for block in (0, 59)
        for name in QWEN_IMAGE.block_linears
    ),
    *QWEN_IMAGE.top_linears,
]
NORMS = [
    *(f"transformer_blocks.3.{name}" for name in QWEN_IMAGE.block_norms),
    *QWEN_IMAGE.top_norms,
]


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
        ("diffusion_model.transformer_blocks.7.attn.to_qqv.lora_A.weight", "attn.to_q"),
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
def test_text_encoder_keys_are_skipped_and_reported_as_such(key, make_state_dict):
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


WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "module")


def wrap(key: str, module_path: str, wrapper: str, at: int) -> str:
    """The key with a wrapper's segment before the module path's segment `at`."""
    segments = module_path.split(".")
    return key.replace(module_path, ".".join([*segments[:at], wrapper, *segments[at:]]))


@pytest.mark.parametrize("at", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapper_prefix_is_removed_at_any_position(wrapper, at, key_style, make_state_dict):
    plain = make_state_dict(key_style, [TO_Q], alpha=3.0)
    underscored = TO_Q.replace(".", "_")
    state_dict = {}
    for key, tensor in plain.items():
        wrapped = wrap(key.replace(underscored, TO_Q), TO_Q, wrapper, at)
        if underscored in key:  # kohya's names hold no dots before the ending
            stem, dot, ending = (
                wrapped.partition(".lora_")
                if ".lora_" in wrapped
                else (wrapped.removesuffix(".alpha"), "", ".alpha")
            )
            wrapped = stem.replace(".", "_") + dot + ending
        state_dict[wrapped] = tensor
    adapter = read_state_dict(state_dict)
    assert (set(adapter.modules), adapter.report.warnings) == ({TO_Q}, ())
    expected = read_state_dict(plain).modules[TO_Q].delta()
    assert torch.equal(adapter.modules[TO_Q].delta(), expected)


@pytest.mark.parametrize("number", ["00", "01", "0059", "٣"])
@pytest.mark.parametrize("name", ["attn.to_q", "attn.to_qkv"])
@pytest.mark.parametrize("prefix", ["diffusion_model.", "lora_unet_"])
def test_a_block_number_with_leading_zeros_names_no_module(prefix, name, number, make_state_dict):
    """ComfyUI has no module transformer_blocks.00, and its loader leaves such keys out."""
    path = f"transformer_blocks.{number}.{name}"
    stem = prefix + (path.replace(".", "_") if prefix.endswith("_") else path)
    others = {f"{stem}.lora_A.weight": torch.ones(2, 4), f"{stem}.lora_B.weight": torch.ones(6, 2)}
    adapter = read_state_dict(make_state_dict("ai-toolkit", [TO_Q]) | others)
    assert list(adapter.modules) == [TO_Q]
    assert {dropped.key for dropped in adapter.report.unmatched} == set(others)
    if number == "0059" and name == "attn.to_q":
        assert {d.nearest for d in adapter.report.unmatched} == {f"transformer_blocks.59.{name}"}


FLAT_SPELLINGS = [
    "lora_unet_transformer_blocks_0.attn.to_q",
    "lora_unet_transformer_blocks.0.attn.to_q",
    "lora_unet_transformer_blocks_0_attn.to_q",
    "lora_unet_transformer_blocks_0_attn_to_q_",
    "lora_unet.transformer_blocks.0.attn.to_q",
    "lycoris_transformer_blocks.0.attn.to_q",
    "lycoris.transformer_blocks.0.attn.to_q",
    "lycoris_transformer_blocks_0_attn_to_q_",
    "lora_transformer_transformer_blocks.0.attn.to_q",
    "lora_diffusion_model_transformer_blocks_0_attn_to_q",
    "lora_unet_diffusion_model_transformer_blocks_0_attn_to_q",
    "transformer_blocks_0_attn_to_q",
    "diffusion_model.transformer_blocks_0_attn_to_q",
]


@pytest.mark.parametrize("stem", FLAT_SPELLINGS)
@pytest.mark.parametrize("ends", [("lora_down", "lora_up"), ("lora_A", "lora_B")])
def test_mixed_dots_and_underscores_are_only_renamed(stem, ends):
    state_dict = {f"{stem}.{ends[0]}.weight": torch.ones(2, 4)}
    state_dict |= {f"{stem}.{ends[1]}.weight": torch.ones(4, 2), f"{stem}.alpha": torch.ones(())}
    adapter = read_state_dict(state_dict)
    assert (set(adapter.modules), adapter.report.warnings) == ({TO_Q}, ())
    assert adapter.modules[TO_Q].scale == 0.5


FUSED = {
    "attn.to_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "attn.to_added_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "attn.add_qkv_proj": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("stem", ["transformer.transformer_blocks.2.{}", "lora_unet_{}"])
def test_fused_query_key_and_value_are_split_in_three_exactly(name, stem, write_file):
    if stem.startswith("lora_unet_"):
        stem = stem.format(f"transformer_blocks.2.{name}".replace(".", "_"))
    else:
        stem = stem.format(name)
    down, up = torch.randn(2, 4), torch.randn(12, 2)
    state_dict = {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
    state_dict |= {f"{stem}.alpha": torch.tensor(3.0), f"{stem}.diff_b": torch.arange(12.0)}
    for adapter in (read_state_dict(state_dict), read_adapter(write_file(state_dict))):
        members = [f"transformer_blocks.2.{member}" for member in FUSED[name]]
        assert list(adapter.modules) == members
        found = torch.cat([compute_delta(adapter.modules[member]) for member in members])
        torch.testing.assert_close(found, 1.5 * (up @ down))
        biases = torch.cat([adapter.modules[member].bias_delta for member in members])
        assert torch.equal(biases, torch.arange(12.0))
        assert "fused_split" in [f.kind for f in adapter.report.findings]
        assert adapter.report.warnings == ()


def test_a_module_beside_the_fused_one_is_used_and_reported(make_state_dict):
    alone = make_state_dict("ai-toolkit", [TO_Q])
    stem = "diffusion_model.transformer_blocks.0.attn.to_qkv"
    fused = {f"{stem}.lora_A.weight": torch.ones(2, 4), f"{stem}.lora_B.weight": torch.ones(12, 2)}
    adapter = read_state_dict(alone | fused)
    assert torch.equal(adapter.modules[TO_Q].delta(), read_state_dict(alone).modules[TO_Q].delta())
    assert "fused_repeated" in [finding.kind for finding in adapter.report.findings]


def test_a_fused_rotation_is_left_out_and_reported(make_state_dict):
    stem = "lora_unet_transformer_blocks_0_attn_to_qkv"
    report = read_state_dict(make_state_dict() | {f"{stem}.oft_blocks": torch.ones(4, 3, 3)}).report
    assert "cannot be split" in report.unmatched[0].reason


BOFT = {"lora_unet_transformer_blocks_0_attn_to_v.oft_blocks": torch.ones(2, 2, 2, 2)}


def test_boft_is_named_and_leaves_the_rest_usable(make_state_dict):
    report = read_state_dict(make_state_dict() | BOFT).report
    assert report.num_modules == 2
    assert "BOFT, which is not supported" in report.unmatched[0].reason
    alpha = {"lora_unet_transformer_blocks_0_attn_to_v.alpha": torch.ones(())}
    with pytest.raises(KeyFormatError, match="BOFT, which is not supported"):
        read_state_dict(alpha | BOFT)


@pytest.mark.parametrize(
    ("endings", "what"),
    [
        ((".weight", ".on_input"), "IA3"),
        ((".ia3_l",), "IA3"),
        ((".lora_down", ".lora_up"), "nunchaku"),
        ((".proj_down", ".proj_up", ".smooth"), "nunchaku"),
        ((".lora_A.weight", ".lora_B.weight", ".lora_E"), "AdaLoRA"),
    ],
)
def test_a_kind_that_is_not_supported_is_refused_by_its_name(endings, what):
    state_dict = {f"transformer_blocks.0.attn.to_q{end}": torch.ones(2, 2) for end in endings}
    with pytest.raises(KeyFormatError, match=what):
        read_state_dict(state_dict)


@pytest.mark.parametrize("ending", [".lora_E", ".lora_mid.weight", ".lora_diag", ".set_weight"])
def test_a_part_that_changes_its_modules_meaning_takes_the_module_with_it(ending, make_state_dict):
    state_dict = make_state_dict("ai-toolkit")
    state_dict[f"diffusion_model.{TO_Q}{ending}"] = torch.ones(2, 1)
    adapter = read_state_dict(state_dict)
    assert TO_Q not in adapter.modules
    assert len(adapter.report.unmatched) == 3


LONG_KEYS = {
    "many endings": ".oft_a" * 60_000 + "\n\n",
    "SDXL's blocks": "down_blocks." * 30_000,
    "anything": "x" * 3_000_000,
}


@pytest.mark.parametrize("key", LONG_KEYS.values(), ids=LONG_KEYS)
def test_an_overlong_key_costs_no_time_and_is_not_repeated_in_full(key, make_state_dict):
    report = read_state_dict(make_state_dict() | {key: torch.ones(2)}).report
    assert "more than 500 characters" in report.unmatched[0].reason
    assert len(report.to_text()) < 2000
    assert len(json.dumps(report.to_dict())) < 5000
    with pytest.raises(KeyFormatError) as error:
        read_state_dict({key: torch.ones(2)})
    assert len(str(error.value)) < 400


def test_a_key_with_a_trailing_line_break_is_a_different_key(make_state_dict):
    state_dict = make_state_dict("ai-toolkit")
    key = f"diffusion_model.{TO_Q}.lora_A.weight\n"
    report = read_state_dict(state_dict | {key: torch.full((2, 4), 9.0)}).report
    assert [dropped.key for dropped in report.unmatched] == [key]
    assert report.duplicates == ()
