"""Counts the bytes that operations move, where there is no GPU to measure them."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class ByteCount(TorchDispatchMode):
    """Bytes that the operations inside read and write, except views.

    An operand is counted once per operation, as a GPU kernel moves it; one that is modified in
    place is read and written.
    """

    def __init__(self):
        super().__init__()
        self.num_bytes = 0
        self.operations: list[str] = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        results = function(*arguments, **(options or {}))
        inputs = {id(t): t for t in tree_leaves((arguments, options)) if is_tensor(t)}
        out = (options or {}).get("out")
        outputs = {id(t): t for t in tree_leaves(results) if is_tensor(t)}
        if out is not None:  # written, and read only if it is an operand too
            operands = {id(t) for t in tree_leaves(arguments)}
            inputs = {key: t for key, t in inputs.items() if key in operands}
        starts = {t.untyped_storage()._cdata for t in inputs.values()}
        shared = all(t.untyped_storage()._cdata in starts for t in outputs.values())
        is_written = function._schema.is_mutable
        if (inputs and shared and not is_written) or function._schema.name in (
            "aten::empty",
            "aten::empty_like",
        ):
            return results  # a view
        self.operations.append(str(function))
        self.num_bytes += sum(map(count, (*inputs.values(), *outputs.values())))
        return results


def is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor)


def count(tensor: torch.Tensor) -> int:
    """Bytes of the entries in memory: an expanded tensor is read as often as it has entries."""
    sides = zip(tensor.shape, tensor.stride(), strict=True)
    numel = 1
    for side, stride in sides:
        numel *= side if stride else 1
    return numel * tensor.dtype.itemsize
