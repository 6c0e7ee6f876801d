"""Stand-ins for a GPU: comfy_aimdo's paged memory in main memory, and counts of memory traffic.

`PagedMemory` replaces the functions of the comfy_aimdo library that ComfyUI's dynamic VRAM uses, so
that ComfyUI's own ModelPatcherDynamic and casts run unchanged. `Traffic` counts, for tensors with
one row per token, how often one of the stream's width is read or written.
"""

from __future__ import annotations

import ctypes
import inspect
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class HostBuffer:
    """comfy_aimdo's pinned memory, in plain memory."""

    def __init__(self, size: int, prewarm: int = 0, max_grow_size: int = 0):
        self.memory, self.size = ctypes.create_string_buffer(64 * 1024**2), 0

    def get_raw_address(self) -> int:
        return ctypes.addressof(self.memory)

    def extend(self, size: int, reallocate: bool = False, register: bool = True) -> int:
        self.size += size
        return self.get_raw_address()

    def truncate(self, size: int, do_unregister: bool = True) -> None:
        self.size = size


class Pages:
    """A model's paged memory (ModelVBAR): every module has room, or none has."""

    def __init__(self, memory: PagedMemory, device: torch.device):
        self.memory, self.device = memory, device
        self.num_pages = 0

    def alloc(self, size: int) -> tuple:
        self.num_pages += 1
        return self, torch.empty(size, dtype=torch.uint8, device=self.device), size

    def prioritize(self, *_: Any) -> None:
        self.memory.priorities = [p for p in self.memory.priorities if p is not self] + [self]

    def loaded_size(self) -> int:
        return 0

    def free_memory(self, size: int) -> int:
        return 0


class PagedMemory:
    """The library's functions, and a record of their calls.

    Attributes:
        faults: the pages that were requested, in order.
        pinned: how many faults have not been released.
        priorities: from the first to be evicted to the last.
    """

    def __init__(self, has_room: bool):
        self.has_room = has_room
        self.faults: list[tuple] = []
        self.pinned = 0
        self.priorities: list[Pages] = []

    def fault(self, page: tuple) -> bytes | None:
        self.faults.append(page)
        if not self.has_room:
            return None
        self.pinned += 1
        return b"resident"

    def unpin(self, page: tuple) -> None:
        self.pinned -= 1

    def install(self, monkeypatch: Any, comfyui: SimpleNamespace) -> None:
        """Turns dynamic VRAM on as main.py does, with these pages behind it."""
        management, patcher, ops = comfyui.model_management, comfyui.model_patcher, comfyui.ops
        memory = self

        class PagedPatcher(patcher.ModelPatcherDynamic):
            def __new__(cls, *args: Any, **kwargs: Any) -> Any:
                return object.__new__(cls)  # ComfyUI itself chooses another class on the CPU

            def _vbar_get(self, create: bool = False) -> Any:
                if create and self.load_device not in self.model.dynamic_vbars:
                    self.model.dynamic_vbars[self.load_device] = Pages(memory, self.load_device)
                return self.model.dynamic_vbars.get(self.load_device)

        monkeypatch.setattr(patcher, "CoreModelPatcher", PagedPatcher)
        monkeypatch.setattr(management.comfy.memory_management, "aimdo_enabled", True)
        monkeypatch.setattr(patcher.comfy_aimdo.host_buffer, "HostBuffer", HostBuffer)
        for name, function in {
            "vbar_fault": self.fault,
            "vbar_unpin": self.unpin,
            "vbar_signature_compare": lambda a, b: a is not None and a == b,
            "vbars_analyze": lambda device=None: 0,
        }.items():
            monkeypatch.setattr(ops.comfy_aimdo.model_vbar, name, function)
        monkeypatch.setattr(ops.comfy_aimdo.torch, "aimdo_to_tensor", lambda page, device: page[1])


def page_on_the_cpu(monkeypatch: Any, ops: Any) -> None:
    """There is no second device here, so ComfyUI's cast must not check for one before it pages."""
    source = inspect.getsource(ops.cast_bias_weight)
    for condition in ("comfy.model_management.is_device_cpu(device)", "s.weight.device != device"):
        assert f'hasattr(s, "_v") and {condition}' in source
    source = source.replace("comfy.model_management.is_device_cpu(device)", "False")
    source = source.replace('hasattr(s, "_v") and s.weight.device != device', 'hasattr(s, "_v")')
    namespace = dict(vars(ops))
    exec(source, namespace)  # noqa: S102
    monkeypatch.setattr(ops, "cast_bias_weight", namespace["cast_bias_weight"])


class Traffic(TorchDispatchMode):
    """Counts reads and writes of tensors with `num_rows` rows, by their number of columns.

    Views and allocations cost nothing and are not counted.
    """

    def __init__(self, num_rows: int) -> None:
        super().__init__()
        self.num_rows = num_rows
        self.columns: list[int] = []
        self.operations: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        schema = func._schema
        is_view = any(
            r.alias_info is not None and not r.alias_info.is_write for r in schema.returns
        )
        if is_view or schema.name.startswith(("aten::empty", "prim::")):
            return result
        self.operations.append(schema.name)
        inputs = args[1:] if schema.name == "aten::copy_" else args
        for tensor in (*inputs, *(result if isinstance(result, (tuple, list)) else [result])):
            if isinstance(tensor, torch.Tensor) and tensor.dim() >= 2:
                columns = tensor.shape[-1]
                if tensor.numel() == self.num_rows * columns:
                    self.columns.append(columns)
        return result

    def count(self, width: int) -> float:
        """Reads and writes in units of num_rows * width elements, of tensors at least that wide."""
        return sum(columns for columns in self.columns if columns >= width) / width
