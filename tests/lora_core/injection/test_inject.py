"""Trainable LoRAs in diffusers' own model: PEFT, dense float64 algebra and the base as oracles."""

from __future__ import annotations

import copy
import gc
import itertools
import weakref
from dataclasses import replace

import pytest
import torch
from qwen_edit_lora.lora_core import (
    ConfigError,
    NonFiniteWeightsError,
    ShapeError,
    TargetError,
    compute_delta,
    read_adapter,
    read_state_dict,
    write_adapter,
)
from qwen_edit_lora.lora_core.adapter.adapter import Adapter
from qwen_edit_lora.lora_core.adapter.weights import LoraWeights
from qwen_edit_lora.lora_core.base_model import module_paths
from qwen_edit_lora.lora_core.injection.initialization import compute_principal_factors
from qwen_edit_lora.lora_core.injection.inject import LoraSettings, inject, plan_injection
from qwen_edit_lora.lora_core.injection.layers import DoraLinear, LoraLinear, get_base_weight

FP8 = torch.float8_e4m3fn
WIDTH, TEXT_WIDTH, TOKENS, TEXT_TOKENS = 16, 12, 16, 5
TO_Q = "transformer_blocks.0.attn.to_q"
TO_K = "transformer_blocks.0.attn.to_k"


@pytest.fixture(scope="module")
def diffusers_model():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.QwenImageTransformer2DModel(
        in_channels=64,
        num_layers=2,
        attention_head_dim=WIDTH // 2,
        num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH,
        axes_dims_rope=(4, 2, 2),
    )
    return model.double()


@pytest.fixture
def model(diffusers_model):
    """Two blocks of the real architecture in float64, so that differences are not rounding."""
    return copy.deepcopy(diffusers_model)


def make_inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(2, TOKENS, 64, generator=generator).to(dtype),
        "encoder_hidden_states": torch.randn(2, TEXT_TOKENS, TEXT_WIDTH, generator=generator).to(
            dtype
        ),
        "timestep": torch.tensor([0.3, 0.8], dtype=dtype),
        "img_shapes": [[(1, 4, 4)]] * 2,
        "return_dict": False,
    }


def run(model, dtype=torch.float64):
    return model(**make_inputs(dtype))[0]


def compute_loss(model):
    out = run(model)
    return (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum()


def randomise(injection, seed=2):
    """Moves every parameter from its initial value, so that no part of an adapter is 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in injection.named_parameters():
            noise = 0.3 * torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise.abs() if "magnitude" in name else noise)


def list_bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_bits(model, bits):
    state_dict = model.state_dict()
    assert list(state_dict) == list(bits)
    assert all(torch.equal(tensor, bits[name]) for name, tensor in state_dict.items())


SETTINGS = {
    "plain": LoraSettings(rank=3, alpha=5.0),
    "alpha is the rank": LoraSettings(rank=4),
    "rslora": LoraSettings(rank=3, alpha=5.0, use_rslora=True),
    "dora": LoraSettings(rank=3, alpha=5.0, use_dora=True),
    "dora with rslora": LoraSettings(rank=3, alpha=5.0, use_dora=True, use_rslora=True),
    "rank_pattern": LoraSettings(rank=3, alpha=5.0, rank_pattern={"mlp": 2, "*.0.attn.to_q": 5}),
    "modulation": LoraSettings(rank=2, targets=("modulation", "img_in", "norm_out.linear")),
}
ALL = {
    **SETTINGS,
    "pissa": LoraSettings(rank=3, alpha=5.0, init="pissa"),
    "pissa with dora": LoraSettings(rank=3, alpha=5.0, init="pissa", use_dora=True),
    "gaussian": LoraSettings(rank=3, init="gaussian"),
    "orthogonal": LoraSettings(rank=3, init="orthogonal"),
}


def build_peft_twin(model, plan, injection):
    """PEFT's layers over the same modules, with the same values."""
    peft = pytest.importorskip("peft")
    settings = plan.settings
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha or settings.rank,
        target_modules=[target.module_path for target in plan.targets],
        rank_pattern={f"^{t.module_path}$": t.rank for t in plan.targets},
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
    )
    twin = peft.inject_adapter_in_model(config, copy.deepcopy(model)).double()
    for path, layer in injection.layers.items():
        theirs = twin.get_submodule(path)
        theirs.lora_A["default"].weight.data = layer.lora_A.detach().clone()
        theirs.lora_B["default"].weight.data = layer.lora_B.detach().clone()
        if settings.use_dora:
            theirs.lora_magnitude_vector["default"].weight.data = layer.magnitude.detach().clone()
    return twin


@pytest.mark.parametrize("name", SETTINGS)
def test_output_and_gradients_are_those_of_peft(name, model):
    plan = plan_injection(model, SETTINGS[name])
    base = copy.deepcopy(model)
    injection = inject(model, plan, torch.float64)
    randomise(injection)
    twin = build_peft_twin(base, plan, injection)
    torch.testing.assert_close(run(model), run(twin), atol=1e-9, rtol=1e-9)
    compute_loss(model).backward()
    compute_loss(twin).backward()
    for path, layer in injection.layers.items():
        theirs = twin.get_submodule(path)
        pairs = [(layer.lora_A, theirs.lora_A), (layer.lora_B, theirs.lora_B)]
        if plan.settings.use_dora:
            pairs.append((layer.magnitude, theirs.lora_magnitude_vector))
        for ours, other in pairs:
            torch.testing.assert_close(ours.grad, other["default"].weight.grad, msg=path)
            assert ours.grad.abs().max() > 0


def test_magnitudes_start_where_peft_starts(model):
    base = copy.deepcopy(model)
    plan = plan_injection(model, LoraSettings(rank=2, use_dora=True))
    injection = inject(model, plan, torch.float64)
    started = {path: layer.magnitude.detach().clone() for path, layer in injection.layers.items()}
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=list(injection.layers), use_dora=True)
    twin = peft.inject_adapter_in_model(config, base)
    for path, magnitude in started.items():
        theirs = twin.get_submodule(path).lora_magnitude_vector["default"].weight
        torch.testing.assert_close(magnitude, theirs.detach(), check_dtype=False)


@pytest.mark.parametrize("name", ["plain", "rslora", "dora", "pissa"])
def test_gradients_are_those_of_a_dense_weight(name, model):
    """Autograd through W + delta written out as a matrix, in a copy of the model."""
    dense_model = copy.deepcopy(model)
    injection = inject(model, ALL[name], torch.float64)
    randomise(injection)
    weights, leaves = {}, {}
    for path, layer in injection.layers.items():
        base = layer.base.weight.detach()
        a, b = (p.detach().clone().requires_grad_() for p in (layer.lora_A, layer.lora_B))
        leaves[path] = {"lora_A": a, "lora_B": b}
        weight = base + layer.scale * (b @ a)
        if name == "pissa":  # as in its paper: a residual in place of the base
            down, up = compute_principal_factors(base, layer.rank, layer.scale)
            weight = base - layer.scale * (up @ down) + layer.scale * ((b + up) @ (a + down))
        if name == "dora":
            magnitude = layer.magnitude.detach().clone().requires_grad_()
            leaves[path]["magnitude"] = magnitude
            norm = weight.detach().norm(dim=1, keepdim=True)
            weight = magnitude[:, None] * weight / norm
        weights[f"{path}.weight"] = weight
    out = torch.func.functional_call(dense_model, weights, kwargs=make_inputs())[0]
    torch.testing.assert_close(run(model), out, atol=1e-9, rtol=1e-9)
    ramp = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    (out * ramp).sum().backward()
    compute_loss(model).backward()
    for path, parts in leaves.items():
        for part, leaf in parts.items():
            ours = getattr(injection.layers[path], part).grad
            torch.testing.assert_close(ours, leaf.grad, atol=1e-8, rtol=1e-7, msg=path + part)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_first_forward_is_bit_identical_to_the_base(name, dtype, model):
    model.to(dtype)
    before = run(model, dtype)
    inject(model, ALL[name])
    assert torch.equal(run(model, dtype), before)


def train(model, injection, num_steps=3):
    optimizer = torch.optim.AdamW(injection.parameters(), lr=1e-2)
    for _ in range(num_steps):
        compute_loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", ALL)
def test_the_base_is_bit_identical_after_training_and_after_ejecting(name, model):
    bits, modules = list_bits(model), dict(model.named_modules())
    model.transformer_blocks[1].attn.to_k.requires_grad_(False)
    required = [p.requires_grad for p in model.parameters()]
    before = run(model)
    injection = inject(model, ALL[name])
    train(model, injection)
    assert not torch.equal(run(model), before)
    for path, layer in injection.layers.items():
        assert torch.equal(layer.base.weight, bits[f"{path}.weight"])
        assert layer.base.weight.grad is None
    injection.eject()
    injection.eject()  # does nothing
    assert_same_bits(model, bits)
    assert all(module is modules[path] for path, module in model.named_modules())
    assert [p.requires_grad for p in model.parameters()] == required
    assert torch.equal(run(model), before)


def test_only_the_parameters_of_the_injection_are_trained(model):
    injection = inject(model, LoraSettings(rank=2, use_dora=True))
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert trained == {id(p) for p in injection.parameters()}
    assert sum(p.numel() for p in injection.parameters()) == injection.plan.num_parameters


def test_parameter_names_keep_their_order_regardless_of_the_targets_order(model):
    names = [
        [name for name, _ in inject(copy.deepcopy(model), settings).named_parameters()]
        for settings in (
            LoraSettings(targets=("attn.to_k", "mlp", "attn.to_q")),
            LoraSettings(targets=("mlp", "attn.to_q", "attn.to_k")),
        )
    ]
    assert names[0] == names[1]
    assert names[0][:4] == [f"{TO_Q}.lora_A", f"{TO_Q}.lora_B", f"{TO_K}.lora_A", f"{TO_K}.lora_B"]


def test_set_strength_scales_what_is_added(model):
    before = run(model)
    injection = inject(model, LoraSettings(rank=2, targets=("proj_out",)), torch.float64)
    randomise(injection)
    whole = run(model) - before
    injection.set_strength(0.25)
    torch.testing.assert_close(run(model) - before, 0.25 * whole)
    injection.set_strength(0)
    assert torch.equal(run(model), before)


def test_the_strength_of_a_dora_blends_towards_the_base(model):
    before = run(model)
    injection = inject(
        model, LoraSettings(rank=2, targets=("proj_out",), use_dora=True), torch.float64
    )
    randomise(injection)
    whole = run(model) - before
    injection.set_strength(0.5)
    torch.testing.assert_close(run(model) - before, 0.5 * whole)


def test_inert_modules_of_the_last_block_are_left_out_by_name(model):
    plan = plan_injection(model, LoraSettings(rank=2, targets=("full + modulation",)))
    inert = {f"transformer_blocks.1.{name}" for name in module_paths.INERT_LAST_BLOCK}
    assert set(plan.skipped) == inert
    assert len(plan.targets) == 2 * 14 - 4
    assert all("never get a gradient" in reason for reason in plan.skipped.values())


def test_exactly_the_inert_modules_would_get_no_gradient(model):
    """Exactly the modules the plan skips, checked on the base's own weights."""
    compute_loss(model).backward()
    silent = {
        f"{block}.{name}"
        for block in ("transformer_blocks.0", "transformer_blocks.1")
        for name in module_paths.BLOCK_LINEARS
        if (grad := model.get_submodule(f"{block}.{name}").weight.grad) is None or not grad.any()
    }
    assert silent == set(plan_injection(model, LoraSettings(targets=("full",))).skipped)


def test_a_preset_covers_all_blocks_and_an_exclude_takes_some_away(model):
    settings = LoraSettings(targets=("image-stream",), exclude=("*.1.*", "img_mlp.net.2"))
    paths = [target.module_path for target in plan_injection(model, settings).targets]
    expected = [*module_paths.ATTENTION_IMAGE, "img_mlp.net.0.proj"]
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


def test_a_second_injection_is_refused(model):
    injection = inject(model, LoraSettings(rank=2))
    with pytest.raises(ConfigError, match="already carries a LoRA"):
        inject(model, LoraSettings(rank=2))
    injection.eject()
    inject(model, LoraSettings(rank=2)).eject()


def test_an_injection_that_is_stopped_leaves_the_model_alone(model):
    calls = itertools.count()
    with pytest.raises(InterruptedError, match="injection was stopped after 3 of 20"):
        inject(model, LoraSettings(init="pissa", rank=2), should_stop=lambda: next(calls) == 3)
    assert not any(isinstance(module, LoraLinear) for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_an_initialization_depends_only_on_the_seed_and_the_path(model):
    few = inject(copy.deepcopy(model), LoraSettings(targets=(TO_K,)), seed=5)
    torch.randn(3)
    many = inject(copy.deepcopy(model), LoraSettings(), seed=5)
    other = inject(copy.deepcopy(model), LoraSettings(), seed=6)
    start = few.layers[TO_K].lora_A
    assert torch.equal(start, many.layers[TO_K].lora_A)
    assert not torch.equal(start, other.layers[TO_K].lora_A)
    assert not torch.equal(start, many.layers[TO_Q].lora_A)


def test_initializations_have_the_spread_their_names_promise():
    holder = torch.nn.Module()
    holder.add_module("proj_out", torch.nn.Linear(400, 64))
    starts = {}
    for init in ("kaiming", "gaussian", "orthogonal"):
        injection = inject(holder, LoraSettings(rank=32, init=init, targets=("proj_out",)))
        starts[init] = injection.layers["proj_out"].lora_A.detach()
        assert not injection.layers["proj_out"].lora_B.any()
        injection.eject()
    assert starts["kaiming"].abs().max() <= 1 / 20
    assert starts["kaiming"].std().item() == pytest.approx(1 / 20 / 3**0.5, rel=0.02)
    assert starts["gaussian"].std().item() == pytest.approx(1 / 32, rel=0.02)
    torch.testing.assert_close(starts["orthogonal"] @ starts["orthogonal"].T, torch.eye(32))


@pytest.mark.parametrize("size", [(12, 20), (200, 160)])
def test_pissa_starts_on_the_leading_singular_vectors(size):
    """Small modules by an exact SVD, large ones by a randomised one."""
    generator = torch.Generator().manual_seed(0)
    u, _, vh = torch.linalg.svd(torch.randn(size, generator=generator), full_matrices=False)
    values = 0.6 ** torch.arange(len(vh))
    down, up = compute_principal_factors((u * values) @ vh, 4, 0.5)
    torch.testing.assert_close(
        0.5 * up @ down, (u[:, :4] * values[:4]) @ vh[:4], atol=1e-5, rtol=1e-4
    )
    torch.testing.assert_close(down.norm(dim=1), up.norm(dim=0))


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
        for path in module_paths.list_module_paths():
            _, name = module_paths.split_path(path)
            if name in module_paths.BLOCK_LINEARS:
                out, in_ = module_paths.compute_shape(name)
                plant(root, path, torch.nn.Linear(in_, out))
    plan = plan_injection(root, LoraSettings(rank=64))
    inert = 64 * sum(
        sum(module_paths.compute_shape(name)) for name in module_paths.INERT_LAST_BLOCK
    )
    assert plan.num_parameters == module_paths.count_parameters("full", 64) - inert
    assert inert == pytest.approx(2.75e6, abs=5e3)
    assert plan.compute_file_size() == pytest.approx(849.3e6 - 2 * 2.75e6, rel=1e-3)


def plant(root, module_path, leaf):
    *parents, name = module_path.split(".")
    for parent in parents:
        if not hasattr(root, parent):
            root.add_module(parent, torch.nn.Module())
        root = getattr(root, parent)
    root.add_module(name, leaf)


@pytest.mark.parametrize("key_format", ["comfyui", "kohya", "peft"])
@pytest.mark.parametrize("name", ALL)
def test_the_file_holds_exactly_the_change_of_the_forward_pass(name, key_format, model, tmp_path):
    if key_format == "kohya" and "dora" in name:
        key_format = "diffusers"
    injection = inject(model, ALL[name], torch.float64)
    randomise(injection)
    trained = run(model)
    written = injection.build_adapter("my edit")
    adapter = read_adapter(write_adapter(written, tmp_path / "my_edit", key_format))
    injection.eject()
    with torch.no_grad():
        for path, weights in adapter.modules.items():
            linear = model.get_submodule(path)
            linear.weight.add_(compute_delta(weights, linear.weight))
    torch.testing.assert_close(run(model), trained, atol=1e-9, rtol=1e-9)


def test_an_adapter_is_a_copy_that_further_training_does_not_change(model):
    injection = inject(model, LoraSettings(rank=2))
    randomise(injection)
    adapter = injection.build_adapter()
    before = adapter.modules[TO_Q].lora_A.clone()
    randomise(injection, 3)
    assert torch.equal(adapter.modules[TO_Q].lora_A, before)


@pytest.mark.parametrize("name", ["plain", "dora", "pissa"])
def test_an_adapter_can_be_built_from_other_numbers_than_the_layers(name, model):
    injection = inject(model, ALL[name])
    randomise(injection, 3)
    expected = injection.build_adapter().modules
    tensors = {key: p.detach().clone() for key, p in injection.named_parameters()}
    randomise(injection, 4)
    found = injection.build_adapter(tensors=tensors).modules
    for path, weights in expected.items():
        for part, tensor in weights.parts.items():
            assert torch.equal(found[path].parts[part], tensor)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("key_format", ["comfyui", "diffusers"])
def test_training_continues_from_a_file_bit_exactly(name, key_format, model, tmp_path):
    first = inject(model, SETTINGS[name])
    randomise(first)
    trained = run(model)
    path = write_adapter(first.build_adapter("a"), tmp_path / "a.safetensors", key_format)
    first.eject()
    second = inject(model, SETTINGS[name], seed=9)
    assert second.load(read_adapter(path)) == ()
    assert torch.equal(run(model), trained)


def test_the_scale_of_the_file_is_kept_when_training_continues(model, make_state_dict):
    adapter = inject(copy.deepcopy(model), LoraSettings(rank=2, alpha=1.0, targets=(TO_Q,)))
    randomise(adapter)
    injection = inject(model, LoraSettings(rank=2, alpha=16.0))
    fresh = injection.load(adapter.build_adapter())
    assert TO_Q not in fresh
    assert len(fresh) == len(injection.layers) - 1
    assert (injection.layers[TO_Q].scale, injection.layers[TO_K].scale) == (0.5, 8.0)
    assert injection.build_adapter().modules[TO_Q].alpha == 1.0


def make_adapter(path=TO_Q, rank=2, shape=(WIDTH, WIDTH), bias=None, value=0.1):
    lora_A, lora_B = torch.full((rank, shape[1]), value), torch.full((shape[0], rank), value)
    return Adapter({path: LoraWeights(lora_A, lora_B, 1.0, bias)}, name="old.safetensors")


@pytest.mark.parametrize(
    ("adapter", "error", "sentence"),
    [
        (make_adapter(rank=4), ConfigError, "has rank 4 at .*to_q, the settings ask for 2"),
        (make_adapter(shape=(8, 8)), ShapeError, r"of \(8, 8\), but the model's is \(16, 16\)"),
        (make_adapter("img_in"), TargetError, r"1 module that would not be trained.*\(img_in\)"),
        (make_adapter(bias=torch.ones(WIDTH)), ConfigError, "also changes the bias"),
        (make_adapter(value=float("inf")), NonFiniteWeightsError, "holds NaN or Inf"),
    ],
)
def test_a_file_that_cannot_be_continued_is_refused_with_a_message(adapter, error, sentence, model):
    injection = inject(model, LoraSettings(rank=2))
    before = list_bits(model)
    with pytest.raises(error, match=sentence):
        injection.load(adapter)
    assert_same_bits(model, before)


def test_another_kind_of_adapter_is_refused(model, make_state_dict):
    loha = read_state_dict(make_state_dict("lycoris", [TO_Q], rank=2, kind="LoHa"))
    with pytest.raises(ConfigError, match=r"holds LoHa weights for .*, the settings ask for LoRA"):
        inject(copy.deepcopy(model), LoraSettings(rank=2)).load(loha)
    with pytest.raises(ConfigError, match=r"holds LoRA weights for .*, the settings ask for DoRA"):
        inject(copy.deepcopy(model), LoraSettings(rank=2, use_dora=True)).load(make_adapter())
    with pytest.raises(ConfigError, match="cannot be continued with PiSSA"):
        inject(copy.deepcopy(model), LoraSettings(rank=2, init="pissa")).load(make_adapter())


def test_inert_modules_in_a_file_do_not_keep_it_from_being_continued(model):
    path = "transformer_blocks.1.attn.to_add_out"
    injection = inject(model, LoraSettings(rank=2))
    assert len(injection.load(make_adapter(path))) == len(injection.layers)


@pytest.mark.parametrize("name", ALL)
def test_the_state_restores_every_bit(name, model):
    first = inject(copy.deepcopy(model), ALL[name], seed=1)
    randomise(first)
    state = {key: tensor.clone() for key, tensor in first.state_dict().items()}
    second = inject(model, ALL[name], seed=2)
    parameters = second.parameters()
    second.load_state_dict(state)
    assert all(a is b for a, b in zip(parameters, second.parameters(), strict=True))
    assert torch.equal(run(model), run(first.model))
    assert all(torch.equal(tensor, state[key]) for key, tensor in second.state_dict().items())


@pytest.mark.parametrize(
    ("settings", "error", "sentence"),
    [
        (LoraSettings(rank=3), ShapeError, r"lora_A as \(2, 16\), the settings give \(3, 16\)"),
        (LoraSettings(rank=2, use_dora=True), ConfigError, "differ in 20 tensors"),
        (LoraSettings(rank=2, targets=("mlp",)), ConfigError, "differ in .* tensors"),
    ],
)
def test_a_state_of_other_settings_is_refused(settings, error, sentence, model):
    state = inject(copy.deepcopy(model), LoraSettings(rank=2)).state_dict()
    with pytest.raises(error, match=sentence):
        inject(model, settings).load_state_dict(state)


def test_a_state_of_another_precision_is_refused(model):
    state = inject(copy.deepcopy(model), LoraSettings(rank=2)).state_dict()
    with pytest.raises(ConfigError, match=r"as torch.float32, the settings give torch.bfloat16"):
        inject(model, LoraSettings(rank=2), torch.bfloat16).load_state_dict(state)


# Modules that read one tensor share a down-product.


def test_sharing_the_down_product_changes_only_rounding(model):
    twin = copy.deepcopy(model)
    settings = LoraSettings(rank=3, rank_pattern={"attn.to_k": 2})
    shared = inject(model, settings, torch.float64)
    alone = inject(twin, settings, torch.float64, share_inputs=False)
    for injection in (shared, alone):
        randomise(injection)
    assert sum(layer.shared is not None for layer in shared.layers.values()) == 11
    assert all(layer.shared is None for layer in alone.layers.values())
    torch.testing.assert_close(run(model), run(twin))
    compute_loss(model).backward()
    compute_loss(twin).backward()
    for a, b in zip(shared.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.fixture
def trio(model):
    """q, k and v of one block, randomised, and the result of each alone."""
    injection = inject(model, LoraSettings(rank=2, targets=("*.0.attn.to_[qkv]",)), torch.float64)
    randomise(injection)
    return list(injection.layers.values())


def compute_alone(layer, x):
    hidden = torch.nn.functional.linear(x, layer.down)
    return layer.base(x) + layer.scale * torch.nn.functional.linear(hidden, layer.up)


@pytest.mark.parametrize("order", ["012", "210", "0120", "0011", "0212", "1"])
def test_any_order_of_calls_is_right(order, trio):
    a, b = torch.randn(2, 3, 5, WIDTH, dtype=torch.float64)
    for x in (a, b, a):
        for index in map(int, order):
            layer = trio[index]
            torch.testing.assert_close(layer(x), compute_alone(layer, x))


def test_a_weight_changed_between_two_modules_is_detected(trio):
    x = torch.randn(3, WIDTH, dtype=torch.float64)
    trio[0](x)
    with torch.no_grad():
        trio[1].lora_A.mul_(2)
    torch.testing.assert_close(trio[1](x), compute_alone(trio[1], x))
    x.mul_(3)
    torch.testing.assert_close(trio[2](x), compute_alone(trio[2], x))


def test_a_product_made_without_gradients_is_not_used_with_them(trio):
    x = torch.randn(3, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        trio[0](x)
    trio[1](x).sum().backward()
    assert trio[1].lora_A.grad.any()


def test_nothing_is_kept_after_each_module_took_its_part(trio):
    x = torch.randn(3, WIDTH, dtype=torch.float64)
    for layer in trio:
        layer(x)
    reference = weakref.ref(x)
    del x
    gc.collect()
    assert reference() is None


def test_with_dropout_no_product_is_shared(model):
    injection = inject(model, LoraSettings(rank=2, dropout=0.5))
    assert all(layer.shared is None for layer in injection.layers.values())


def test_dropout_acts_in_training_only_and_keeps_the_mean(model):
    injection = inject(model, LoraSettings(rank=2, dropout=0.25, targets=(TO_Q,)), torch.float64)
    randomise(injection)
    layer = injection.layers[TO_Q]
    x = torch.randn(1, WIDTH, dtype=torch.float64)
    torch.manual_seed(0)
    layer.train()
    added = layer(x.expand(20000, -1)) - layer.base(x)
    layer.eval()
    expected = layer(x) - layer.base(x)
    torch.testing.assert_close(added.mean(0, keepdim=True), expected, atol=0.02, rtol=0.05)
    assert (added.std(0) > 0.1 * expected.abs().mean()).all()
    torch.testing.assert_close(expected, compute_alone(layer, x) - layer.base(x))


def test_gradients_are_the_same_under_gradient_checkpointing(model):
    twin = copy.deepcopy(model)
    injections = [
        inject(m, LoraSettings(rank=2, use_dora=True), torch.float64) for m in (model, twin)
    ]
    for injection in injections:
        randomise(injection)
    twin.enable_gradient_checkpointing()
    for m in (model, twin):
        m.train()
        compute_loss(m).backward()
    for a, b in zip(*(injection.parameters() for injection in injections), strict=True):
        assert torch.equal(a.grad, b.grad)
    for layer in injections[1].layers.values():
        assert layer.shared is None or layer.shared.x is None


@pytest.mark.parametrize("name", ["plain", "dora", "pissa"])
def test_a_block_compiles_into_one_graph(name, model):
    injection = inject(model, ALL[name], torch.float64)
    randomise(injection)
    expected = run(model)
    torch._dynamo.reset()
    for block in model.transformer_blocks:
        block.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(run(model), expected)
    torch.testing.assert_close(run(model), expected)


def test_tokens_are_not_widened_to_the_dtype_of_the_lora(model):
    """The products run in bfloat16 while the trained weights and their gradients are float32."""
    model.bfloat16()
    injection = inject(model, LoraSettings(rank=2))
    randomise(injection)
    seen = set()
    layer = injection.layers[TO_Q]
    project = layer.project

    def watch(x):
        hidden = project(x)
        seen.add((x.dtype, hidden.dtype))
        return hidden

    layer.project = watch
    run(model, torch.bfloat16).float().sum().backward()
    assert seen == {(torch.bfloat16, torch.bfloat16)}
    assert {p.dtype for p in injection.parameters()} == {torch.float32}
    assert layer.lora_A.grad.dtype == torch.float32


def test_autocast_runs_the_lora_in_its_dtype(model):
    model.float()
    injection = inject(model, LoraSettings(rank=2))
    randomise(injection)
    expected = run(model, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert injection.layers[TO_Q](torch.randn(3, WIDTH)).dtype == torch.bfloat16
        out = run(model, torch.float32)
    torch.testing.assert_close(out.float(), expected, atol=0.1, rtol=0.1)


class Fp8Linear(torch.nn.Module):
    """A base that stores scaled fp8, like ComfyUI's files."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = linear.weight.detach().abs().max() / 448
        self.register_buffer("weight", (linear.weight.detach() / self.scale).to(FP8))
        self.bias = linear.bias

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


class ReadableFp8Linear(Fp8Linear):
    def dequantize(self):
        return self.weight.double() * self.scale


@pytest.mark.parametrize("name", ["plain", "dora", "pissa"])
def test_a_quantised_base_takes_every_kind_of_lora(name, model):
    for path, _ in list(model.named_modules()):
        if path.endswith("attn.to_q"):
            parent = model.get_submodule(path.rpartition(".")[0])
            parent.to_q = ReadableFp8Linear(parent.to_q)
    before = run(model)
    bits = list_bits(model)
    injection = inject(model, ALL[name], torch.float64)
    assert torch.equal(run(model), before)
    train(model, injection)
    trained = run(model)
    adapter = injection.build_adapter()
    injection.eject()
    assert_same_bits(model, bits)
    for path, weights in adapter.modules.items():
        linear = model.get_submodule(path)
        weight = linear.dequantize() if path.endswith("attn.to_q") else linear.weight.detach()
        dense = torch.nn.Linear(*reversed(weight.shape)).double()
        dense.weight.data = weight + compute_delta(weights, weight)
        dense.bias = linear.bias
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, dense)
    torch.testing.assert_close(run(model), trained, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("library", ["bitsandbytes", "torchao"])
@pytest.mark.parametrize("name", ["plain", "dora", "pissa"])
def test_the_modules_of_the_quantisation_libraries_are_taken_as_they_are(library, name):
    module = pytest.importorskip(library)
    torch.manual_seed(0)
    holder = torch.nn.Module()
    holder.proj_out = torch.nn.Linear(128, 64).bfloat16()
    if library == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(holder, Int8WeightOnlyConfig())
    else:
        linear = module.nn.Linear4bit(128, 64, compute_dtype=torch.bfloat16, quant_type="nf4")
        linear.load_state_dict(holder.proj_out.state_dict())
        holder.proj_out = linear.to("cpu")
    x = torch.randn(3, 128).bfloat16().requires_grad_()
    before = holder.proj_out(x)
    injection = inject(holder, replace(ALL[name], targets=("proj_out",)))
    assert torch.equal(holder.proj_out(x), before)
    randomise(injection)
    out = holder.proj_out(x)
    out.float().sum().backward()
    assert all(p.grad.any() for p in injection.parameters())
    weight = get_base_weight(injection.layers["proj_out"].base)
    dense = weight + compute_delta(injection.build_adapter().modules["proj_out"], weight)
    bias = injection.layers["proj_out"].bias.float()
    expected = torch.nn.functional.linear(x.float(), dense.float(), bias)
    assert (out.float() - expected).norm() < 0.02 * expected.norm()


def test_an_unreadable_base_is_refused_by_dora_and_accepted_by_lora(model):
    attention = model.transformer_blocks[0].attn
    attention.to_q = Fp8Linear(attention.to_q)
    for settings in (LoraSettings(rank=2, use_dora=True), LoraSettings(rank=2, init="pissa")):
        with pytest.raises(ConfigError, match=r"Fp8Linear stores it as float8_e4m3fn \(16, 16\)"):
            inject(model, settings)
    injection = inject(model, LoraSettings(rank=2))
    run(model).sum().backward()
    assert injection.layers[TO_Q].lora_B.grad.any()


def test_a_dora_norm_needs_no_dense_delta_and_is_that_of_the_dense_weight(model):
    injection = inject(model, ALL["dora"], torch.float64)
    randomise(injection)
    for layer in injection.layers.values():
        assert isinstance(layer, DoraLinear)
        dense = layer.base.weight + layer.scale * (layer.lora_B @ layer.lora_A)
        torch.testing.assert_close(layer.compute_norm(), dense.norm(dim=1).detach())
