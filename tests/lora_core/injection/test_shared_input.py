"""Down-products that several modules share: any order, no stale value."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from qwen_edit_lora.lora_core.injection.inject import LoraSettings, inject

from .conftest import WIDTH, compute_alone, compute_loss, randomise, run

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
