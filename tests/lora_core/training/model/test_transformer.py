"""The base model's forward: batches, padding, gradients. ComfyUI's is the oracle in tests/nodes."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from demo_base import dit
from qwen_edit_lora.lora_core.injection.inject import LoraSettings, inject
from qwen_edit_lora.lora_core.training.model import rope
from qwen_edit_lora.lora_core.training.model.architecture import choose_axes
from qwen_edit_lora.lora_core.training.model.loading import load_transformer
from qwen_edit_lora.lora_core.training.model.transformer import pack, unpack
from small_bases import TINY, write_base
from torch.utils._python_dispatch import TorchDispatchMode

TEXT_WIDTH = dit.TEXT_WIDTH
#: Rounding in float32; the other ways of computing differ by more.
TOLERANCE = 1e-5


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=["2509", "2511"])
def model(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("dit") / "dit.safetensors"
    dit.write_dit(path, request.param, "fp32")
    return load_transformer(path, "fp32", compute_dtype=torch.float32)


def make_batch(size=2):
    return (
        draw(size, 16, 8, 12),
        [draw(size, 16, 10, 6, seed=1), draw(size, 16, 7, 5, seed=2)],
        draw(size, 9, TEXT_WIDTH, seed=3),
        None,
        torch.linspace(0.2, 0.9, size),
    )


def take(batch, index, num_text_tokens=None):
    latents, references, text, _, sigma = batch
    one = slice(index, index + 1)
    return (
        latents[one],
        [reference[one] for reference in references],
        text[one, :num_text_tokens],
        None,
        sigma[one],
    )


def test_an_item_gets_the_same_result_in_a_batch_as_alone(model):
    batch = make_batch(3)
    with torch.no_grad():
        together = model(*batch)
        for i in range(3):
            alone = model(*take(batch, i))
            torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=TOLERANCE)


def test_padding_of_the_text_changes_nothing(model):
    latents, references, text, _, sigma = batch = make_batch(2)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 4:] = False
    text[1, 4:] = 100.0  # any values there
    with torch.no_grad():
        padded = model(latents, references, text, mask, sigma)
        for i, length in enumerate((9, 4)):
            alone = model(*take(batch, i, length))
            torch.testing.assert_close(padded[i : i + 1], alone, rtol=0, atol=TOLERANCE)


def test_a_mask_without_padding_changes_nothing(model):
    latents, references, text, _, sigma = make_batch(1)
    with torch.no_grad():
        masked = model(latents, references, text, torch.ones(1, 9), sigma)
        assert torch.equal(masked, model(latents, references, text, None, sigma))


def test_references_have_an_order(model):
    latents, references, text, _, sigma = make_batch(1)
    with torch.no_grad():
        swapped = model(latents, references[::-1], text, None, sigma)
        difference = swapped - model(latents, references, text, None, sigma)
    assert difference.abs().max() > 100 * TOLERANCE


def test_noise_levels_are_not_rounded_to_the_compute_dtype(model):
    latents, references, text, _, _ = make_batch(1)
    levels = torch.tensor([0.7003]), torch.tensor([0.7003]).bfloat16().float()
    model.compute_dtype = torch.bfloat16
    model.bfloat16()
    try:
        with torch.no_grad():
            exact, rounded = (model(latents, references, text, None, s) for s in levels)
    finally:
        model.compute_dtype = torch.float32
        model.float()
    assert not torch.equal(exact, rounded)


def test_gradients_reach_the_inputs_and_no_weight(model):
    latents, references, text, _, sigma = make_batch(1)
    inputs = [latents.requires_grad_(), text.requires_grad_(), references[0].requires_grad_()]
    model(latents, references, text, None, sigma).square().mean().backward()
    assert all(x.grad is not None and x.grad.abs().max() > 0 for x in inputs)
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())


def test_gradient_checkpointing_changes_no_bit(model):
    gradients = []
    for enabled in (False, True, "selective"):
        latents, references, text, _, sigma = make_batch(2)
        latents.requires_grad_()
        model.enable_gradient_checkpointing(enabled)
        model(latents, references, text, None, sigma).square().mean().backward()
        gradients.append(latents.grad)
    model.enable_gradient_checkpointing(False)
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])


def test_checkpointing_keeps_one_tensor_per_block_and_stream(model):
    weights = {p.data_ptr() for p in model.parameters()}  # are in memory anyway

    def count_saved() -> int:
        saved = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: saved.setdefault((x.data_ptr(), x.shape), x), lambda x: x
        ):
            latents, references, text, _, sigma = make_batch(1)
            model(latents.requires_grad_(), references, text, None, sigma)
        return sum(x.numel() for (place, _), x in saved.items() if place not in weights)

    everything = count_saved()
    model.enable_gradient_checkpointing("selective")
    selected = count_saved()
    model.enable_gradient_checkpointing()
    kept = count_saved()
    model.enable_gradient_checkpointing(False)
    assert kept < selected < everything / 2
    assert kept < everything / 4


def test_gradients_equal_those_of_finite_differences(tmp_path):
    path = dit.write_dit(tmp_path / "dit.safetensors", "2511", "fp32")
    model = load_transformer(path, "fp32", compute_dtype=torch.float64).double()
    inputs = draw(1, 16, 3, 4).double().requires_grad_()
    rest = [draw(1, 16, 4, 2).double()], draw(1, 3, TEXT_WIDTH).double()
    sigma = torch.tensor([0.4])
    direction = draw(1, 16, 3, 4, seed=5).double()

    def compute(x: torch.Tensor) -> torch.Tensor:
        return model(x, *rest, None, sigma).square().sum()

    compute(inputs).backward()
    with torch.no_grad():
        step = 1e-6 * direction
        numeric = (compute(inputs + step) - compute(inputs - step)) / 2e-6
    assert (inputs.grad * direction).sum().item() == pytest.approx(numeric.item(), rel=1e-6)


@pytest.mark.parametrize("references", [0, 1], ids=["no reference", "same size"])
def test_forward_equals_diffusers_where_the_conventions_agree(references, tmp_path):
    from diffusers import QwenImageTransformer2DModel

    state_dict = dit.make_dit("2509")
    path = dit.write_dit(tmp_path / "dit.safetensors", "2509", "fp32", state_dict)
    oracle = QwenImageTransformer2DModel(
        num_layers=dit.NUM_BLOCKS,
        attention_head_dim=dit.HEAD_WIDTH,
        num_attention_heads=dit.NUM_HEADS,
        joint_attention_dim=TEXT_WIDTH,
        axes_dims_rope=choose_axes(dit.HEAD_WIDTH),
    )
    oracle.load_state_dict(state_dict)
    latents, text, sigma = draw(1, 16, 8, 12), draw(1, 9, TEXT_WIDTH, seed=3), torch.tensor([0.7])
    images = [draw(1, 16, 8, 12, seed=i + 1) for i in range(references)]
    with torch.no_grad():
        expected = oracle(
            hidden_states=torch.cat([pack(x) for x in (latents, *images)], dim=1),
            encoder_hidden_states=text,
            timestep=sigma,
            img_shapes=[[(1, 4, 6)] * (1 + references)],
            return_dict=False,
        )[0][:, :24]
        model = load_transformer(path, "fp32", compute_dtype=torch.float32)
        found = model(latents, images, text, None, sigma)
    torch.testing.assert_close(pack(found), expected, rtol=0, atol=TOLERANCE)


def test_packing_is_undone_by_unpacking():
    image = draw(2, 16, 6, 10)
    assert torch.equal(unpack(pack(image), (3, 5)), image)
    assert torch.equal(pack(image)[0, 1, :4], image[0, 0, :2, 2:4].flatten())


def test_text_positions_start_at_half_the_target_whatever_the_references_are():
    positions = rope.compute_positions([(4, 10), (40, 50)], num_text_tokens=3)
    assert positions[:3].tolist() == [[n, n, n] for n in (5.0, 6.0, 7.0)]
    assert positions[3].tolist() == [0.0, -2.0, -5.0]
    assert positions[3 + 40].tolist() == [1.0, -20.0, -25.0]


def test_odd_grids_are_centred_on_their_middle_patch():
    positions = rope.compute_positions([(3, 1)], num_text_tokens=0)
    assert positions[:, 1].tolist() == [-1.0, 0.0, 1.0]


def test_a_rotation_first_computed_in_inference_mode_can_be_trained_with(model):
    rope.compute_rotation.cache_clear()
    latents, references, text, _, sigma = make_batch(1)
    with torch.inference_mode():
        model(latents, references, text, None, sigma)
    latents.requires_grad_()
    model(latents, references, text, None, sigma).sum().backward()
    assert latents.grad is not None


@pytest.mark.parametrize(
    "checkpointed", [False, True, "selective"], ids=["plain", "checkpointed", "selective"]
)
@pytest.mark.parametrize("storage", ["fp32", "fp8"])
def test_compiled_blocks_give_the_same_loss_and_gradients(storage, checkpointed, tmp_path):
    path = dit.write_dit(tmp_path / "dit.safetensors", "2511", "fp32")
    batch = make_batch(2)
    found = []
    for is_compiled in (False, True):
        model = load_transformer(path, storage, compute_dtype=torch.float32)
        model.enable_gradient_checkpointing(checkpointed)
        injection = inject(model.transformer, LoraSettings(rank=4))
        fill(injection)
        if is_compiled:
            for block in model.blocks:
                block.compile(backend="aot_eager", fullgraph=True)
        loss = model(*batch).square().mean()
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in injection.parameters())])
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-6)


def fill(injection):
    torch.manual_seed(0)
    with torch.no_grad():
        for layer in injection.layers.values():
            layer.lora_B.normal_(std=0.05)


def test_blocks_share_their_compiled_code(tmp_path):
    torch.compiler.reset()  # what other tests compiled is shared as well
    path = write_base(tmp_path / "base.safetensors", 6, **TINY)
    model = load_transformer(path, compute_dtype=torch.float32)
    model.enable_gradient_checkpointing()
    inject(model.transformer, LoraSettings(rank=4))
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    for block in model.blocks:
        block.compile(backend=count, fullgraph=True)
    model(*make_batch(1)).sum().backward()
    # Of the part that is computed again the first block's (its inputs want no gradient), the
    # middle ones' and the last one's (it has fewer LoRAs); of the rest the last one's and others'.
    assert len(graphs) == 5


def test_the_last_product_of_a_checkpointed_block_is_not_computed_again(model):
    last = model.blocks[0].img_mlp.net[2]
    calls = []
    hook = last.register_forward_hook(lambda *_: calls.append(1))
    latents, *rest = make_batch(1)
    model.enable_gradient_checkpointing()
    model(latents.requires_grad_(), *rest).sum().backward()
    model.enable_gradient_checkpointing(False)
    hook.remove()
    assert len(calls) == 1


class CountedCalls(TorchDispatchMode):
    """Counts how often each operation runs."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[function] += 1
        return function(*args, **(kwargs or {}))


def test_selective_checkpointing_repeats_only_the_mlps_first_product(model):
    block = model.blocks[0]
    projections = {name: getattr(block.attn, name) for name in ("to_q", "add_v_proj")}
    modules = {**projections, "first": block.img_mlp.net[0].proj, "last": block.img_mlp.net[2]}
    calls = Counter()
    hooks = [
        module.register_forward_hook(lambda *_, name=name: calls.update([name]))
        for name, module in modules.items()
    ]
    latents, *rest = make_batch(1)
    model.enable_gradient_checkpointing("selective")
    with CountedCalls() as counted:
        model(latents.requires_grad_(), *rest).sum().backward()
    model.enable_gradient_checkpointing(False)
    for hook in hooks:
        hook.remove()
    assert calls == {"to_q": 1, "add_v_proj": 1, "first": 2, "last": 1}
    names = Counter({str(function): number for function, number in counted.counts.items()})
    kernels = {name: number for name, number in names.items() if "scaled_dot_product" in name}
    forwards = {name: number for name, number in kernels.items() if "backward" not in name}
    assert sum(forwards.values()) == len(model.blocks)
    assert sum(kernels.values()) == 2 * len(model.blocks)


@pytest.mark.parametrize(
    "settings",
    [
        LoraSettings(rank=4),
        LoraSettings(rank=4, targets=("attention",)),
        LoraSettings(rank=4, use_dora=True),
        LoraSettings(rank=4, init="pissa"),
        LoraSettings(rank=4, dropout=0.4),
    ],
    ids=["lora", "attention", "dora", "pissa", "dropout"],
)
@pytest.mark.parametrize("storage", ["fp32", "nf4"])
def test_checkpointing_changes_no_bit_of_any_loras_gradients(storage, settings, tmp_path):
    path = dit.write_dit(tmp_path / "dit.safetensors", "2511", "fp32")
    model = load_transformer(path, storage, compute_dtype=torch.float32)
    injection = inject(model.transformer, settings)
    fill(injection)
    for layer in injection.layers.values():
        layer.train()
    gradients = []
    for enabled in (False, True, "selective"):
        model.enable_gradient_checkpointing(enabled)
        torch.manual_seed(1)
        model(*make_batch(2)).square().mean().backward()
        gradients.append([p.grad for p in injection.parameters()])
        for parameter in injection.parameters():
            parameter.grad = None
    assert all(map(torch.equal, gradients[0], gradients[1]))
    assert all(map(torch.equal, gradients[0], gradients[2]))
    assert any(grad.abs().max() > 0 for grad in gradients[0])


def test_strength_0_is_bit_identical_to_the_base_under_checkpointing(model, tmp_path):
    batch = make_batch(1)
    with torch.no_grad():
        expected = model(*batch)
    injection = inject(model.transformer, LoraSettings(rank=4))
    fill(injection)
    injection.set_strength(0.0)
    model.enable_gradient_checkpointing()
    try:
        assert torch.equal(model(*batch).detach(), expected)
    finally:
        injection.eject()
        model.enable_gradient_checkpointing(False)
