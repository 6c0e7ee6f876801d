"""PEFT as oracle: its merged weights against our deltas, reading and writing its folder."""

from __future__ import annotations

import copy

import pytest
import torch
from qwen_edit_lora.lora_core import (
    KeyFormatError,
    compute_delta,
    read_adapter,
    read_state_dict,
    write_adapter,
)
from qwen_edit_lora.lora_core.base_model import module_paths
from qwen_edit_lora.lora_core.base_model.qwen_image import QWEN_IMAGE

peft = pytest.importorskip("peft")

WIDTH = 8
MODULES = [
    *(
        f"transformer_blocks.{block}.{name}"
        for block in range(2)
        for name in QWEN_IMAGE.block_linears
    ),
    "norm_out.linear",
]

CONFIGS = {
    "plain": {"lora_alpha": 6},
    "rslora": {"lora_alpha": 6, "use_rslora": True},
    "alpha_pattern": {"lora_alpha": 6, "alpha_pattern": {"to_q": 10, r".*\.1\.attn\.to_k": 3}},
    "rank_pattern": {"lora_alpha": 6, "rank_pattern": {"img_mlp.net.2": 2}},
    "rslora with patterns": {
        "lora_alpha": 5,
        "use_rslora": True,
        "rank_pattern": {"img_mlp.net.2": 2, "to_v": 5},
        "alpha_pattern": {"to_q": 7, "img_mlp.net.2": 1},
    },
    "dora": {"lora_alpha": 6, "use_dora": True},
    "dora with rslora": {"lora_alpha": 6, "use_dora": True, "use_rslora": True},
    "lora_bias": {"lora_alpha": 6, "lora_bias": True},
    "lora_bias with rslora": {"lora_alpha": 6, "lora_bias": True, "use_rslora": True},
}


def plant(root: torch.nn.Module, module_path: str, leaf: torch.nn.Module) -> None:
    """Adds `leaf` under a dotted path, with plain modules in between."""
    *parents, name = module_path.split(".")
    for parent in parents:
        if not hasattr(root, parent):
            root.add_module(parent, torch.nn.Module())
        root = getattr(root, parent)
    root.add_module(name, leaf)


@pytest.fixture(scope="module")
def base() -> torch.nn.Module:
    """Linears of two Qwen-Image blocks under their own names, in a model of width 8."""
    torch.manual_seed(0)
    root = torch.nn.Module()
    for path in MODULES:
        block, name = module_paths.split_path(path)
        shape = (WIDTH, WIDTH) if block is None else QWEN_IMAGE.compute_shape(name, WIDTH)
        plant(root, path, torch.nn.Linear(shape[1], shape[0]))
    return root


@pytest.fixture(params=CONFIGS)
def trained(request, base):
    """A PEFT model whose adapter is random, so that no part of it is at its initial value."""
    config = peft.LoraConfig(r=4, target_modules=MODULES, **CONFIGS[request.param])
    model = peft.get_peft_model(copy.deepcopy(base), config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = noise if "magnitude" not in name else noise.abs() + 0.1
    return model


def assert_same_change(adapter, base, merged):
    for path in MODULES:
        before, after = base.get_submodule(path), merged.get_submodule(path)
        weights = adapter.modules[path]
        delta = compute_delta(weights, before.weight.detach())
        torch.testing.assert_close(
            delta, (after.weight - before.weight).detach(), atol=2e-5, rtol=0
        )
        bias_delta = torch.zeros_like(before.bias)
        if weights.bias_delta is not None:
            bias_delta = weights.bias_delta
        torch.testing.assert_close(bias_delta, (after.bias - before.bias).detach())


def test_a_folder_saved_by_peft_reads_as_what_peft_merges(trained, base, tmp_path):
    trained.save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path)
    assert adapter.key_format == "peft"
    assert (adapter.report.unmatched, adapter.report.duplicates) == ((), ())
    assert_same_change(adapter, base, trained.merge_and_unload())


def test_the_file_inside_a_peft_folder_reads_like_the_folder(trained, tmp_path):
    trained.save_pretrained(tmp_path)
    folder = read_adapter(tmp_path)
    file = read_adapter(tmp_path / "adapter_model.safetensors")
    assert {p: w.scale for p, w in folder.modules.items()} == {
        p: w.scale for p, w in file.modules.items()
    }


@pytest.mark.parametrize("name", ["default", "my_style"])
def test_a_dump_of_peft_parameters_reads_under_any_adapter_name(name, base):
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=MODULES, use_dora=True)
    model = peft.get_peft_model(copy.deepcopy(base), config, adapter_name=name)
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            torch.nn.init.normal_(parameter)
    state_dict = {k: v.detach().clone() for k, v in model.state_dict().items() if "lora_" in k}
    adapter = read_state_dict(state_dict)
    assert set(adapter.kinds) == {"DoRA"}
    assert_same_change(adapter, base, model.merge_and_unload())


WRITABLE = [name for name in CONFIGS if "lora_bias" not in name]


@pytest.mark.parametrize("trained", WRITABLE, indirect=True)
def test_a_folder_we_write_loads_in_peft_with_the_same_effect(trained, base, tmp_path):
    trained.save_pretrained(tmp_path / "theirs")
    adapter = read_adapter(tmp_path / "theirs")
    write_adapter(adapter, tmp_path / "ours", "peft")
    model = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
    assert_same_change(adapter, base, model.merge_and_unload())


def test_a_lycoris_dora_written_for_peft_keeps_its_effect(make_state_dict, tmp_path):
    state_dict = make_state_dict("musubi", MODULES[:14], rank=2, alpha=3.0, kind="DoRA")
    adapter = read_state_dict(state_dict)
    torch.manual_seed(0)
    root = torch.nn.Module()
    for path, weights in adapter.modules.items():
        plant(root, path, torch.nn.Linear(*reversed(weights.shape)))
    write_adapter(adapter, tmp_path, "peft")
    merged = peft.PeftModel.from_pretrained(copy.deepcopy(root), tmp_path).merge_and_unload()
    for path, weights in adapter.modules.items():
        before = root.get_submodule(path).weight.detach()
        expected = merged.get_submodule(path).weight.detach() - before
        torch.testing.assert_close(compute_delta(weights, before), expected, atol=2e-5, rtol=0)


LYCORIS = {
    "LoHa": lambda **more: peft.LoHaConfig(r=2, target_modules=MODULES, **more),
    "LoKr": lambda **more: peft.LoKrConfig(r=2, target_modules=MODULES, **more),
    "LoKr of whole factors": lambda **more: peft.LoKrConfig(r=9, target_modules=MODULES, **more),
    "LoKr of two products": lambda **more: peft.LoKrConfig(
        r=1, decompose_both=True, decompose_factor=4, target_modules=MODULES, **more
    ),
}


@pytest.mark.parametrize("kind", LYCORIS)
@pytest.mark.parametrize(
    "more", [{"alpha": 3}, {"alpha": 2, "alpha_pattern": {"to_q": 7, r".*\.1\.attn\.to_k": 5}}]
)
def test_pefts_own_loha_and_lokr_are_scaled_by_their_config(kind, more, base, tmp_path):
    model = peft.get_peft_model(copy.deepcopy(base), LYCORIS[kind](**more))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lokr_" in name or "hada_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) / 2
    model.save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path)
    assert adapter.report.warnings == ()
    assert_same_change(adapter, base, model.merge_and_unload())


@pytest.mark.parametrize("start", ["pissa", "olora", "pissa_niter_4"])
def test_an_initialization_that_changed_the_base_is_refused_until_peft_converts_it(
    start, base, tmp_path
):
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=MODULES, init_lora_weights=start)
    model = peft.get_peft_model(copy.deepcopy(base), config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = start
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += torch.randn(parameter.shape) / 10
    model.save_pretrained(tmp_path / "raw")
    with pytest.raises(KeyFormatError, match="which moved part of the model into the LoRA"):
        read_adapter(tmp_path / "raw")
    model.save_pretrained(
        tmp_path / "converted", path_initial_model_for_weight_conversion=tmp_path / "start"
    )
    adapter = read_adapter(tmp_path / "converted")
    assert_same_change(adapter, base, model.merge_and_unload())
