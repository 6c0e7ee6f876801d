"""A file that names a module twice: one source wins, the other is reported."""

from __future__ import annotations

import pytest
import torch
from qwen_edit_lora.lora_core import KeyFormatError, compute_delta, read_state_dict

TO_Q = "transformer_blocks.0.attn.to_q"
BLOCKS = [f"transformer_blocks.{block}.attn.to_q" for block in range(3)]


def shift(state_dict):
    """Different values under the same keys, so that a test shows which source was used."""
    return {key: tensor + 1 for key, tensor in state_dict.items()}


def test_the_prefix_with_more_modules_wins(make_state_dict):
    main = make_state_dict("musubi", BLOCKS)
    state_dict = shift(make_state_dict("ai-toolkit", [TO_Q])) | main
    adapter = read_state_dict(state_dict)
    assert torch.equal(
        adapter.modules[TO_Q].lora_A, main[f"lora_unet_{TO_Q.replace('.', '_')}.lora_down.weight"]
    )
    assert [key.key for key in adapter.report.duplicates] == [
        f"diffusion_model.{TO_Q}.lora_A.weight",
        f"diffusion_model.{TO_Q}.lora_B.weight",
    ]


def test_a_duplicate_is_reported_with_the_source_that_was_kept(make_state_dict):
    state_dict = make_state_dict("musubi", BLOCKS) | make_state_dict("ai-toolkit", [TO_Q])
    report = read_state_dict(state_dict).report
    assert report.duplicates[0].reason == f"also in lora_unet_{TO_Q}"


def test_the_adapter_name_with_more_modules_wins(make_state_dict):
    main = make_state_dict("peft-named", BLOCKS)
    adapter = read_state_dict(shift(make_state_dict("diffsynth", [TO_Q])) | main)
    assert torch.equal(adapter.modules[TO_Q].lora_A, main[f"{TO_Q}.lora_A.my_style.weight"])
    assert len(adapter.report.duplicates) == 2


def test_the_default_adapter_wins_a_tie(make_state_dict):
    main = make_state_dict("diffsynth", BLOCKS)
    adapter = read_state_dict(shift(make_state_dict("peft-named", BLOCKS)) | main)
    assert torch.equal(adapter.modules[TO_Q].lora_A, main[f"{TO_Q}.lora_A.default.weight"])


@pytest.mark.parametrize("order", ["A up B down", "down B up A", "up down B A"])
def test_two_spellings_under_one_prefix_are_never_combined(order, make_state_dict):
    both = make_state_dict("ai-toolkit", [TO_Q])
    both |= shift(make_state_dict("comfyui-native", [TO_Q]))
    keys = {end: f"diffusion_model.{TO_Q}.lora_{end}.weight" for end in order.split()}
    adapter = read_state_dict({keys[end]: both[keys[end]] for end in order.split()})
    assert torch.equal(adapter.modules[TO_Q].lora_A, both[keys["down"]])
    assert torch.equal(adapter.modules[TO_Q].lora_B, both[keys["up"]])
    assert {key.key for key in adapter.report.duplicates} == {keys["A"], keys["B"]}
    assert not torch.equal(both[keys["A"]], both[keys["down"]])


PAIRS = {
    "A, B": (".lora_A.weight", ".lora_B.weight"),
    "A, B without .weight": (".lora_A", ".lora_B"),
    "down, up": (".lora_down.weight", ".lora_up.weight"),
    "lora.down, lora.up": (".lora.down.weight", ".lora.up.weight"),
    "layer": (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    "_lora": ("_lora.down.weight", "_lora.up.weight"),
    "default": (".lora_A.default.weight", ".lora_B.default.weight"),
}


@pytest.mark.parametrize("stray", [(pair, end) for pair in PAIRS for end in (0, 1)], ids=str)
@pytest.mark.parametrize("whole", PAIRS)
def test_a_module_takes_both_factors_from_one_spelling(whole, stray):
    """A lora_A next to a whole pair of lora_down and lora_up has no part in the module, as in
    ComfyUI's loader (comfy/weight_adapter/lora.py)."""
    down, up = torch.randn(2, 6), torch.randn(8, 2)
    state_dict = {f"{TO_Q}{ending}": t for ending, t in zip(PAIRS[whole], (down, up), strict=True)}
    key = TO_Q + PAIRS[stray[0]][stray[1]]
    state_dict.setdefault(key, torch.ones_like((down, up)[stray[1]]))
    adapter = read_state_dict(state_dict)
    assert torch.allclose(compute_delta(adapter.modules[TO_Q]), up @ down)
    assert [d.key for d in adapter.report.duplicates] == ([] if stray[0] == whole else [key])


def test_factors_of_two_spellings_are_no_module():
    """ComfyUI's loader raises a KeyError."""
    state_dict = {
        f"{TO_Q}.lora_A.weight": torch.ones(2, 6),
        f"{TO_Q}.lora_up.weight": torch.ones(8, 2),
    }
    with pytest.raises(KeyFormatError, match=r"is incomplete: .* has only .*lora_A.weight"):
        read_state_dict(state_dict)


@pytest.mark.parametrize("whole", ["lokr_w1", "lokr_w2"])
@pytest.mark.parametrize("leftovers", ["ab", "a", "b"])
def test_parts_of_a_lokr_factor_that_is_also_whole_are_left_out_and_reported(whole, leftovers):
    """ComfyUI takes the whole one, so the rank is that of the other factor (lokr.py)."""
    other = "lokr_w2" if whole == "lokr_w1" else "lokr_w1"
    state_dict = {
        f"{TO_Q}.{whole}": torch.randn(4, 2),
        f"{TO_Q}.{other}_a": torch.randn(3, 3),
        f"{TO_Q}.{other}_b": torch.randn(3, 3),
        f"{TO_Q}.alpha": torch.tensor(3.0),
    }
    expected = compute_delta(read_state_dict(state_dict).modules[TO_Q])
    parts = {"a": torch.randn(4, 1), "b": torch.randn(1, 2)}
    unused = {f"{TO_Q}.{whole}_{end}": parts[end] for end in leftovers}
    adapter = read_state_dict(state_dict | unused)
    assert torch.equal(compute_delta(adapter.modules[TO_Q]), expected)
    assert adapter.modules[TO_Q].scale == 1
    assert [dropped.key for dropped in adapter.report.unmatched] == list(unused)
    assert not set(adapter.modules[TO_Q].parts) & {f"{whole}_a", f"{whole}_b"}


def test_one_alpha_serves_every_adapter_name(make_state_dict):
    state_dict = make_state_dict("diffsynth") | make_state_dict("peft-named")
    state_dict[f"{TO_Q}.alpha"] = torch.tensor(1.0)
    assert read_state_dict(state_dict).modules[TO_Q].scale == 0.5


def test_a_diff_beside_a_lora_is_left_out_and_reported(make_state_dict):
    key = f"diffusion_model.{TO_Q}.diff"
    adapter = read_state_dict(make_state_dict() | {key: torch.ones(4, 4)})
    assert adapter.modules[TO_Q].kind == "LoRA"
    assert [dropped.key for dropped in adapter.report.unmatched] == [key]


def make_pruned_file(make_state_dict, **parts):
    """A module of rank 0, and one that is whole."""
    return (
        make_state_dict("ai-toolkit", ["img_in"])
        | {
            f"diffusion_model.{TO_Q}.lora_A.weight": torch.zeros(0, 4),
            f"diffusion_model.{TO_Q}.lora_B.weight": torch.zeros(4, 0),
        }
        | {f"diffusion_model.{TO_Q}.{part}": tensor for part, tensor in parts.items()}
    )


def test_a_module_of_rank_0_adds_nothing_and_is_noted(make_state_dict):
    adapter = read_state_dict(make_pruned_file(make_state_dict, alpha=torch.tensor(1.0)))
    assert list(adapter.modules) == ["img_in"]
    (note,) = [f for f in adapter.report.findings if f.kind == "rank_zero"]
    assert (note.severity, note.count, adapter.report.warnings) == ("note", 1, ())


def test_a_module_of_rank_0_keeps_its_change_of_the_bias(make_state_dict):
    """ComfyUI adds it whatever the LoRA is (comfy/lora.py, load_lora)."""
    bias = torch.arange(4.0)
    adapter = read_state_dict(make_pruned_file(make_state_dict, diff_b=bias))
    weights = adapter.modules[TO_Q]
    assert weights.kind == "diff"
    assert torch.equal(weights.bias_delta, bias)
    assert "diff" not in weights.parts


@pytest.mark.parametrize(
    ("part", "value"), [("dora_scale", torch.ones(4, 1)), ("lora_B.bias", torch.ones(4))]
)
def test_what_depends_on_a_lora_of_rank_0_is_reported(part, value, make_state_dict):
    adapter = read_state_dict(make_pruned_file(make_state_dict, **{part: value}))
    assert list(adapter.modules) == ["img_in"]
    (dropped,) = adapter.report.unmatched
    assert (dropped.key, dropped.reason) == (
        f"diffusion_model.{TO_Q}.{part}",
        "depends on its module's LoRA, which has rank 0",
    )


def make_messy_files(make_state_dict):
    lora = make_state_dict("ai-toolkit", BLOCKS, alpha=1.0)
    named = make_state_dict("diffsynth", BLOCKS, alpha=1.0) | make_state_dict("peft-named", BLOCKS)
    return {
        "clean": lora,
        "two prefixes": lora | make_state_dict("musubi", BLOCKS[:1], alpha=1.0),
        "two names": named,
        "two names beside a prefix": named | make_state_dict("ai-toolkit", [*BLOCKS, "img_in"]),
        "two spellings": lora | make_state_dict("comfyui-native", BLOCKS, alpha=2.0),
        "unknown": lora | {"img_out.lora_A.weight": torch.ones(2, 4), "x": torch.ones(1)},
        "orphans": lora | {"img_in.alpha": torch.ones(1), "txt_in.dora_scale": torch.ones(4)},
        "useless": lora | {f"diffusion_model.{TO_Q}.hada_w1_a": torch.ones(4, 2)},
        "oft with magnitude": make_state_dict(kind="OFT", alpha=0.0)
        | {f"diffusion_model.{TO_Q}.dora_scale": torch.ones(4)},
        "a stray factor": lora | {f"diffusion_model.{TO_Q}.lora_up.weight": torch.ones(4, 4)},
        "rank 0 with magnitude": make_pruned_file(make_state_dict, dora_scale=torch.ones(4, 1)),
        "diff with alpha": make_state_dict(kind="diff", alpha=1.0),
    }


MESSY = list(make_messy_files(lambda *args, **kwargs: {}))


@pytest.mark.parametrize("case", MESSY)
def test_every_key_is_counted_once(case, make_state_dict):
    state_dict = make_messy_files(make_state_dict)[case]
    report = read_state_dict(state_dict).report
    dropped = [key.key for key in (*report.unmatched, *report.duplicates)]
    assert len(set(dropped)) == len(dropped)
    assert report.num_matched_keys + len(dropped) == report.num_keys == len(state_dict)
    assert (dropped == []) == (case == "clean")


def test_an_alpha_without_its_module_is_reported_and_the_rest_loads(make_state_dict):
    adapter = read_state_dict(make_state_dict() | {"diffusion_model.img_in.alpha": torch.ones(1)})
    assert "img_in" not in adapter.modules
    assert [key.key for key in adapter.report.unmatched] == ["diffusion_model.img_in.alpha"]


PREFIXES = ("", "diffusion_model.", "transformer.", "base_model.model.", "lora_unet_", "lycoris_")


def respell(prefix: str, module_path: str) -> str:
    return prefix + (module_path.replace(".", "_") if prefix.endswith("_") else module_path)


@pytest.mark.parametrize("other", PREFIXES)
@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("part", ["alpha", "dora_scale"])
def test_an_alpha_or_magnitude_under_another_prefix_joins_its_module(prefix, other, part):
    state_dict = {}
    for path in BLOCKS:
        stem = respell(prefix, path)
        state_dict |= {
            f"{stem}.lora_A.weight": torch.ones(4, 4),
            f"{stem}.lora_B.weight": torch.ones(4, 4),
        }
        number = torch.tensor(2.0) if part == "alpha" else torch.ones(4, 1)
        state_dict[f"{respell(other, path)}.{part}"] = number
    adapter = read_state_dict(state_dict)
    assert set(adapter.modules) == set(BLOCKS)
    assert (adapter.report.unmatched, adapter.report.duplicates) == ((), ())
    scales = {weights.scale for weights in adapter.modules.values()}
    assert scales == ({0.5} if part == "alpha" else {1.0})
    assert adapter.kinds == ({"LoRA"} if part == "alpha" else {"DoRA"})
    kinds = [finding.kind for finding in adapter.report.findings]
    assert ("other_prefix" in kinds) == (prefix != other)


def test_alphas_of_a_second_adapter_stay_with_their_own_weights(make_state_dict):
    main = make_state_dict("musubi", BLOCKS)
    second = make_state_dict("ai-toolkit", [TO_Q], alpha=7.0)
    adapter = read_state_dict(main | second)
    assert adapter.modules[TO_Q].scale == 1.0
    assert len(adapter.report.duplicates) == 3


def test_a_source_without_prefix_is_reported_as_such(make_state_dict):
    state_dict = make_state_dict("lightning", BLOCKS) | make_state_dict("ai-toolkit", [TO_Q])
    report = read_state_dict(state_dict).report
    assert report.duplicates[0].reason == f"also in {TO_Q}, without prefix"
