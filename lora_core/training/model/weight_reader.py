"""From a base's file to the device, some rows at a time, with a check for NaN and Inf.

On a GPU the rows are read into two pinned buffers in turn: while one is copied to the card, which
needs no CPU time, the next rows are read into the other. Only a buffer that is to be refilled waits
for the GPU, so that loading takes as long as reading the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from ...base_model.base_files import BaseFile
from ...base_model.base_weight import BaseWeight
from ...disk.safetensors_file import AnyTensor, StoredTensor, load
from ...errors import NonFiniteWeightsError
from ...messages import message
from .frozen_linear import build_rotation

#: Entries of a chunk, 16 MB in float32.
CHUNK = 2**22
#: Rows of a chunk are a multiple of it: no block of nf4 is cut.
ROWS = 64
#: Bytes of a pinned buffer: a chunk of float32.
BUFFER_BYTES = 4 * CHUNK


class WeightReader:
    """One base's weights, on one device.

    Args:
        base: a `BaseFile`, or an object with the same interface.
    """

    def __init__(self, base: BaseFile, device: torch.device):
        self.base = base
        self.device = device
        self.staging = open_staging(device)
        self.buffer: torch.Tensor | None = torch.empty(
            0 if self.staging else BUFFER_BYTES, dtype=torch.uint8
        )
        self.extremes: dict[str, list[torch.Tensor]] = {}
        self.rotations: dict[int, torch.Tensor] = {}

    def read_chunks(self, weight: BaseWeight) -> Iterator[tuple[slice, BaseWeight]]:
        """A weight as stored, on the device, some rows at a time; each is good until the next."""
        num_rows, width = weight.stored.shape
        if isinstance(weight.scale, torch.Tensor):
            weight = replace(weight, scale=weight.scale.to(self.device, non_blocking=True))
        is_scaled_by_row = weight.scaling in ("row", "block")
        step = max(1, CHUNK // width // ROWS) * ROWS
        for start in range(0, num_rows, step):
            rows = slice(start, min(start + step, num_rows))
            scale = weight.scale
            if isinstance(scale, torch.Tensor) and is_scaled_by_row:
                scale = scale[rows]
            yield rows, BaseWeight(self.bring(weight.stored, rows), scale, weight.rotation)

    def read_values(self, weight: BaseWeight, what: str) -> Iterator[tuple[slice, torch.Tensor]]:
        """Its values in float32 on the device, likewise."""
        for rows, chunk in self.read_chunks(weight):
            values = chunk.values
            self.check(values, what)
            yield rows, values

    def copy_codes(self, weight: BaseWeight, what: str) -> BaseWeight:
        """The whole weight as stored, on the device."""
        stored, scale = weight.stored, weight.scale
        codes = torch.empty(stored.shape, dtype=stored.dtype, device=self.device)
        for rows, chunk in self.read_chunks(weight):
            codes[rows] = load(chunk.stored)
            self.check(replace(chunk, rotation=0).values, what)
        if isinstance(scale, torch.Tensor):
            scale = scale.to(self.device, non_blocking=True)
        return replace(weight, stored=codes, scale=scale)

    def read_parameter(self, key: str, dtype: torch.dtype) -> torch.Tensor | None:
        """A bias or norm on the device; None where the file has none of that name."""
        tensor = self.base.read_tensor(key)
        if tensor is None:
            return None
        values = tensor.to(self.device, torch.float32, non_blocking=True)
        self.check(values, message("{key} in {file}", key=key, file=self.base.name))
        return values.to(dtype, copy=True)

    def bring(self, stored: AnyTensor, rows: slice) -> torch.Tensor:
        """Rows of a tensor, which may be on disk, to the device."""
        if not isinstance(stored, StoredTensor):
            return stored[rows].to(self.device)
        if self.staging is None:
            return stored.load_rows(rows, self.buffer).to(self.device)
        return self.staging.bring(stored, rows)

    def get_rotation(self, group: int) -> torch.Tensor | None:
        """The matrix that all Linears which are rotated alike share."""
        if group and group not in self.rotations:
            self.rotations[group] = build_rotation(group, self.device)
        return self.rotations.get(group)

    def check(self, values: torch.Tensor, what: str) -> None:
        """Records what `finish` will check."""
        if values.numel():
            self.extremes.setdefault(what, []).extend(torch.aminmax(values))

    def finish(self) -> None:
        """Checks everything at once: each single check would wait for the GPU.

        Raises:
            NonFiniteWeightsError: NaN or Inf in a tensor, which is named.
        """
        names = [what for what, found in self.extremes.items() for _ in found]
        extremes = [extreme for found in self.extremes.values() for extreme in found]
        self.extremes.clear()
        self.staging = self.buffer = None
        finite = torch.stack(extremes).isfinite().tolist() if extremes else []
        for what, is_finite in zip(names, finite, strict=True):
            if not is_finite:
                raise NonFiniteWeightsError(
                    "{what} holds NaN or Inf; expected finite numbers. Download or convert it "
                    "again.",
                    what=what,
                )


class Staging:
    """Two pinned buffers, filled in turn."""

    def __init__(self, device: torch.device, buffers: tuple[torch.Tensor, torch.Tensor]):
        self.device = device
        self.buffers = buffers
        self.copied: list[Any] = [None, None]
        self.turn = 0

    def bring(self, stored: StoredTensor, rows: slice) -> torch.Tensor:
        """Rows of a tensor on disk to the device; the copy may still be in progress."""
        turn, self.turn = self.turn, 1 - self.turn
        if self.copied[turn] is not None:
            self.copied[turn].synchronize()
        values = stored.load_rows(rows, self.buffers[turn])
        values = values.to(self.device, non_blocking=True, copy=True)
        self.copied[turn] = self.mark()
        return values

    def mark(self) -> Any:
        """An event that is set once everything copied so far has arrived."""
        return torch.cuda.current_stream(self.device).record_event()


def open_staging(device: torch.device) -> Staging | None:
    """None where there is no GPU, or no page-locked memory."""
    # A fake device has none.
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    try:
        first, second = (
            torch.empty(BUFFER_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)
        )
        return Staging(device, (first, second))
    except RuntimeError:  # the system refuses to lock more
        return None
