"""The fake card refuses what a real one refuses, in forward and backward passes."""

from __future__ import annotations

import pytest
import torch

from fake_cuda.card import CUDA, LAZY, FakeCard

MIXED = "Expected all tensors to be on the same device"
DEVICES = pytest.mark.parametrize("device", [CUDA, LAZY], ids=str)


class Scaled(torch.autograd.Function):
    """Its backward pass uses a tensor from whatever device it was created on."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, scale: torch.Tensor):
        ctx.scale = scale
        return 2 * x

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        return grad * ctx.scale, None


@DEVICES
def test_operands_on_two_devices_are_refused(device):
    with FakeCard(device):
        x, y = torch.ones(2, 3, device=device), torch.ones(3)
        assert (x + y.to(device)).device == device
        assert (x + torch.ones(())).device == device  # like CUDA, accepts a scalar on the CPU
        with pytest.raises(RuntimeError, match=MIXED):
            x + y
        with pytest.raises(RuntimeError, match=MIXED):
            x @ y


def test_a_backward_pass_runs_and_refuses_mixed_devices_too():
    with FakeCard(LAZY):
        x = torch.ones(2, 3, device=LAZY, requires_grad=True)
        Scaled.apply(x, torch.ones(3, device=LAZY)).sum().backward()
        assert x.grad.device == LAZY
        with pytest.raises(RuntimeError, match=MIXED):
            Scaled.apply(x, torch.ones(3)).sum().backward()


def test_a_checkpoint_is_recomputed_on_the_card():
    from torch.utils.checkpoint import checkpoint

    counts = []

    def function(x: torch.Tensor) -> torch.Tensor:
        counts.append(x.device)
        return x.sin() * torch.rand(3, device=x.device)

    with FakeCard(LAZY):
        x = torch.ones(2, 3, device=LAZY, requires_grad=True)
        checkpoint(function, x, use_reentrant=False).sum().backward()
    assert counts == [LAZY, LAZY]


@DEVICES
@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.item(),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.to("cpu"),
        lambda x: torch.empty(()).copy_(x),
        lambda x: bool(x > 0),
        lambda x: float(x),
    ],
    ids=["item", "tolist", "cpu", "to", "copy_", "bool", "float"],
)
def test_waiting_for_the_card_is_recorded(read, device):
    with FakeCard(device) as card:
        x = torch.ones((), device=device)
        with card.never_waiting():
            y = x * 2 + torch.ones(()).to(device)
            y.to("cpu", non_blocking=True)
        with pytest.raises(AssertionError), card.never_waiting():
            read(y)


def test_what_is_on_the_cpu_is_real():
    with FakeCard() as card:
        values = torch.arange(4)
        assert values.tolist() == [0, 1, 2, 3]
        assert torch.randperm(4, generator=torch.Generator().manual_seed(0)).sum().item() == 6
        module = torch.nn.Linear(2, 2)
        weight = module.weight
        assert card.put(module).weight.device == CUDA
        assert torch.is_tensor(weight.data.numpy().sum() + torch.zeros(1))
        assert card.waits == []
    assert torch.ones(2).tolist() == [1, 1]
