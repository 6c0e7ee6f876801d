"""Which modules are chosen, the size of the file, and what is refused before anything runs."""

from __future__ import annotations

import pytest
import torch
from qwen_edit_lora.lora_core import (
    ConfigError,
    TargetError,
    write_adapter,
)
from qwen_edit_lora.lora_core.base_model import module_paths
from qwen_edit_lora.lora_core.base_model.qwen_image import ATTENTION_IMAGE, QWEN_IMAGE
from qwen_edit_lora.lora_core.injection.inject import LoraSettings, inject, plan_injection
from qwen_edit_lora.lora_core.injection.layers import LoraLinear

from .conftest import ALL, compute_loss


def test_inert_modules_of_the_last_block_are_left_out_by_name(model):
    plan = plan_injection(model, LoraSettings(rank=2, targets=("full + modulation",)))
    inert = {f"transformer_blocks.1.{name}" for name in QWEN_IMAGE.inert_last_block}
    assert set(plan.skipped) == inert
    assert len(plan.targets) == 2 * 14 - 4
    assert all("never get a gradient" in reason for reason in plan.skipped.values())


def test_exactly_the_inert_modules_would_get_no_gradient(model):
    """Exactly the modules the plan skips, checked on the base's own weights."""
    compute_loss(model).backward()
    silent = {
        f"{block}.{name}"
        for block in ("transformer_blocks.0", "transformer_blocks.1")
        for name in QWEN_IMAGE.block_linears
        if (grad := model.get_submodule(f"{block}.{name}").weight.grad) is None or not grad.any()
    }
    assert silent == set(plan_injection(model, LoraSettings(targets=("full",))).skipped)


def test_a_preset_covers_all_blocks_and_an_exclude_takes_some_away(model):
    settings = LoraSettings(targets=("image-stream",), exclude=("*.1.*", "img_mlp.net.2"))
    paths = [target.module_path for target in plan_injection(model, settings).targets]
    expected = [*ATTENTION_IMAGE, "img_mlp.net.0.proj"]
    assert paths == [f"transformer_blocks.0.{name}" for name in expected]


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("attn.to_q", 2),
        ("transformer_blocks.1.attn.to_q", 1),
        ("transformer_blocks.[01].attn.to_?", 6),
        ("*.to_out.0", 2),
        ("img_in", 1),
        ("*", 2 * 14 + 6 - 4),
    ],
)
def test_a_target_is_a_name_or_a_pattern(pattern, count, model):
    assert len(plan_injection(model, LoraSettings(targets=pattern)).targets) == count


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (LoraSettings(targets=("ful",)), "target 'ful' matches no module.*Did you mean full"),
        (LoraSettings(targets=("attn.to_qq",)), "Did you mean attn.to_q"),
        (LoraSettings(targets=("full", "to_q")), "'to_q' matches no module"),
        (LoraSettings(targets=("transformer_blocks.7.*",)), "Did you mean transformer_blocks"),
        (LoraSettings(exclude=(".*(_mod_).*",)), "exclude .* matches no module"),
        (LoraSettings(rank_pattern={"attn.to_x": 4}), "rank_pattern 'attn.to_x' matches no"),
        (LoraSettings(exclude=("full",)), "nothing is left to train: 'full' without 'full'"),
        (
            LoraSettings(targets=("transformer_blocks.1.attn.to_add_out",)),
            "selects only transformer_blocks.1.attn.to_add_out, but the model discards",
        ),
    ],
)
def test_an_error_for_targets_without_a_match_suggests_similar_names(settings, sentence, model):
    with pytest.raises(TargetError, match=sentence):
        inject(model, settings)
    assert not any(isinstance(module, LoraLinear) for module in model.modules())


def test_a_wrapper_is_distinguished_from_the_model(model):
    wrapper = torch.nn.ModuleDict({"transformer": model})
    with pytest.raises(TargetError, match=r"found transformer\.time_text_embed.* and \d+ more"):
        plan_injection(wrapper, LoraSettings())
    with pytest.raises(TargetError, match="found no Linear at all"):
        plan_injection(torch.nn.ReLU(), LoraSettings())


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"rank": 0}, "rank is 0; expected a whole number from 1"),
        ({"rank": 1.5}, "rank is 1.5; expected a whole number"),
        ({"rank": True}, "rank is True"),
        ({"rank_pattern": {"mlp": -1}}, "mlp is -1; expected a whole number"),
        ({"alpha": 0.0}, "alpha is 0.0; expected a number above 0"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"dropout": 1.0}, "dropout is 1.0; expected 0 to below 1"),
        ({"init": "zeros"}, "unknown initialisation 'zeros'; expected one of kaiming"),
        ({"targets": ()}, "no targets are given"),
    ],
)
def test_a_setting_outside_its_range_is_a_config_error(values, sentence):
    with pytest.raises(ConfigError, match=sentence):
        LoraSettings(**values)


def test_pissa_is_refused_where_a_module_has_too_few_singular_values(model):
    with pytest.raises(ConfigError, match="has 16 singular values, but PiSSA is asked for rank 17"):
        plan_injection(model, LoraSettings(rank=17, init="pissa"))


@pytest.mark.parametrize("key_format", ["comfyui", "kohya", "diffusers", "peft"])
@pytest.mark.parametrize("name", ["plain", "rslora", "rank_pattern", "dora", "pissa", "modulation"])
def test_the_file_size_is_known_before_anything_runs(name, key_format, model, tmp_path):
    plan = plan_injection(model, ALL[name])
    metadata = {"ss_comment": 'näch "ste" \n 写真 /', "modelspec.date": "2026-01-01"}
    for dtype in (torch.bfloat16, torch.float32):
        injection = inject(model, plan)
        adapter = injection.build_adapter("my edit", metadata, dtype)
        injection.eject()
        path = write_adapter(adapter, tmp_path / "my edit", key_format)
        title = path.parent.name if key_format == "peft" else path.stem
        expected = plan.compute_file_size(dtype, key_format, metadata, title)
        assert path.stat().st_size == expected
        path.unlink()


def test_the_sizes_of_the_real_model_are_those_of_the_survey():
    """60 blocks of full width on the meta device, without memory."""
    with torch.device("meta"):
        root = torch.nn.Module()
        for path in QWEN_IMAGE.list_module_paths():
            _, name = module_paths.split_path(path)
            if name in QWEN_IMAGE.block_linears:
                out, in_ = QWEN_IMAGE.compute_shape(name)
                plant(root, path, torch.nn.Linear(in_, out))
    plan = plan_injection(root, LoraSettings(rank=64))
    inert = 64 * sum(sum(QWEN_IMAGE.compute_shape(name)) for name in QWEN_IMAGE.inert_last_block)
    assert plan.num_parameters == QWEN_IMAGE.count_parameters("full", 64) - inert
    assert inert == pytest.approx(2.75e6, abs=5e3)
    assert plan.compute_file_size() == pytest.approx(849.3e6 - 2 * 2.75e6, rel=1e-3)


def plant(root, module_path, leaf):
    *parents, name = module_path.split(".")
    for parent in parents:
        if not hasattr(root, parent):
            root.add_module(parent, torch.nn.Module())
        root = getattr(root, parent)
    root.add_module(name, leaf)
