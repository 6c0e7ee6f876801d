"""Module paths, presets and block ranges of the Qwen-Image transformer."""

from __future__ import annotations

import pytest
from qwen_edit_lora.lora_core import (
    TARGET_PRESETS,
    TargetError,
    count_parameters,
    parse_block_ranges,
)
from qwen_edit_lora.lora_core.base_model import families, module_paths
from qwen_edit_lora.lora_core.base_model.qwen_image import QWEN_IMAGE

#: Modules in 60 blocks, and millions of parameters at rank 64 as measured on the real model.
SIZES = {
    "full": (720, 424.67),
    "attention": (480, 188.74),
    "image-attention": (240, 94.37),
    "image-stream": (360, 212.34),
    "text-stream": (360, 212.34),
    "mlp": (240, 235.93),
    "attention + image-mlp": (600, 306.71),
    "full + modulation": (840, 589.82),
    "attention + modulation": (600, 353.89),
    "image-stream + modulation": (420, 294.91),
    "modulation": (120, 165.15),
    "diffsynth": (720, 471.86),
}


def list_preset(preset, blocks=range(60)):
    return [
        f"transformer_blocks.{block}.{name}" for block in blocks for name in TARGET_PRESETS[preset]
    ]


def test_every_preset_has_a_known_size():
    assert set(TARGET_PRESETS) == set(SIZES)


@pytest.mark.parametrize("preset", SIZES)
def test_preset_sizes_are_those_of_the_real_model(preset):
    num_modules, millions = SIZES[preset]
    assert len(set(list_preset(preset))) == num_modules
    assert count_parameters(preset, 64) == pytest.approx(millions * 1e6, abs=5e3)
    assert count_parameters(preset, 16) * 4 == count_parameters(preset, 64)


def test_parameters_grow_with_the_number_of_blocks():
    assert count_parameters("full", 8, num_blocks=2) * 30 == count_parameters("full", 8)


def test_an_error_for_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(TargetError, match="unknown preset 'ful'; expected one of full, attention"):
        count_parameters("ful", 16)


@pytest.mark.parametrize("preset", SIZES)
def test_a_preset_is_recognised_by_its_modules(preset):
    assert QWEN_IMAGE.detect_preset([*list_preset(preset, range(2)), "img_in"]) == preset


@pytest.mark.parametrize("paths", [[], ["img_in"], ["transformer_blocks.0.attn.to_q"]])
def test_other_selections_are_not_presets(paths):
    assert QWEN_IMAGE.detect_preset(paths) is None


@pytest.mark.parametrize(
    ("text", "blocks"),
    [
        ("0", {0}),
        ("0-3", {0, 1, 2, 3}),
        ("0-2, 40", {0, 1, 2, 40}),
        (" 5 - 6 ,5,  5", {5, 6}),
        ("59-59", {59}),
    ],
)
def test_block_ranges_are_parsed(text, blocks):
    assert parse_block_ranges(text) == blocks


@pytest.mark.parametrize("text", ["", "  ", "\n"])
def test_no_block_range_means_every_block(text):
    assert parse_block_ranges(text) is None


@pytest.mark.parametrize(
    "text", ["a", "1-", "-1", "3-1", "1,,2", ",", "1 2", "1.5", "0-99999", "٣x"]
)
def test_an_error_for_a_bad_block_range_has_an_example(text):
    with pytest.raises(TargetError, match=r'is not a block range; expected .* such as "0-19, 40"'):
        parse_block_ranges(text)


@pytest.mark.parametrize(
    ("blocks", "text"),
    [([], ""), ([3], "3"), ([2, 1, 0, 40], "0-2, 40"), ([1, 3, 4, 9], "1, 3-4, 9"), ([1, 1], "1")],
)
def test_blocks_are_shown_as_ranges(blocks, text):
    assert module_paths.format_blocks(blocks) == text


@pytest.mark.parametrize("blocks", [{0}, {0, 1, 2, 59}, set(range(60)), set(range(0, 60, 2))])
def test_shown_ranges_parse_to_the_same_blocks(blocks):
    assert parse_block_ranges(module_paths.format_blocks(blocks)) == blocks


def test_no_two_modules_share_their_underscored_name():
    paths = QWEN_IMAGE.list_module_paths()
    assert len({path.replace(".", "_") for path in paths}) == len(paths) == 60 * 18 + 7


@pytest.mark.parametrize(
    "path", [*QWEN_IMAGE.list_module_paths(1), "transformer_blocks.59.img_mod.1"]
)
def test_dots_are_restored_for_every_module(path):
    assert families.restore_dots(path.replace(".", "_")) == path


@pytest.mark.parametrize(
    "name",
    [
        "",
        "transformer_blocks_0",
        "transformer_blocks_0_img_in",
        "attn_to_q",
        "transformer_blocks.0.attn.to_q",
    ],
)
def test_dots_are_not_restored_for_other_names(name):
    assert families.restore_dots(name) is None


@pytest.mark.parametrize(
    ("stream", "names"),
    [
        ("image", ["attn.to_out.0", "attn.norm_q", "img_mlp.net.2", "img_mod.1"]),
        ("text", ["attn.add_q_proj", "attn.to_add_out", "attn.norm_added_k", "txt_mlp.net.0.proj"]),
    ],
)
def test_a_block_module_belongs_to_its_stream(stream, names):
    paths = [f"transformer_blocks.7.{name}" for name in names]
    assert {QWEN_IMAGE.get_stream(path) for path in paths} == {stream}


@pytest.mark.parametrize(
    ("path", "stream"),
    [
        ("img_in", "image"),
        ("proj_out", "image"),
        ("norm_out.linear", "image"),
        ("txt_in", "text"),
        ("txt_norm", "text"),
        ("time_text_embed.timestep_embedder.linear_1", "both"),
    ],
)
def test_a_top_level_module_belongs_to_its_stream(path, stream):
    assert QWEN_IMAGE.get_stream(path) == stream


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("attn.to_q", (3072, 3072)),
        ("img_mlp.net.0.proj", (12288, 3072)),
        ("txt_mlp.net.2", (3072, 12288)),
        ("img_mod.1", (18432, 3072)),
        ("img_in", (3072, 64)),
        ("proj_out", (64, 3072)),
    ],
)
def test_shapes_are_out_by_in(name, shape):
    assert QWEN_IMAGE.compute_shape(name) == shape


def test_a_norm_has_no_linear_shape():
    with pytest.raises(TargetError, match=r"'attn.norm_q' is not a Linear"):
        QWEN_IMAGE.compute_shape("attn.norm_q")


def test_the_inert_modules_of_the_last_block_are_linears():
    assert set(QWEN_IMAGE.inert_last_block) < set(QWEN_IMAGE.block_linears)
