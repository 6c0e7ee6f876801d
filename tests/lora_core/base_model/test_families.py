"""The tables of the families, against diffusers' classes, and how a file's family is found."""

from __future__ import annotations

import pytest
import torch
from qwen_edit_lora.lora_core import FAMILIES, Family, count_parameters
from qwen_edit_lora.lora_core.base_model import families
from qwen_edit_lora.lora_core.base_model.families import detect_family
from qwen_edit_lora.lora_core.base_model.qwen_image import QWEN_IMAGE
from qwen_edit_lora.lora_core.base_model.qwen_image_21 import QWEN_IMAGE_21

CLASSES = {
    "qwen-image": "QwenImageTransformer2DModel",
    "qwen-image-2.1": "QwenImage21Transformer2DModel",
}
SHARED = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.name)
def family(request) -> Family:
    return request.param


@pytest.fixture(scope="module")
def model(family) -> torch.nn.Module:
    """diffusers' model of the family at full width, with two blocks and no data."""
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        return getattr(diffusers, CLASSES[family.name])(num_layers=2)


def test_the_modules_of_a_family_are_those_with_a_weight_in_diffusers(family, model):
    weights = {key.removesuffix(".weight") for key in model.state_dict() if key.endswith("weight")}
    assert weights == set(family.list_module_paths(num_blocks=2))


def test_the_shapes_of_a_family_are_those_of_diffusers(family, model):
    linears = {
        path: (module.out_features, module.in_features)
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    inside = {
        f"transformer_blocks.{block}.{name}": shape
        for block in range(2)
        for name, shape in family.block_linears.items()
    }
    assert linears == {**inside, **family.top_linears}


def test_the_number_of_blocks_of_a_family_is_that_of_diffusers(family):
    diffusers = pytest.importorskip("diffusers")
    import inspect

    signature = inspect.signature(getattr(diffusers, CLASSES[family.name]).__init__)
    assert signature.parameters["num_layers"].default == family.num_blocks


def test_presets_streams_labels_and_fusions_name_modules_of_the_family(family):
    named = {
        *(name for preset in family.presets.values() for name in preset),
        *family.inert_last_block,
        *family.labels,
        *(member for fusion in family.fused.values() for member in fusion.members),
    }
    assert named <= family.block_linears.keys()
    assert family.streams.keys() <= family.names
    assert family.mlp_fusion is None or family.mlp_fusion in family.fused


def test_the_members_of_a_fusion_have_one_shape(family):
    for fusion in family.fused.values():
        assert len({family.block_linears[member] for member in fusion.members}) == 1


@pytest.mark.parametrize(
    ("preset", "num_modules", "megabytes"),
    [("attention", 128, 134.2), ("mlp", 96, 201.3), ("full", 224, 335.5)],
)
def test_sizes_of_rank_64_are_those_of_published_files(preset, num_modules, megabytes):
    assert len(QWEN_IMAGE_21.presets[preset]) * 32 == num_modules
    parameters = count_parameters(preset, 64, family=QWEN_IMAGE_21)
    assert 2 * parameters / 1e6 == pytest.approx(megabytes, abs=0.05)


def test_no_two_modules_share_their_underscored_name(family):
    paths = family.list_module_paths(1)
    assert len({path.replace(".", "_") for path in paths}) == len(paths)


def test_dots_are_restored_for_every_module_and_fused_module(family):
    fused = [f"transformer_blocks.1.{name}" for name in family.fused]
    for path in (*family.list_module_paths(2), *fused):
        assert families.restore_dots(path.replace(".", "_")) == path


def test_every_module_tells_its_family_or_is_in_several(family):
    for path in family.list_module_paths(1):
        owners = [one for one in FAMILIES if one.is_known(path)]
        expected = family if len(owners) == 1 else None
        assert families.detect_by_names([path]) is expected


def test_a_name_of_one_family_tells_more_than_shapes_and_blocks(family):
    own = next(n for n in family.block_linears if families.detect_by_names([_in_block(n)]))
    other = next(one for one in FAMILIES if one is not family)
    shapes = {_in_block(name): other.compute_shape(name) for name in SHARED}
    assert detect_family({**shapes, _in_block(own): None}) is family


def test_shapes_tell_where_names_do_not(family):
    shapes = {_in_block(name): family.compute_shape(name) for name in SHARED}
    assert detect_family(shapes) is family
    assert detect_family({path: shape[:1] for path, shape in shapes.items()}) is family


def test_the_number_of_blocks_tells_where_names_and_shapes_do_not():
    shapes = {f"transformer_blocks.32.{name}": (8, 8) for name in SHARED}
    assert detect_family(shapes) is QWEN_IMAGE


@pytest.mark.parametrize(
    "shapes", [{}, {"img_in": None}, {"transformer_blocks.31.attn.to_q": (8, 8)}]
)
def test_nothing_to_tell_is_no_family(shapes):
    assert detect_family(shapes) is None


def test_every_module_of_a_block_serves_text_and_image_in_one_stream():
    names = QWEN_IMAGE_21.block_linears
    assert {QWEN_IMAGE_21.get_stream(_in_block(name)) for name in names} == {"both"}
    assert QWEN_IMAGE_21.get_stream("txt_in.in_layer") == "text"
    assert QWEN_IMAGE_21.get_stream("proj_out") == "image"


def _in_block(name: str) -> str:
    return f"transformer_blocks.0.{name}"
