"""Sites that read one tensor share its down-product, in any order."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace

import pytest
import torch
from qwen_edit_lora.lora_core import Adapter, LohaWeights, LoraWeights, compute_delta

pytestmark = pytest.mark.comfy

WIDTH, RANK = 32, 4
BLOCK = "transformer_blocks.0.attn."
QKV = [f"{BLOCK}to_{name}" for name in "qkv"]


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def build_adapter(paths: list[str], seed: int = 0, rank: int = RANK) -> Adapter:
    return Adapter(
        {
            path: LoraWeights(
                draw(rank, WIDTH, seed=seed + 2 * index),
                draw(WIDTH, rank, seed=seed + 2 * index + 1),
                2.0 + index,
            )
            for index, path in enumerate(paths)
        },
        name="drawn",
    )


@pytest.fixture
def build_bank(ours):
    from qwen_edit_lora.nodes.patching.bank import Bank
    from qwen_edit_lora.nodes.patching.layouts import PLAIN

    def build(*adapters: Adapter) -> Bank:
        return Bank([(a, frozenset(a), PLAIN) for a in adapters], torch.float32)

    return build


@pytest.fixture
def count_products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The ranks of the down-products that were computed."""
    from qwen_edit_lora.nodes.patching.bank import DownProduct

    found: list[int] = []
    compute = DownProduct.compute

    def record(self, site, x, down):
        found.append(len(down))
        return compute(self, site, x, down)

    monkeypatch.setattr(DownProduct, "compute", record)
    return found


def expect(adapter: Adapter, path: str, x: torch.Tensor, gain: float) -> torch.Tensor:
    return gain * x @ compute_delta(adapter.modules[path]).T


def check(site, adapter, path, x, gain=1.0):
    y = draw(*x.shape[:-1], WIDTH, seed=9)
    expected = y + expect(adapter, path, x, gain)
    torch.testing.assert_close(site.add(y.clone(), x, (gain,)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_q_k_and_v_read_x_once_in_any_order(order, build_bank, count_products):
    adapter = build_adapter(QKV)
    bank = build_bank(adapter)
    for seed in (1, 2):  # the second time like the next step
        x = draw(2, 5, WIDTH, seed=seed)
        for index in order:
            check(bank.sites[QKV[index]], adapter, QKV[index], x, gain=index + 0.5)
    assert count_products == [3 * RANK, 3 * RANK]


def test_sites_of_other_tensors_compute_their_own_product(build_bank, count_products):
    adapter = build_adapter(QKV)
    bank = build_bank(adapter)
    inputs = [draw(5, WIDTH, seed=seed) for seed in range(3)]
    for path, x in zip(QKV, inputs, strict=True):
        check(bank.sites[path], adapter, path, x)
    # Equal values in another tensor, and the first one again after a change of it.
    x = inputs[0]
    check(bank.sites[QKV[0]], adapter, QKV[0], x)
    check(bank.sites[QKV[1]], adapter, QKV[1], x.clone())
    check(bank.sites[QKV[0]], adapter, QKV[0], x)
    x.mul_(2)
    check(bank.sites[QKV[1]], adapter, QKV[1], x)
    assert len(count_products) == 7


def test_a_site_takes_a_product_once_even_without_version_counters(build_bank):
    """A buffer that is used again for the next step, under inference mode."""
    adapter = build_adapter(QKV)
    bank = build_bank(adapter)
    with torch.inference_mode():
        x = draw(5, WIDTH)
        for step in range(3):
            for path in QKV[step:] + QKV[:step]:
                check(bank.sites[path], adapter, path, x)
            x.add_(step + 1)


def test_streams_do_not_share_and_neither_do_blocks(build_bank, count_products):
    paths = [*QKV, *(f"{BLOCK}add_{name}_proj" for name in "qkv")]
    paths += [path.replace("blocks.0", "blocks.1") for path in paths]
    adapter = build_adapter(paths)
    bank = build_bank(adapter)
    x = draw(5, WIDTH)
    for path in paths:
        check(bank.sites[path], adapter, path, x)
    assert count_products == [3 * RANK] * 4


@pytest.mark.parametrize("paths", [QKV[1:], QKV[:1] + QKV[2:], QKV[2:]], ids=["k v", "q v", "v"])
def test_some_of_the_three_may_have_no_lora(paths, build_bank, count_products):
    adapter = build_adapter(paths)
    bank = build_bank(adapter)
    x = draw(5, WIDTH)
    for path in paths:
        check(bank.sites[path], adapter, path, x)
    assert count_products == [len(paths) * RANK]


def test_another_kind_on_one_of_the_three_does_not_disturb_the_others(build_bank):
    mixed = build_adapter(QKV)
    loha = LohaWeights(*(draw(WIDTH, 2), draw(2, WIDTH, seed=1)) * 2)
    mixed = replace(mixed, modules={**mixed.modules, QKV[1]: loha})
    bank = build_bank(mixed, build_adapter(QKV[:2], seed=20, rank=3))
    x = draw(5, WIDTH)
    other = build_adapter(QKV[:2], seed=20, rank=3)
    for path in QKV:
        gains = (0.5, -2.0)[: 2 if path in other else 1]
        y = draw(5, WIDTH, seed=9)
        expected = y + expect(mixed, path, x, 0.5)
        if path in other:
            expected = expected + expect(other, path, x, -2.0)
        found = bank.sites[path].add(y.clone(), x, gains)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_nothing_is_kept_after_a_call_or_when_x_is_freed(build_bank):
    adapter = build_adapter(QKV)
    bank = build_bank(adapter)
    (product,) = bank.products
    x = draw(5, WIDTH)
    check(bank.sites[QKV[0]], adapter, QKV[0], x)
    assert product.take(1, x) is not None
    check(bank.sites[QKV[0]], adapter, QKV[0], x)
    bank.forget_inputs()
    assert product.take(1, x) is None


def test_gradients_reach_x_through_a_shared_product(build_bank):
    adapter = build_adapter(QKV)
    bank = build_bank(adapter)
    x = draw(2, 5, WIDTH).requires_grad_()
    weights = [draw(WIDTH, WIDTH, seed=seed) for seed in range(3)]
    with torch.no_grad():  # a product computed here must not be reused where gradients are required
        bank.sites[QKV[2]].add(x @ weights[2].T, x, (0.1,))
    bases = [x @ weight.T for weight in weights]
    kept = [base.detach().clone() for base in bases]
    outputs = [
        bank.sites[path].add(base, x, (gain,))
        for path, base, gain in zip(QKV, bases, (0.5, 1.0, -2.0), strict=True)
    ]
    assert all(torch.equal(a, b) for a, b in zip(bases, kept, strict=True))
    sum(output.square().sum() for output in outputs).backward()
    expected = draw(2, 5, WIDTH).requires_grad_()
    total = 0.0
    for path, weight, gain in zip(QKV, weights, (0.5, 1.0, -2.0), strict=True):
        total = (
            total
            + (expected @ (weight + gain * compute_delta(adapter.modules[path])).T).square().sum()
        )
    total.backward()
    torch.testing.assert_close(x.grad, expected.grad, rtol=1e-4, atol=1e-2)


def test_a_bank_can_be_copied(build_bank):
    adapter = build_adapter(QKV)
    bank = build_bank(adapter)
    x = draw(5, WIDTH)
    check(bank.sites[QKV[0]], adapter, QKV[0], x)
    twin = copy.deepcopy(bank)
    for weight in bank.parameters():
        weight.data.zero_()
    for path in QKV:
        check(twin.sites[path], adapter, path, x)


def test_outputs_of_another_dtype_than_x_are_added_to_in_their_own(build_bank):
    adapter = build_adapter(QKV[:1])
    bank = build_bank(adapter)
    x, y = draw(5, WIDTH).bfloat16(), draw(5, WIDTH, seed=9)
    found = bank.sites[QKV[0]].add(y.clone(), x, (1.0,))
    assert found.dtype == torch.float32
    expected = y + expect(adapter, QKV[0], x.float(), 1.0)
    assert (found - expected).norm() < 0.02 * (expected - y).norm()
