"""Models of other extensions: nunchaku's, and GGUF files.

nunchaku needs a GPU and its own compiled kernels, so stand-ins have the names and attributes of its
classes (nunchaku 1.2, models/linear.py; ComfyUI-nunchaku 1.0, models/qwenimage.py), with dense
weights. ComfyUI-GGUF's tensor class is a stand-in too; its codes and their decoder are those of the
gguf package.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from demo_base.dit import WIDTH
from qwen_edit_lora.lora_core import (
    Adapter,
    ConfigError,
    DiffWeights,
    DoraWeights,
    LohaWeights,
    LokrWeights,
    LoraWeights,
    TargetError,
)
from qwen_edit_lora.lora_core.adapter.strengths import Strengths
from torch.nn import functional as F

from ..conftest import worst

pytestmark = pytest.mark.comfy

ROUNDING = 1e-5
ATTENTION = tuple(
    f"transformer_blocks.{block}.attn.{name}"
    for block in range(2)
    for name in (
        *("to_q", "to_k", "to_v", "to_out.0"),
        *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    )
)
MODULATION = tuple(
    f"transformer_blocks.{block}.{s}_mod.1" for block in range(2) for s in ("img", "txt")
)
MLP = ("transformer_blocks.0.img_mlp.net.0.proj", "transformer_blocks.1.txt_mlp.net.2")


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.1


class SVDQW4A4Linear(torch.nn.Module):
    """A Linear without a `weight`."""

    def __init__(self, linears: list[Any], rank: int = 32, precision: str = "int4"):
        super().__init__()
        weight = torch.cat([linear.weight.detach() for linear in linears])
        self.out_features, self.in_features = weight.shape
        self.rank, self.precision, self.torch_dtype = rank, precision, weight.dtype
        self.qweight = torch.nn.Parameter(weight, requires_grad=False)
        self.bias = torch.nn.Parameter(torch.cat([linear.bias.detach() for linear in linears]))

    def forward(self, x: torch.Tensor, output: torch.Tensor | None = None) -> torch.Tensor:
        batch, length, _ = x.shape
        return F.linear(x.reshape(batch * length, -1), self.qweight, self.bias).reshape(
            batch, length, -1
        )


class AWQW4A16Linear(torch.nn.Module):
    """Its outputs are ordered as (width, 6), the adapter's as (6, width)."""

    def __init__(self, linear: Any):
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        self.group_size = 64
        order = torch.arange(self.out_features).view(6, -1).T.flatten()
        self.qweight = torch.nn.Parameter(linear.weight.detach()[order], requires_grad=False)
        self.bias = torch.nn.Parameter(linear.bias.detach()[order])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.qweight).add_(self.bias.view(1, -1))


class Modulation(torch.nn.Sequential):
    """How nunchaku's block uses the modulation's output."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = super().forward(x)
        return out.view(out.shape[0], -1, 6).transpose(1, 2).reshape(out.shape[0], -1)


def run_mlp_in_one_kernel(feed_forward: Any, x: torch.Tensor) -> torch.Tensor:
    first, second = feed_forward.net[0].proj, feed_forward.net[2]
    h = F.gelu(F.linear(x, first.qweight, first.bias), approximate="tanh")
    return F.linear(h, second.qweight, second.bias)


def make_nunchaku(model: Any) -> Any:
    """The demo base with nunchaku's modules and names in place of ComfyUI's."""
    root = model.model.diffusion_model
    root.__class__ = type("NunchakuQwenImageTransformer2DModel", (type(root),), {"offload": False})
    for block in root.transformer_blocks:
        attention = block.attn
        fused = {"to_qkv": ["to_q", "to_k", "to_v"], "add_qkv_proj": []}
        fused["add_qkv_proj"] = ["add_q_proj", "add_k_proj", "add_v_proj"]
        members = {}
        for name, parts in fused.items():
            setattr(attention, name, SVDQW4A4Linear([getattr(attention, part) for part in parts]))
            for index, part in enumerate(parts):
                delattr(attention, part)
                members[part] = lambda self, x, name=name, index=index: getattr(self, name)(
                    x
                ).chunk(3, dim=-1)[index]
        attention.__class__ = type("Attention", (type(attention),), members)
        attention.to_out[0] = SVDQW4A4Linear([attention.to_out[0]])
        attention.to_add_out = SVDQW4A4Linear([attention.to_add_out])
        for name in ("img", "txt"):
            modulation = getattr(block, f"{name}_mod")
            setattr(block, f"{name}_mod", Modulation(modulation[0], AWQW4A16Linear(modulation[1])))
            mlp = getattr(block, f"{name}_mlp")
            mlp.__class__ = type(
                "NunchakuFeedForward", (type(mlp),), {"forward": run_mlp_in_one_kernel}
            )
            mlp.net[0].proj = SVDQW4A4Linear([mlp.net[0].proj])
            mlp.net[2] = SVDQW4A4Linear([mlp.net[2]])
    return model


def build_adapter(paths: tuple[str, ...], kind: str = "LoRA", seed: int = 0) -> Adapter:
    modules = {}
    for index, path in enumerate(paths):
        out = (
            6 * WIDTH
            if "_mod" in path
            else 4 * WIDTH
            if path.endswith("proj") and "mlp" in path
            else WIDTH
        )
        columns = 4 * WIDTH if path.endswith("net.2") else WIDTH
        s = seed + 10 * index
        bias = draw(out, seed=s + 9)
        lora = LoraWeights(draw(4, columns, seed=s), draw(out, 4, seed=s + 1), 6.0, bias)
        modules[path] = {
            "LoRA": lora,
            "LoHa": LohaWeights(
                *(draw(out, 3, seed=s), draw(3, columns, seed=s + 1)),
                *(draw(out, 3, seed=s + 2) * 9, draw(3, columns, seed=s + 3)),
                bias_delta=bias,
            ),
            "LoKr": LokrWeights(w1=draw(4, 8, seed=s), w2=draw(out // 4, columns // 8, seed=s + 1)),
            "diff": DiffWeights(draw(out, columns, seed=s) * 0.1, bias),
            "DoRA": DoraWeights(lora, draw(out, 1, seed=s + 2).abs() + 0.5),
        }[kind]
    return Adapter(modules, name=f"drawn {kind}")


@pytest.fixture
def nunchaku(load_base) -> Any:
    return make_nunchaku(load_base("2509_fp32"))


def apply(
    ours: Any, model: Any, adapter: Adapter, strength: float = 0.7, mode: str = "auto", **more
):
    return ours.application.apply_adapters(model, [(adapter, Strengths(strength, **more))], mode)


def test_the_stand_in_computes_the_same_as_the_base(base, nunchaku, sample):
    assert worst(sample(nunchaku), sample(base)) < ROUNDING


@pytest.mark.parametrize("kind", ["LoRA", "LoHa", "LoKr", "diff"])
def test_a_nunchaku_model_gives_what_the_base_gives_with_the_same_lora(
    kind, base, nunchaku, sample, ours
):
    adapter = build_adapter(ATTENTION + MODULATION, kind)
    before, plain = sample(nunchaku), sample(base)
    expected = sample(apply(ours, base, adapter, mode="merge").model)
    assert worst(expected, plain) > 100 * ROUNDING
    applied = apply(ours, nunchaku, adapter)
    assert worst(sample(applied.model), expected) < ROUNDING
    assert torch.equal(sample(nunchaku), before)
    assert "this MODEL is a nunchaku Qwen-Image, int4" in applied.lines
    assert f"side path: {len(adapter)} modules" in applied.to_text()
    assert not applied.warnings
    assert not any("forward" in m.__dict__ for m in nunchaku.model.diffusion_model.modules())


def test_q_k_and_v_of_a_fused_linear_are_one_down_product_and_have_their_own_strengths(
    base, nunchaku, sample, ours
):
    first = build_adapter(ATTENTION)
    second = build_adapter(tuple(p for p in ATTENTION if p.endswith(("to_q", "to_v"))), seed=500)

    def stack(model: Any, mode: str) -> Any:
        model = apply(ours, model, first, 0.7, mode, text_strength=0.0).model
        return apply(ours, model, second, -0.4, mode, blocks=frozenset({1})).model

    expected = sample(stack(base, "merge"))
    tuned = stack(nunchaku, "auto")
    assert worst(sample(tuned), expected) < ROUNDING
    sites = ours.side_path.get_side_path(tuned).get_bank().module.sites
    assert set(sites) == {
        f"transformer_blocks.{block}.attn.{name}"
        for block in range(2)
        for name in ("to_qkv", "to_out.0", "add_qkv_proj", "to_add_out")
    }
    shapes = [s for s, _, _ in sites["transformer_blocks.0.attn.to_qkv"].pack.views]
    assert shapes[:4] == [(20, WIDTH), (WIDTH, 8), (WIDTH, 4), (WIDTH, 8)]


def test_modules_inside_a_kernel_are_named_and_left_out(base, nunchaku, sample, ours):
    expected = sample(apply(ours, base, build_adapter(ATTENTION), mode="merge").model)
    whole = build_adapter(ATTENTION + MLP)
    applied = apply(ours, nunchaku, whole)
    assert worst(sample(applied.model), expected) < ROUNDING
    (warning,) = applied.warnings
    assert warning.startswith(
        "2 of 18 modules were left out: nunchaku runs both Linears of an MLP in one 4-bit kernel"
    )
    with pytest.raises(TargetError, match=r"none of the 2 modules .* can be applied to this MODEL"):
        apply(ours, nunchaku, build_adapter(MLP))


def test_what_needs_weights_is_refused_with_a_message(nunchaku, sample, ours, comfyui):
    lora, dora = build_adapter(ATTENTION), build_adapter(ATTENTION[:1], "DoRA")
    with pytest.raises(ConfigError, match=r"nunchaku model keeps no weights that can be patched"):
        apply(ours, nunchaku, lora, mode="merge")
    with pytest.raises(TargetError, match=r"DoRA depends on the base weight"):
        apply(ours, nunchaku, dora)
    both = replace(lora, modules={**lora.modules, **dora.modules})
    applied = apply(ours, nunchaku, both)
    assert applied.warnings[0].startswith("1 of 16 modules were left out: DoRA depends")
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    compiled = applied.model.clone()
    set_torch_compile_wrapper(compiled, backend="eager")
    with pytest.raises(
        ConfigError, match=r"without a weight or bias that a LoRA could be merged into"
    ):
        sample(compiled)
    with pytest.raises(ConfigError, match=r"would have to be merged .*torch.compile is on"):
        apply(ours, compiled, lora)


def test_cpu_offload_of_nunchaku_is_refused_with_a_message(nunchaku, ours):
    nunchaku.model.diffusion_model.offload = True
    with pytest.raises(ConfigError, match=r"Set cpu_offload to 'disable' in its loader"):
        apply(ours, nunchaku, build_adapter(ATTENTION))


def test_strengths_auto_says_why_it_cannot_measure_a_nunchaku_model(nunchaku):
    from qwen_edit_lora.nodes.sweeping.strengths import resolve_strengths

    with pytest.raises(ConfigError, match=r"cannot be measured, as it has no weight of its own"):
        resolve_strengths("auto", nunchaku, [build_adapter(ATTENTION)])


def test_a_linear_without_a_weight_in_another_model_runs_beside_and_is_not_merged(
    base, sample, ours
):
    adapter = build_adapter(ATTENTION)
    expected = sample(apply(ours, base, adapter, mode="merge").model)
    before = sample(base)
    attention = base.model.diffusion_model.transformer_blocks[0].attn
    attention.to_add_out = SVDQW4A4Linear([attention.to_add_out])
    adapter = build_adapter(ATTENTION)  # matches are remembered by adapter
    assert worst(sample(apply(ours, base, adapter).model), expected) < ROUNDING
    with pytest.raises(ConfigError, match=r"^1 module of .*to_add_out.* no weight that ComfyUI"):
        apply(ours, base, adapter, mode="merge")
    assert worst(sample(base), before) < ROUNDING


class GGMLTensor(torch.Tensor):
    """As in ComfyUI-GGUF's ops.py: raw bytes that report the shape of the weight."""

    def __new__(cls, data: torch.Tensor, *, tensor_type: Any, tensor_shape: Any):
        return data.as_subclass(cls)

    def __init__(self, data: torch.Tensor, *, tensor_type: Any, tensor_shape: Any):
        super().__init__()
        self.tensor_type, self.tensor_shape = tensor_type, tensor_shape

    def clone(self, *args: Any, **kwargs: Any) -> GGMLTensor:
        return self

    def detach(self, *args: Any, **kwargs: Any) -> GGMLTensor:
        return self

    @property
    def shape(self) -> torch.Size:
        return self.tensor_shape


def quantise(weight: torch.Tensor, kind: str) -> GGMLTensor:
    import gguf

    tensor_type = gguf.GGMLQuantizationType[kind]
    codes = torch.from_numpy(gguf.quants.quantize(weight.numpy(), tensor_type))
    return GGMLTensor(codes, tensor_type=tensor_type, tensor_shape=torch.Size(weight.shape))


PATH = "transformer_blocks.0.img_mlp.net.0.proj"


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_1", "BF16", "F16"])
def test_a_gguf_weight_is_measured_by_its_values_and_not_its_bytes(kind, base, ours):
    linear = base.model.diffusion_model.get_submodule(PATH)
    weight = linear.weight.detach().clone()
    linear.weight = torch.nn.Parameter(quantise(weight, kind), requires_grad=False)
    assert type(linear.weight).__name__ == "GGMLTensor"
    found = ours.host.measure_weight(base, ours.host.Place(PATH))
    assert found.value == pytest.approx(weight.norm().item(), rel=0.02)


def test_a_large_gguf_weight_is_measured_by_a_sample_of_its_rows(base, ours, monkeypatch):
    linear = base.model.diffusion_model.get_submodule(PATH)
    weight = draw(1500, 64, seed=1)
    linear.weight = torch.nn.Parameter(quantise(weight, "Q8_0"), requires_grad=False)
    import gguf

    decoded = []
    dequantise = gguf.quants.dequantize
    monkeypatch.setattr(
        gguf.quants,
        "dequantize",
        lambda rows, kind: decoded.append(len(rows)) or dequantise(rows, kind),
    )
    assert ours.host.measure_weight(base, ours.host.Place(PATH)).value == pytest.approx(
        weight.norm().item(), rel=0.03
    )
    assert decoded == [500]


def test_a_weight_that_cannot_be_measured_gives_the_reason(base, ours, monkeypatch):
    linear = base.model.diffusion_model.get_submodule(PATH)
    weight = linear.weight.detach().clone()

    def measure(stored: torch.Tensor) -> Any:
        linear.weight = torch.nn.Parameter(stored, requires_grad=False)
        return ours.host.measure_weight(base, ours.host.Place(PATH))

    class Codes(torch.Tensor):
        """Another extension's floats that are codes, not values."""

    packed = quantise(weight, "Q8_0")
    assert measure(weight.to(torch.uint8)) == (None, "it is stored as uint8")
    assert measure(weight.as_subclass(Codes)) == (None, "it is stored as a Codes")
    assert measure(torch.zeros_like(weight)) == (None, "its norm is 0")
    packed.tensor_type = type(packed.tensor_type).Q8_K
    assert measure(packed) == (None, "the gguf package cannot decode Q8_K")
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert measure(packed)[1].endswith("the gguf package is missing: pip install gguf")


def test_strengths_auto_is_the_same_on_a_gguf_of_the_model(load_base, ours):
    from qwen_edit_lora.nodes.sweeping.strengths import resolve_strengths

    adapter = build_adapter(ATTENTION)
    plain = load_base("2509_fp32")
    expected, _ = resolve_strengths("auto", plain, [adapter])
    packed = load_base("2509_fp32")
    for path in ATTENTION:
        linear = packed.model.diffusion_model.get_submodule(path)
        packed_weight = quantise(linear.weight.detach(), "Q8_0")
        linear.weight = torch.nn.Parameter(packed_weight, requires_grad=False)
    assert resolve_strengths("auto", packed, [adapter])[0] == expected
    assert ours.host.describe_storage(linear) == ("GGUF Q8_0", False)
