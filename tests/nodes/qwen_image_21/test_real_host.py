"""What only a ComfyUI with its own Qwen-Image-2.1 can show, 0.37 and later.

Its detection and modules, its key map, its prefix cache, its nodes. In an older one, where the
other tests of this folder run on diffusers' class, these are skipped.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from demo_base import dit_21

from ..conftest import worst
from .test_apply import LINEARS, OUT, ROUNDING, build_adapter
from .test_spellings import write_spelled

pytestmark = pytest.mark.comfy


@pytest.fixture(autouse=True)
def own_2_1(comfyui: SimpleNamespace) -> None:
    if importlib.util.find_spec("comfy.ldm.qwen_image21") is None:
        pytest.skip("this ComfyUI has no Qwen-Image-2.1 of its own, which comes with 0.37")


@pytest.fixture
def count_block_calls(
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[Any], list[int]]:
    """The number of tokens in each call of a model's first block."""

    def watch(model: Any) -> list[int]:
        block, sizes = model.model.diffusion_model.transformer_blocks[0], []
        forward = block.forward

        def record(tokens: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            sizes.append(tokens.shape[1])
            return forward(tokens, *args, **kwargs)

        monkeypatch.setitem(block.__dict__, "forward", record)
        return sizes

    return watch


def switch_cache_off(model: Any) -> Any:
    model = model.clone()
    options = model.model_options.setdefault("transformer_options", {})
    options["qwen_image21_cache"] = {"device": "off", "dtype": "default"}
    return model


def test_comfyui_builds_its_own_modules(load_21, ours):
    model = load_21("fused")
    assert type(model.model.diffusion_model).__module__.startswith("comfy.ldm.qwen_image21")
    assert ours.matching.match_adapter(model, build_adapter()).paths == set(LINEARS)


def test_a_side_path_is_exact_with_the_prefix_cache(
    load_21, sample_21, apply_ours, count_block_calls
):
    base = load_21("fused")
    model = apply_ours(base, build_adapter(), 0.7, "side path")
    sizes = count_block_calls(base)
    cached = sample_21(model, steps=3)
    prefix, target = 9 + 48, 48
    assert sizes == [prefix, target, target, target]
    sizes.clear()
    assert worst(sample_21(switch_cache_off(model), steps=3), cached) < ROUNDING
    assert sizes == [prefix + target] * 3


def test_no_prefix_of_one_strength_is_used_at_another(load_21, sample_21, apply_ours):
    base, adapter = load_21("fused"), build_adapter()
    alone = [sample_21(apply_ours(load_21("fused"), adapter, s)) for s in (0.3, 0.9)]
    both = [sample_21(apply_ours(base, adapter, s)) for s in (0.3, 0.9)]
    assert all(torch.equal(a, b) for a, b in zip(alone, both, strict=True))


def test_every_module_runs_in_every_layout(base_21, sample_21, apply_ours, ours):
    model = apply_ours(base_21, build_adapter(), 0.7, "side path")
    sample_21(model)
    assert ours.side_path.get_side_path(model).findings == ()


def test_out_is_served_in_the_int8_kernel(load_21, sample_21, apply_ours):
    base = load_21("int8_convrot")
    before = sample_21(base)
    assert worst(sample_21(apply_ours(base, build_adapter(OUT), 0.7)), before) > 100 * ROUNDING
    assert torch.equal(sample_21(base), before)


@pytest.mark.parametrize("spelling", ["bare", "DiffSynth", "transformer", "lycoris"])
def test_comfyui_reads_these_split_files_whole_on_a_fused_base(
    spelling, load_21, sample_21, apply_native, apply_ours, tmp_path
):
    base = load_21("fused")
    path = write_spelled(tmp_path / "a.safetensors", spelling, "split")
    expected = sample_21(apply_native(base, path, 0.7))
    assert worst(sample_21(apply_ours(base, path, 0.7, "side path")), expected) < ROUNDING


def test_a_recorded_model_runs_without_the_cache(load_21, conditioning_21, count_block_calls):
    from qwen_edit_lora.nodes.sweeping.effect_measure import measure_effect

    base = load_21("fused")
    sizes = count_block_calls(base)
    latent = {"samples": torch.zeros(1, dit_21.CHANNELS, 8, 6)}
    with torch.inference_mode():
        measure_effect(base, build_adapter(), conditioning_21, latent, (0.0, 1.0), (0.8, 0.3))
    assert sizes == [9 + 48 + 48] * 4


def test_the_nodes_of_the_template_exist_with_its_inputs(executor, comfyui):
    """Those that this extension does not define itself."""
    import asyncio

    from comfy_extras import nodes_qwen

    async def list_schemas() -> dict[str, Any]:
        extension = await nodes_qwen.comfy_entrypoint()
        nodes = await extension.get_node_list()
        return {node.GET_SCHEMA().node_id: node.GET_SCHEMA() for node in nodes}

    schemas = asyncio.run(list_schemas())
    encode, cache = schemas["TextEncodeQwenImage21"], schemas["QwenImage21Cache"]
    assert {one.id for one in encode.inputs} >= {"clip", "vae", "prompt", "resolution", "images"}
    assert [one.id for one in cache.inputs] == ["model", "device", "dtype"]
