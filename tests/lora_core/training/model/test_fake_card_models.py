"""Models on a fake card: loaded there, computing there, and never waited for."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from fake_cuda.bases import KINDS as FILES
from fake_cuda.bases import SIZES, write_base
from fake_cuda.card import CUDA, LAZY, FakeCard
from qwen_edit_lora.lora_core.injection.inject import LoraSettings, inject
from qwen_edit_lora.lora_core.training.data.batches import load_repeated
from qwen_edit_lora.lora_core.training.model.gradient_checkpointing import (
    KINDS,
    adapt_to_memory,
    measure_saved_bytes,
)
from qwen_edit_lora.lora_core.training.model.loading import load_transformer
from qwen_edit_lora.lora_core.training.model.quantization import AS_STORED, STORAGES
from qwen_edit_lora.lora_core.training.sampling.image_decoder import load_decoder
from qwen_edit_lora.lora_core.training.sampling.sampling import applied, sample
from tiny import make_dataset, make_item

TEXT_WIDTH = SIZES["joint_attention_dim"]
#: Storage of the file, and the requested storage.
STORED = [
    *(("bf16", storage) for storage in STORAGES if storage != AS_STORED),
    *((kind, AS_STORED) for kind in (*FILES, "gguf")),
    ("rotated int8", "nf4"),
]
LORAS = {
    "lora": LoraSettings(rank=4),
    "dora": LoraSettings(rank=4, use_dora=True),
    "pissa": LoraSettings(rank=4, init="pissa"),
    "pissa as dora": LoraSettings(rank=4, init="pissa", use_dora=True),
    "dropout": LoraSettings(rank=4, dropout=0.2),
}


@pytest.fixture(scope="module")
def find_base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return cache(lambda kind: write_base(folder, kind))


def load(source, card, storage="bf16", settings=None, **more):
    """A model with a LoRA in training, everything on the card."""
    model = load_transformer(source, storage, card.device, **more)
    injection = inject(model.transformer, settings or LORAS["lora"], device=card.device)
    for layer in injection.layers.values():
        layer.train()
    return model, injection


def draw_inputs(device, size=(8, 8), references=((6, 10),), batch=1, num_text=5, is_padded=False):
    """Model inputs of a training step; the noise levels come from the CPU."""

    def draw(*shape):
        return torch.randn(*shape, device=device)

    text = draw(batch, num_text, TEXT_WIDTH)
    mask = torch.ones(batch, num_text, dtype=torch.bool, device=device) if is_padded else None
    return (
        draw(batch, 16, *size),
        [draw(batch, 16, *one) for one in references],
        *(text, mask, torch.rand(batch)),
    )


def find_devices(model) -> set[torch.device]:
    return {tensor.device for tensor in (*model.parameters(), *model.buffers())}


def take_step(model, injection, inputs) -> None:
    """Forward and backward, and every LoRA has a gradient on the card."""
    for parameter in injection.parameters():
        parameter.grad = None
    model(*inputs).float().square().mean().backward()
    assert {parameter.grad.device for parameter in injection.parameters()} == {LAZY}


@pytest.mark.parametrize(("kind", "storage"), STORED)
def test_every_storage_is_loaded_onto_a_card_and_trained_on_there(kind, storage, find_base):
    if storage == "nf4":
        pytest.importorskip("bitsandbytes")
    with FakeCard(LAZY) as card:
        model, injection = load(find_base(kind), card, storage)
        assert find_devices(model) == {LAZY}
        with card.never_waiting():
            take_step(model, injection, draw_inputs(LAZY))
        injection.eject()
        inject(model.transformer, LORAS["dora"], device=LAZY)  # reads the weights themselves
        with card.never_waiting():
            out = model(*draw_inputs(LAZY))
        assert out.device == LAZY
        assert out.dtype == torch.bfloat16


@pytest.mark.parametrize("settings", LORAS)
def test_every_kind_of_lora_is_trained_on_a_card_with_every_kind_of_checkpointing(
    settings, find_base
):
    with FakeCard(LAZY) as card:
        model, injection = load(find_base("bf16"), card, "bf16", LORAS[settings])
        inputs = draw_inputs(LAZY)
        for kind in KINDS:
            model.enable_gradient_checkpointing(kind)
            model.zero_cond_t = kind is not False  # as a 2511
            with card.never_waiting():
                take_step(model, injection, inputs)
        injection.set_strength(0)
        with torch.no_grad():
            assert model(*inputs).device == LAZY


@pytest.fixture(scope="module")
def loaded(find_base):
    """A card and a model on it; to compute with it, enter the card again."""
    card = FakeCard(CUDA)
    with card:
        return card, load(find_base("bf16"), card)[0]


INPUTS = {
    "no reference": {"references": ()},
    "two references": {"references": ((8, 8), (4, 6))},
    "three references": {"references": ((8, 8), (4, 6), (10, 2))},
    "odd sizes": {"size": (7, 9), "references": ((5, 3),)},
    "a batch": {"batch": 3},
    "padded captions": {"batch": 2, "is_padded": True},
}


@pytest.mark.parametrize("is_2511", [False, True], ids=["2509", "2511"])
@pytest.mark.parametrize("name", INPUTS)
def test_a_forward_pass_never_waits_for_the_device(name, is_2511, loaded):
    card, model = loaded
    with card:
        model.zero_cond_t = is_2511
        inputs = draw_inputs(CUDA, **INPUTS[name])
        with card.never_waiting():
            out = model(*inputs)
        assert out.shape == inputs[0].shape
        assert out.device == CUDA


def test_what_a_block_keeps_is_counted_on_a_card(tmp_path, loaded):
    dataset = make_dataset(tmp_path / "data", {"a": make_item(0, (16, 16), ((16, 16),), 8)})
    card, model = loaded
    with card:
        kept = measure_saved_bytes(model, load_repeated(dataset, 0, 1, 0).to(CUDA))
    assert 0 < kept["selective"] < kept[False]


@pytest.mark.parametrize(("free_bytes", "kind"), [(0, True), (2**40, False)])
def test_checkpointing_is_chosen_on_a_card(free_bytes, kind, tmp_path, loaded):
    dataset = make_dataset(tmp_path / "data", {"a": make_item(0)})
    card, model = loaded
    with card:
        batch = load_repeated(dataset, 0, 1, 0).to(CUDA)
        sizes = {"num_blocks": 60, "num_parameters": 1000, "free_bytes": free_bytes}
        adapt_to_memory(model, batch, **sizes)
        assert model.gradient_checkpointing == kind


@pytest.mark.parametrize(
    ("storage", "num_offloaded", "settings"),
    [("bf16", 1, "lora"), ("fp8", 2, "lora"), ("nf4", 2, "lora"), ("int8", 1, "dora")],
)
def test_offloaded_blocks_are_sent_to_the_card_for_both_passes(
    storage, num_offloaded, settings, find_base
):
    with FakeCard(LAZY) as card:
        more = {"num_offloaded": num_offloaded}
        model, injection = load(find_base("bf16"), card, storage, LORAS[settings], **more)
        waiting = [b for b in model.blocks if torch.device("cpu") in find_devices(b)]
        assert len(waiting) == num_offloaded
        with card.never_waiting():
            take_step(model, injection, draw_inputs(LAZY))


@pytest.mark.parametrize(("guidance", "variant"), [(1.0, "2509"), (4.0, "2511")])
def test_a_sample_is_made_on_a_card(guidance, variant, tmp_path, find_base):
    item = make_item(0, (8, 6), ((8, 6), (4, 4)), text_empty=torch.randn(3, TEXT_WIDTH))
    dataset = make_dataset(tmp_path / "data", {"a": item})
    with FakeCard(CUDA) as card:
        model, injection = load(find_base("bf16"), card, zero_cond_t=variant == "2511")
        latents = sample(model, dataset, 0, num_steps=2, guidance=guidance, device=CUDA)
        assert latents.shape == (1, 16, 8, 6)
        assert latents.device == CUDA
        adapter = injection.build_adapter("a")
        injection.eject()
        with applied(model.transformer, adapter):
            assert sample(model, dataset, 0, num_steps=1, device=CUDA).device == CUDA


def test_images_are_decoded_on_a_card(tmp_path):
    from diffusers import AutoencoderKLQwenImage

    AutoencoderKLQwenImage(base_dim=8, z_dim=16).save_pretrained(tmp_path)
    with FakeCard(LAZY) as card:
        decode = load_decoder(tmp_path, card.device)
        latents = torch.randn(1, 16, 4, 6, device=LAZY, requires_grad=True)
        image = decode(latents)
        assert image.shape == (1, 3, 32, 48)
        image.mean().backward()
        assert latents.grad.device == LAZY
