"""What ComfyUI does with a MODEL besides sampling it: paging, offloading, cloning, caching."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from demo_base.dit import WIDTH
from demo_base.fake_gpu import PagedMemory, page_on_the_cpu
from qwen_edit_lora.lora_core import (
    Adapter,
    DiffWeights,
    DoraWeights,
    LohaWeights,
    LokrWeights,
    LoraWeights,
    ModuleWeights,
    OftWeights,
    compute_delta,
    read_adapter,
)
from safetensors.torch import load_file

from .conftest import worst

pytestmark = pytest.mark.comfy

ROUNDING = 1e-5
PATH = "transformer_blocks.0.img_mlp.net.0.proj"  # large enough to be paged


@pytest.fixture(params=[True, False], ids=["room", "no room"])
def dynamic_vram(request, comfyui: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> PagedMemory:
    """ComfyUI's dynamic VRAM as on an NVIDIA GPU, with all its memory on the CPU."""
    management = comfyui.model_management
    if not management.is_device_cpu(management.get_torch_device()):
        pytest.skip("a GPU has pages of its own: test_patchers.py runs on those")
    memory = PagedMemory(has_room=request.param)
    memory.install(monkeypatch, comfyui)
    page_on_the_cpu(monkeypatch, comfyui.ops)
    monkeypatch.setattr(comfyui.utils, "load_safetensors", lambda path: (load_file(path), {}))
    cudart = SimpleNamespace(
        cudaHostRegister=lambda *a: int(a[1] == 0),  # as CUDA refuses an empty range
        cudaHostUnregister=lambda *a: 0,
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    monkeypatch.setattr(management, "discard_cuda_async_error", lambda: None)
    monkeypatch.setattr(management, "MAX_PINNED_MEMORY", 1024**3)
    monkeypatch.setattr(management, "TOTAL_PINNED_MEMORY", 0)
    return memory


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.1


def build(kind: str) -> Adapter:
    """An adapter on one module, large enough to be paged."""
    columns, rows = WIDTH, 4 * WIDTH
    lora = LoraWeights(draw(128, columns), draw(rows, 128, seed=1), 64.0, draw(rows, seed=2))
    weights = {
        "LoRA": lora,
        "LoKr": LokrWeights(w1=draw(4, 1), w2=draw(columns, columns, seed=1)),
        "LoHa": LohaWeights(
            *(draw(rows, 16), draw(16, columns, seed=1)),
            *(draw(rows, 16, seed=2), draw(16, columns, seed=3)),
        ),
        "diff": DiffWeights(draw(rows, columns), draw(rows, seed=1)),
        "DoRA": DoraWeights(lora, draw(rows, 1, seed=2).abs() + 0.5),
        "OFT": OftWeights(draw(rows // 8, 8, 8), draw(rows, 1, seed=3) + 1),
    }[kind]
    return Adapter({PATH: weights}, name=kind)


def add_delta(
    model: Any, weights: ModuleWeights, strength: float, base_weight: torch.Tensor | None = None
) -> Any:
    """A clone with the delta as ComfyUI's simplest patch."""
    tuned = model.clone()
    patches = {f"diffusion_model.{PATH}.weight": ("diff", (compute_delta(weights, base_weight),))}
    if weights.bias_delta is not None:
        patches[f"diffusion_model.{PATH}.bias"] = ("diff", (weights.bias_delta,))
    tuned.add_patches(patches, strength)
    return tuned


@pytest.mark.parametrize("kind", ["LoRA", "LoKr", "LoHa", "diff"])
def test_a_side_path_works_under_dynamic_vram(
    kind, dynamic_vram, load_base, sample, apply_ours, ours
):
    model = load_base("2509_fp32")
    assert model.is_dynamic()
    adapter = build(kind)
    before = sample(model)
    first = apply_ours(model, adapter, 0.7)
    result = sample(first)
    bank = ours.side_path.get_side_path(first).get_bank()
    assert bank.patcher.is_dynamic()
    assert worst(result, sample(add_delta(model, adapter.modules[PATH], 0.7))) < ROUNDING
    assert worst(result, before) > 100 * ROUNDING
    assert torch.equal(sample(first), result)
    assert torch.equal(sample(model), before)


def list_pages(bank: Any) -> list[tuple]:
    return [module._v for module in bank.modules() if hasattr(module, "_v")]


def test_every_site_is_one_page_and_is_released(
    dynamic_vram, load_base, sample, make_lora, apply_native, apply_ours, ours
):
    model = load_base("2509_fp32")
    first, second = make_lora("a", seed=1, rank=64), make_lora("b", seed=2, rank=40)
    expected = sample(apply_native(apply_native(model, first, 0.7), second, -0.5))
    before = sample(model)
    tuned = apply_ours(apply_ours(model, first, 0.7), second, -0.5)
    sample(tuned)  # loads the pages
    assert dynamic_vram.pinned == 0
    dynamic_vram.faults.clear()
    assert worst(sample(tuned), expected) < ROUNDING
    assert worst(expected, before) > 100 * ROUNDING
    bank = ours.side_path.get_side_path(tuned).get_bank().module
    pages = list_pages(bank)
    assert len(pages) == len(bank.sites) == 24
    num_calls = 2  # steps, at cfg 1
    counts = [sum(page is fault for fault in dynamic_vram.faults) for page in pages]
    assert counts == [num_calls] * len(pages)
    assert dynamic_vram.pinned == 0
    assert torch.equal(sample(model), before)


def test_the_bank_is_evicted_last_from_a_full_card(
    dynamic_vram, load_base, sample, make_lora, apply_ours, ours
):
    model = load_base("2509_fp32")
    tuned = apply_ours(model, make_lora("a", rank=64), 0.7)
    for _ in range(2):  # loading the model again must not put it above the bank either
        sample(tuned)
        bank = ours.side_path.get_side_path(tuned).get_bank().patcher
        assert dynamic_vram.priorities[-1] is bank._vbar_get()
        assert model._vbar_get() in dynamic_vram.priorities
        sample(model)
        assert dynamic_vram.priorities[-1] is model._vbar_get()


def test_a_comfyui_without_such_pages_is_unaffected(ours, base):
    ours.host.prioritize(base)  # no dynamic VRAM
    ours.host.prioritize(SimpleNamespace(_vbar_get=lambda: None))
    ours.host.prioritize(SimpleNamespace(_vbar_get=object))  # pages of another interface


@pytest.mark.parametrize("kind", ["DoRA", "OFT", "LoKr", "LoHa", "LoRA"])
def test_merging_works_under_dynamic_vram(kind, dynamic_vram, load_base, sample, apply_ours):
    model = load_base("2509_fp32")
    weights = build(kind).modules[PATH]
    base_weight = model.model.diffusion_model.get_submodule(PATH).weight.detach().clone()
    before = sample(model)
    # First of all patches: ComfyUI's pinned memory for patches is still empty then.
    result = sample(apply_ours(model, build(kind), 0.7, "merge"))
    assert worst(result, sample(add_delta(model, weights, 0.7, base_weight))) < ROUNDING
    assert worst(result, before) > 100 * ROUNDING
    assert torch.equal(sample(model), before)


@pytest.mark.parametrize("kind", ["LoRA", "LoKr", "LoHa", "diff"])
@pytest.mark.parametrize("share", [0.05, 0.5])
def test_a_partly_loaded_bank_works_over_a_partly_loaded_and_patched_base(
    share, kind, base, sample, make_lora, apply_native, apply_ours, ours, comfyui, monkeypatch
):
    adapter = build(kind)
    patched = apply_native(base, make_lora("native", seed=4), 0.6)
    expected = sample(apply_ours(patched, adapter, 0.7))
    comfyui.model_management.unload_all_models()
    partially_load = comfyui.model_patcher.ModelPatcher.partially_load

    def load_partly(self, device_to, extra_memory=0, force_patch_weights=False):
        return partially_load(self, device_to, share * self.model_size(), force_patch_weights)

    monkeypatch.setattr(comfyui.model_patcher.ModelPatcher, "partially_load", load_partly)
    model = apply_ours(patched, adapter, 0.7)
    assert worst(sample(model), expected) < ROUNDING
    bank = ours.side_path.get_side_path(model).get_bank().patcher
    assert model.model.model_lowvram
    assert bank.model.model_lowvram
    bank.partially_unload(bank.offload_device, 1e9)
    assert worst(sample(model), expected) < ROUNDING


def test_sampling_leaves_nothing_on_the_model_and_its_later_clones(
    base, sample, make_lora, apply_ours
):
    model = apply_ours(base, make_lora("a"), 1.0)
    sample(model)
    assert not model.additional_models
    assert not model.clone().additional_models


def test_a_model_on_several_gpus_is_merged(
    base, sample, make_lora, apply_native, apply_ours, caplog
):
    path = make_lora("a")
    expected = sample(apply_native(base, path, 0.7))
    model = apply_ours(base, path, 0.7)
    sample(model)
    # What ComfyUI's MultiGPU CFG Split does, with the second GPU on the CPU.
    split = model.clone()
    second = split.deepclone_multigpu(new_load_device=torch.device("cpu"))
    second.is_multigpu_base_clone = True
    split.set_additional_models("multigpu", [second])
    split.match_multigpu_clones()
    assert worst(sample(split), expected) < ROUNDING
    assert "this MODEL is split over several GPUs, so the LoRA is merged" in caplog.text
    again = apply_ours(split, path, 0.1)
    assert len(again.patches) == 24


def test_a_changed_strength_reuses_the_bank_after_the_old_model_is_freed(
    ours, base, sample, make_lora, apply_ours
):
    """ComfyUI drops an edited node's output before it runs again, for Stack the adapter too."""
    adapter = read_adapter(make_lora("a"))
    model = apply_ours(base, adapter, 0.5)
    sample(model)
    bank = weakref.ref(ours.side_path.get_side_path(model).get_bank())
    del model
    model = apply_ours(base, adapter, 0.6)
    sample(model)
    assert ours.side_path.get_side_path(model).get_bank() is bank()


def test_banks_of_earlier_files_are_freed(ours, base, sample, make_lora, apply_ours, comfyui):
    gc.collect()
    gc.disable()
    try:
        banks, adapters = [], []
        for seed in range(5):
            adapter = read_adapter(make_lora(f"lora{seed}", seed=seed))
            model = apply_ours(base, adapter, 1.0)
            sample(model)
            banks.append(weakref.ref(ours.side_path.get_side_path(model).get_bank().module))
            adapters.append(weakref.ref(adapter))
            del adapter, model
        assert [ref() is None for ref in banks] == [True] * 4 + [False]
        assert [ref() is None for ref in adapters] == [True] * 4 + [False]
        assert len(ours.matching._known[base.model.diffusion_model]) == 1
        loaded = comfyui.model_management.loaded_models()
        assert sum(type(patcher.model).__name__ == "Bank" for patcher in loaded) == 1
    finally:
        gc.enable()


def test_a_base_is_freed_with_its_bank(ours, load_base, sample, make_lora, apply_ours):
    from comfy.patcher_extension import WrappersMP

    gc.collect()
    gc.disable()  # a base waiting for garbage collection would stay beside its successor
    try:
        base = load_base("2509_fp32")
        model = apply_ours(base, make_lora("a"), 1.0)
        sample(model)
        compiled = model.clone().clone()  # merged, as far as we can see
        compiled.add_wrapper_with_key(
            WrappersMP.APPLY_MODEL, "torch.compile", lambda executor, *a, **kw: executor(*a, **kw)
        )
        sample(compiled)
        bank = weakref.ref(ours.side_path.get_side_path(model).get_bank())
        diffusion_model = weakref.ref(base.model.diffusion_model)
        assert len(ours.side_path.get_side_path(model).get_merged(compiled).patches) == 24
        del base, model, compiled
        assert diffusion_model() is None
        assert bank() is None
    finally:
        gc.enable()


def test_comfyui_trains_on_top_of_an_applied_adapter(base, sample, make_lora, apply_ours, caplog):
    from comfy_extras.nodes_train import TrainLoraNode

    model = apply_ours(base, make_lora("a"), 1.0)
    before = sample(model)
    latents = {"samples": torch.randn(1, 16, 1, 8, 8)}
    options = {
        "batch_size": 1, "grad_accumulation_steps": 1, "steps": 2, "learning_rate": 1e-3,
        "rank": 4, "optimizer": "AdamW", "loss_function": "MSE", "seed": 1,
        "training_dtype": "none", "lora_dtype": "fp32", "quantized_backward": False,
        "algorithm": "LoRA", "gradient_checkpointing": True, "checkpoint_depth": 2,
        "offloading": False, "existing_lora": "[None]", "bucket_mode": False,
        "bypass_mode": False,
    }  # fmt: skip
    with torch.inference_mode():
        trained = TrainLoraNode.execute(
            [model], [latents], [[[torch.randn(1, 12, 64), {}]]],
            **{name: [value] for name, value in options.items()},
        ).args[0]  # fmt: skip
    assert any(tensor.abs().sum() > 0 for key, tensor in trained.items() if "lora_up" in key)
    assert "a node trains on this MODEL, so the LoRA is merged" in caplog.text
    assert torch.equal(sample(model), before)


@pytest.mark.parametrize("order", ["before", "after"])
def test_comfyuis_bypass_loader_and_a_side_path_add_up(
    order, base, sample, make_lora, apply_native, apply_ours, comfyui
):
    first, second = make_lora("a", seed=1), make_lora("b", seed=2)
    expected = sample(apply_native(apply_native(base, first, 0.7), second, 0.5))

    def apply_bypass(model, path):
        state_dict = comfyui.utils.load_torch_file(str(path), safe_load=True)
        return comfyui.sd.load_bypass_lora_for_models(model, None, state_dict, 0.7, 0)[0]

    before = sample(base)
    if order == "before":
        model = apply_ours(apply_bypass(base, first), second, 0.5)
    else:
        model = apply_bypass(apply_ours(base, second, 0.5), first)
    assert worst(sample(model), expected) < ROUNDING
    assert torch.equal(sample(base), before)
    assert worst(sample(model), expected) < ROUNDING
