"""Bytes that a model's element-wise operations read and write, counted rather than timed.

On a GPU these are memory-bound, so their time is proportional to their bytes. Products and
attention are not counted, nor operations that move nothing (views, empty tensors). PyTorch computes
`rms_norm` with one kernel on CUDA and eight operations on a CPU; it is counted as on CUDA.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm", "linear")
UNTOUCHED = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach")
#: In-place operations that do not read the old value.
OVERWRITING = ("copy_", "zero_", "fill_")


class Traffic(TorchDispatchMode):
    """Counts operations inside this context, in forward and backward passes.

    Attributes:
        moved_bytes: bytes read and written.
        num_kernels: operations that moved any bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.moved_bytes = self.num_kernels = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        if name in (*PRODUCTS, *UNTOUCHED) or "scaled_dot_product" in name:
            return out
        is_written = any(a.alias_info and a.alias_info.is_write for a in func._schema.arguments)
        if not is_written and any(result.alias_info for result in func._schema.returns):
            return out
        inputs = args[1:] if name in OVERWRITING else args
        self.add(inputs, kwargs, out)
        return out

    def add(self, *tensors: Any) -> None:
        """Adds one kernel that reads and writes these tensors."""
        moved = sum(count_bytes(t) for t in tree_leaves(tensors) if isinstance(t, torch.Tensor))
        self.moved_bytes += moved
        self.num_kernels += moved > 0


def count_bytes(tensor: torch.Tensor) -> int:
    """Bytes of its memory; an expanded axis is read once."""
    places = zip(tensor.shape, tensor.stride(), strict=True)
    size = torch.Size(length for length, step in places if step or length == 1)
    return size.numel() * tensor.element_size()


@contextlib.contextmanager
def counting_as_on_cuda(counter: Traffic, steps: Any, use_kernels: bool) -> Iterator[None]:
    """Counts `rms_norm` as one kernel each way, and norm + rotation too if Triton's are used.

    Args:
        steps: the module `head_rotation`.
    """
    plain_norm, choose = functional.rms_norm, steps.choose_steps

    def norm(x: torch.Tensor, shape: Any, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return CountedNorm.apply(x, weight, eps, counter, plain_norm)

    functional.rms_norm = norm
    if use_kernels:
        kernels = CountedKernels(counter, steps.OPERATIONS)
        steps.choose_steps = lambda x: kernels
    try:
        yield
    finally:
        functional.rms_norm, steps.choose_steps = plain_norm, choose


class CountedNorm(torch.autograd.Function):
    """`rms_norm` counted as on CUDA: reads x, writes y; reads x and dy, writes dx."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, counter, norm):
        ctx.rest = weight, eps, counter, norm
        ctx.save_for_backward(x)
        with _disable_current_modes():
            out = norm(x, weight.shape, weight, eps)
        counter.add(x, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor):
        (x,) = ctx.saved_tensors
        weight, eps, counter, norm = ctx.rest
        with _disable_current_modes(), torch.enable_grad():
            leaf = x.detach().requires_grad_()
            (grad_x,) = torch.autograd.grad(norm(leaf, weight.shape, weight, eps), leaf, grad)
        counter.add(x, grad, grad_x)
        return grad_x, None, None, None, None


class CountedKernels:
    """`rotation_kernel`'s functions, computed with PyTorch operations and counted as kernels."""

    def __init__(self, counter: Traffic, operations: Any):
        self.counter = counter
        self.operations = operations

    def write_rotated(self, x, weight, cos, sin, first, eps, joint) -> None:
        with _disable_current_modes():
            self.operations.write_rotated(x, weight, cos, sin, first, eps, joint)
        place = slice(first, first + x.shape[1])
        self.counter.add(x, cos[place], sin[place], joint[:, place])

    def compute_gradient(self, grad, x, weight, cos, sin, first, eps) -> torch.Tensor:
        with _disable_current_modes():
            grad_x = self.operations.compute_gradient(grad, x, weight, cos, sin, first, eps)
        place = slice(first, first + x.shape[1])
        self.counter.add(grad[:, place], x, cos[place], sin[place], grad_x)
        return grad_x
