"""Tensors that claim to be on a GPU: shapes, dtypes and devices as in a run, but no data.

torch's FakeTensorMode infers the result of an operation on a missing device, and refuses operands
on different devices with the same message as a real one. This module adds:

- CPU-only work is computed for real: files, random numbers, data order.
- Reads from the card, for which a real host waits until the card is done, are recorded and return
  tensors full of a fixed value: runs continue after reading a loss, and files are written.
- Backward passes. torch's engine queries CUDA's streams, which fails without a driver. "lazy" is
  known to every build of torch, is not an accelerator and has no streams: fake tensors on it take
  the same path through our code, custom backward passes included, and refuse CPU operands as CUDA
  tensors do. Code that checks for the type "cuda" is tested on CUDA, forward only.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

CUDA = torch.device("cuda:0")
#: For code with a backward pass.
LAZY = torch.device("lazy:0")

PACKAGE = "qwen_edit_lora"
READ = torch.ops.aten._local_scalar_dense.default
COPY, COPY_INTO = torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default


class FakeCard(TorchDispatchMode):
    """Inside a block, tensors can be created on, moved to and computed with on `device`.

    Tensors created in one block can be used in a later one of the same card.

    Attributes:
        answer: value of any floating-point tensor of the card when it is read; booleans are True,
            integers 1.
        waits: "file:line" of each place in our code that read from the card.
    """

    def __init__(self, device: torch.device = CUDA, answer: float = 1.0):
        super().__init__()
        self.device = device
        self.answer = answer
        self.waits: list[str] = []
        self.fakes = FakeTensorMode(allow_non_fake_inputs=True)
        self.around = ExitStack()

    def __enter__(self) -> FakeCard:
        clear_caches()
        self.around.callback(clear_caches)  # of tensors without data
        for patch in list_patches():
            self.around.enter_context(patch)
        self.around.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # to save it
        self.around.enter_context(self.fakes)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.around.close()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        made_on = torch.device(kwargs.get("device") or "cpu")
        if FakeTensor not in types and made_on.type != self.device.type:
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func is READ:
            self.note_wait()
            return self.choose_answer(args[0].dtype)
        if is_download(func, args, kwargs):
            return self.download(func, args, kwargs)
        return func(*args, **kwargs)

    def download(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
        """A real tensor on the CPU, full of the answer."""
        is_new = func is COPY
        is_async = kwargs.get("non_blocking") or (not is_new and len(args) > 2 and args[2])
        if not is_async:
            self.note_wait()
        dtype = kwargs.get("dtype") or args[0].dtype
        with unset_fake_temporarily():
            into = torch.empty(args[0].shape, dtype=dtype) if is_new else args[0]
            return into.fill_(self.choose_answer(into.dtype))

    def choose_answer(self, dtype: torch.dtype) -> bool | int | float:
        if dtype.is_floating_point:
            return self.answer
        return True if dtype == torch.bool else 1

    def note_wait(self) -> None:
        frame = sys._getframe()
        while frame is not None and not is_ours(frame.f_code.co_filename):
            frame = frame.f_back
        self.waits.append("a test" if frame is None else describe(frame))

    @contextmanager
    def never_waiting(self) -> Iterator[None]:
        """Fails if the block made the host wait for the card."""
        before = len(self.waits)
        yield
        places = ", ".join(self.waits[before:])
        assert not places, f"the host waited for the card at {places}"

    def put(self, module: nn.Module) -> nn.Module:
        """The module with all its tensors on the card, also those created in inference mode."""
        return module._apply(lambda tensor: tensor.clone().to(self.device))


@functools.cache
def is_ours(file: str) -> bool:
    parts = Path(file).parts
    return ("lora_core" in parts or "nodes" in parts) and "tests" not in parts


def describe(frame: FrameType) -> str:
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


def is_download(func: Any, args: tuple, kwargs: dict[str, Any]) -> bool:
    if func is COPY:
        there = torch.device(kwargs.get("device") or args[0].device)
        return args[0].device.type != "cpu" and there.type == "cpu"
    return func is COPY_INTO and args[0].device.type == "cpu" and args[1].device.type != "cpu"


def list_patches() -> list[Any]:
    """Patches for what torch lacks for tensors without data, or for the device "lazy"."""
    is_autocast_enabled = torch.is_autocast_enabled

    def ask(*device_type: str) -> bool:
        return LAZY.type not in device_type and is_autocast_enabled(*device_type)

    generator = SimpleNamespace(
        device=lambda index: nullcontext(),
        get_rng_state=torch.get_rng_state,
        set_rng_state=lambda state: None,
    )
    return [
        mock.patch.object(nn.Module, "_apply", replace_tensors),
        mock.patch.object(torch, "is_autocast_enabled", ask),
        mock.patch.object(torch, LAZY.type, generator, create=True),
    ]


def replace_tensors(
    module: nn.Module, function: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
) -> nn.Module:
    """`Module._apply` swaps the data of parameters in place; here they have none."""
    for child in module.children() if recurse else ():
        child._apply(function)
    for name, parameter in module._parameters.items():
        moved = None if parameter is None else function(parameter)
        if moved is not parameter:
            module._parameters[name] = nn.Parameter(moved, parameter.requires_grad)
    for name, buffer in module._buffers.items():
        module._buffers[name] = None if buffer is None else function(buffer)
    return module


def clear_caches() -> None:
    """Clears every functools cache of our own modules, and bitsandbytes' code books."""
    modules = [m for name, m in sys.modules.items() if name.partition(".")[0] == PACKAGE]
    for value in [value for module in modules for value in vars(module).values()]:
        if isinstance(value, functools._lru_cache_wrapper):
            value.cache_clear()
    functional = sys.modules.get("bitsandbytes.functional")
    if functional is not None:
        functional.name2qmap.clear()
