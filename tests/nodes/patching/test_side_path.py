"""The side path against ComfyUI's own LoraLoader, on the tiny true architecture."""

from __future__ import annotations

import copy

import pytest
import torch
from demo_base.dit import WIDTH
from qwen_edit_lora.lora_core import FileError, compute_delta, read_adapter
from qwen_edit_lora.lora_core.adapter.strengths import Strengths
from safetensors.torch import load_file, save_file

from ..conftest import worst

pytestmark = pytest.mark.comfy

ROUNDING = 1e-5  # float32 base, two steps


def test_side_path_equals_patched_weights(base, sample, make_lora, apply_native, apply_ours):
    path = make_lora("a", seed=1)
    expected = sample(apply_native(base, path, 0.7))
    assert worst(sample(apply_ours(base, path, 0.7, "side path")), expected) < ROUNDING
    assert worst(sample(base), expected) > 100 * ROUNDING


@pytest.mark.parametrize("variant", ["2509_fp32", "2511_fp32"])
def test_a_side_path_equals_patched_weights_in_both_variants_of_the_reference_timestep(
    variant, load_base, sample, make_lora, apply_native, apply_ours
):
    model, path = load_base(variant), make_lora("a", seed=1, alpha=3.0)
    native = sample(apply_native(model, path, 1.0))
    assert worst(sample(apply_ours(model, path, 1.0)), native) < ROUNDING


def test_two_stacked_adapters_equal_two_native_loaders(
    base, sample, make_lora, apply_native, apply_ours
):
    first, second = make_lora("a", seed=1, rank=4), make_lora("b", seed=2, rank=7)
    expected = sample(apply_native(apply_native(base, first, 0.7), second, -0.5))
    chained = apply_ours(apply_ours(base, first, 0.7), second, -0.5)
    assert worst(sample(chained), expected) < ROUNDING


def test_a_side_path_on_top_of_a_native_lora_adds_up(
    base, sample, make_lora, apply_native, apply_ours
):
    first, second = make_lora("a", seed=1), make_lora("b", seed=2)
    expected = sample(apply_native(apply_native(base, first, 0.7), second, 0.5))
    assert worst(sample(apply_ours(apply_native(base, first, 0.7), second, 0.5)), expected) < (
        ROUNDING
    )


def test_merge_mode_is_bit_identical_to_the_native_loader(
    base, sample, make_lora, apply_native, apply_ours
):
    path = make_lora("a", seed=1)
    expected = sample(apply_native(base, path, 0.7))
    assert torch.equal(sample(apply_ours(base, path, 0.7, "merge")), expected)


def save_as(kind: str, path, lora_path):
    """Rewrites a plain LoRA file's targets as another kind of the same shapes."""
    generator = torch.Generator().manual_seed(5)

    def draw(*shape):
        return torch.randn(*shape, generator=generator) * 0.2

    tensors = {}
    for key, lora_A in load_file(lora_path).items():
        if not key.endswith(".lora_A.weight"):
            continue
        stem = key.removesuffix(".lora_A.weight")
        out, in_ = load_file(lora_path)[f"{stem}.lora_B.weight"].shape[0], lora_A.shape[1]
        if kind == "LoHa":
            for w in ("w1", "w2"):
                tensors[f"{stem}.hada_{w}_a"] = draw(out, 3)
                tensors[f"{stem}.hada_{w}_b"] = draw(3, in_)
            tensors[f"{stem}.alpha"] = torch.tensor(1.5)
        else:
            tensors[f"{stem}.lokr_w1"] = draw(4, 8)
            tensors[f"{stem}.lokr_w2_a"] = draw(out // 4, 2)
            tensors[f"{stem}.lokr_w2_b"] = draw(2, in_ // 8)
            tensors[f"{stem}.alpha"] = torch.tensor(1.0)
        tensors[f"{stem}.diff_b"] = draw(out)
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("kind", ["LoHa", "LoKr"])
def test_lycoris_kinds_with_bias_run_on_the_side_path(
    kind, base, sample, make_lora, tmp_path, apply_native, apply_ours
):
    path = save_as(kind, tmp_path / f"{kind}.safetensors", make_lora("a"))
    assert read_adapter(path).kinds == {kind}
    expected = sample(apply_native(base, path, 0.8))
    ours = sample(apply_ours(base, path, 0.8, "side path"))
    assert worst(ours, expected) < ROUNDING
    assert worst(sample(base), expected) > 100 * ROUNDING


def test_the_base_is_bit_identical_afterwards(base, sample, make_lora, apply_ours):
    weights = {k: v.cpu().clone() for k, v in base.model.state_dict().items()}
    before = sample(base)
    sample(apply_ours(base, make_lora("a"), 1.0))
    assert torch.equal(sample(base), before)
    assert all(torch.equal(v.cpu(), weights[k]) for k, v in base.model.state_dict().items())
    assert not any("forward" in m.__dict__ for m in base.model.diffusion_model.modules())


def test_strength_0_is_bit_identical_to_the_base(base, sample, make_lora, apply_ours):
    path = make_lora("a")
    assert torch.equal(sample(apply_ours(base, path, 0.0)), sample(base))
    off = apply_ours(base, path, 1.0, image_strength=0.0, text_strength=0.0)
    assert torch.equal(sample(off), sample(base))


def test_an_exception_in_mid_sampling_leaves_the_base_as_it_was(
    base, sample, make_lora, apply_ours
):
    before = sample(base)
    model = apply_ours(base, make_lora("a"), 1.0)
    block = base.model.diffusion_model.transformer_blocks[1]

    def fail(*args, **kwargs):
        raise RuntimeError("out of memory, say")

    block.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory, say"):
        sample(model)
    block._forward_pre_hooks.clear()
    assert torch.equal(sample(base), before)
    assert not any("forward" in m.__dict__ for m in base.model.diffusion_model.modules())


def test_an_extension_that_copies_the_options_deeply_keeps_the_lora(
    base, sample, make_lora, apply_ours
):
    from comfy.patcher_extension import WrappersMP

    model = apply_ours(base, make_lora("a"), 1.0)
    expected = sample(model)
    copied = []

    def copy_options(executor, *args, **kwargs):
        args = [copy.deepcopy(a) if isinstance(a, dict) else a for a in args]
        copied.append(True)
        return executor(*args, **kwargs)

    wrapped = model.clone()
    wrapped.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "a stranger", copy_options)
    assert torch.equal(sample(wrapped), expected)
    assert copied


def test_a_lora_whose_modules_never_run_raises_a_warning(
    base, sample, make_lora, apply_ours, caplog
):
    model = apply_ours(base, make_lora("a"), 1.0)
    diffusion_model = base.model.diffusion_model
    twin = copy.deepcopy(diffusion_model)
    expected = sample(base)
    diffusion_model.__dict__["_forward"] = twin._forward  # like an extension with its own model
    try:
        with caplog.at_level("WARNING"):
            assert torch.equal(sample(model), expected)
    finally:
        del diffusion_model.__dict__["_forward"]
    (message,) = [r.getMessage() for r in caplog.records if "ran none of" in r.getMessage()]
    assert "the image is that of the base" in message


def test_clones_with_different_strengths_do_not_see_each_other(base, sample, make_lora, apply_ours):
    a, b = make_lora("a", seed=1), make_lora("b", seed=2)
    weak, strong = apply_ours(base, a, 0.2), apply_ours(base, a, 0.9)
    other = apply_ours(base, b, 0.5)
    alone = [sample(model) for model in (weak, strong, other)]
    interleaved = [sample(model) for model in (other, strong, weak)][::-1]
    assert all(torch.equal(x, y) for x, y in zip(alone, interleaved, strict=True))
    assert worst(alone[0], alone[1]) > 100 * ROUNDING


def test_a_strength_change_touches_no_weight_and_reads_no_file(
    ours, base, sample, make_lora, apply_ours
):
    path = make_lora("a")
    adapter = read_adapter(path)
    first = apply_ours(base, adapter, 0.5)
    sample(first)
    bank = ours.side_path.get_side_path(first).get_bank()
    uuid, pointers = base.patches_uuid, [p.data_ptr() for p in bank.module.parameters()]
    path.unlink()  # a second read would fail
    second = apply_ours(base, adapter, 0.6)
    sample(second)
    assert ours.side_path.get_side_path(second).get_bank() is bank
    assert [p.data_ptr() for p in bank.module.parameters()] == pointers
    assert second.patches_uuid == uuid
    assert not second.patches


def test_adapters_that_meet_on_a_module_run_as_one_down_and_one_up_product(
    ours, base, sample, make_lora, apply_ours
):
    model = base
    for seed, rank in enumerate((4, 2, 7)):
        model = apply_ours(model, make_lora(f"l{seed}", seed=seed, rank=rank), 0.1 * (seed + 1))
    bank = ours.side_path.get_side_path(model).get_bank().module
    assert len(bank.sites) == 24  # 12 Linears in each of 2 blocks
    for path, site in bank.sites.items():
        (term,) = site.terms
        shapes = [shape for shape, _, _ in site.pack.views]
        reads_alone = not path.endswith(("_q", "_k", "_v", "_q_proj", "_k_proj", "_v_proj"))
        reads_first = path.endswith(("_q", "_q_proj"))
        downs = [13] if reads_alone else [39] if reads_first else []
        assert [shape[0] for shape in shapes[:-1]] == downs
        assert shapes[-1][1] == term.rank == 13


def test_no_bank_is_built_for_unsampled_steps_of_a_chain(ours, base, sample, make_lora, apply_ours):
    first = apply_ours(base, make_lora("a", seed=1), 1.0)
    second = apply_ours(first, make_lora("b", seed=2), 1.0)
    sample(second)
    assert ours.side_path.get_side_path(first)._bank is None
    assert ours.side_path.get_side_path(second)._bank is not None


def test_comfyui_loads_and_accounts_for_the_bank(
    ours, comfyui, base, sample, make_lora, apply_ours
):
    model = apply_ours(base, make_lora("a"), 1.0)
    sample(model)
    bank = ours.side_path.get_side_path(model).get_bank()
    loaded = [m.model for m in comfyui.model_management.current_loaded_models]
    assert any(patcher.model is bank.module for patcher in loaded)
    assert bank.patcher.model_size() == sum(
        p.numel() * p.element_size() for p in bank.module.parameters()
    )


def select(adapter, keep):
    return adapter.with_modules({p: w for p, w in adapter.modules.items() if keep(p)})


@pytest.mark.parametrize("mode", ["side path", "merge"])
@pytest.mark.parametrize(
    ("options", "keep"),
    [
        ({"text_strength": 0.0}, lambda p: "to_q" in p or "to_k" in p or "to_v" in p
         or "to_out" in p or "img_" in p),
        ({"image_strength": 0.0}, lambda p: "add_" in p or "txt_" in p),
        ({"blocks": frozenset({1})}, lambda p: p.startswith("transformer_blocks.1.")),
    ],
    ids=["image only", "text only", "block 1"],
)  # fmt: skip
def test_streams_and_blocks_select_their_modules_in_both_modes(
    mode, options, keep, base, sample, make_lora, apply_ours
):
    adapter = read_adapter(make_lora("a"))
    kept = select(adapter, keep)
    assert 0 < len(kept) < len(adapter)
    expected = sample(apply_ours(base, kept, 0.9, mode))
    chosen = sample(apply_ours(base, adapter, 0.9, mode, **options))
    assert worst(chosen, expected) < ROUNDING
    assert worst(chosen, sample(apply_ours(base, adapter, 0.9, mode))) > 100 * ROUNDING


def test_stream_strengths_multiply(base, sample, make_lora, apply_native, apply_ours):
    path = make_lora("a")
    expected = sample(apply_native(base, path, 0.3))
    half = apply_ours(base, path, 0.6, image_strength=0.5, text_strength=0.5)
    assert worst(sample(half), expected) < ROUNDING


@pytest.mark.parametrize(
    ("storage", "stored"),
    [
        ("2509_bf16", "bfloat16"),
        ("2509_fp8", "float8_e4m3fn"),
        ("2511_fp8_scaled", "scaled float8_e4m3fn"),
    ],
)
def test_every_storage_samples_with_a_side_path(
    storage, stored, ours, load_base, sample, make_lora, apply_ours
):
    model = load_base(storage)
    attention = model.model.diffusion_model.transformer_blocks[0].attn
    assert ours.host.describe_storage(attention.to_q)[0] == stored
    before = sample(model)
    with_lora = sample(apply_ours(model, make_lora("a"), 1.0))
    assert torch.isfinite(with_lora).all()
    assert worst(with_lora, before) > 1e-2
    assert torch.equal(sample(model), before)


def test_gradients_flow_through_a_side_path(ours, base, make_lora, apply_ours):
    adapter = read_adapter(make_lora("a"))
    side_path = ours.side_path.get_side_path(apply_ours(base, adapter, 0.7))
    path = "transformer_blocks.0.attn.to_q"
    x = torch.randn(2, 5, WIDTH, requires_grad=True)
    base_weight = torch.randn(WIDTH, WIDTH)
    site = side_path.get_bank().module.sites[path]
    site.add(x @ base_weight.T, x, (0.7,)).sum().backward()
    tuned = base_weight + 0.7 * compute_delta(adapter.modules[path])
    torch.testing.assert_close(x.grad, tuned.sum(0).expand_as(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("is_replaced", [False, True], ids=["deleted", "replaced"])
def test_a_file_deleted_between_load_and_sampling_is_a_one_sentence_error(
    is_replaced, base, sample, make_lora, apply_ours
):
    path = make_lora("a", seed=1)
    before = sample(base)
    model = apply_ours(base, path, 1.0)
    path.unlink()
    if is_replaced:
        make_lora("a", seed=2, rank=3)
    expected = "was changed on disk" if is_replaced else "does not exist"
    with pytest.raises(FileError, match=rf"a.safetensors {expected}"):
        sample(model)
    assert torch.equal(sample(base), before)


def test_strengths_refuse_non_finite_numbers():
    with pytest.raises(ValueError, match="strength is nan; expected a finite number"):
        Strengths(float("nan"))
