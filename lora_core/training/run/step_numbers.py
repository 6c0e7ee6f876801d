"""What the host learns of a step: its numbers over all processes, and whether to stop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from ...progress import ShouldStop
from .processes import Processes


class Numbers(NamedTuple):
    """Of one step, over all processes."""

    losses: dict[str, float]
    """Part of the loss -> its mean."""
    num_tokens: float
    grad_norm: float
    are_weights_finite: bool
    """Those of the step before."""


class StepNumbers:
    """Reads a step's numbers in one copy from the device, for which the host waits once a step."""

    def __init__(self, processes: Processes, device: torch.device):
        self.processes = processes
        self.device = device
        #: Whether the last step's weights are finite, a bool on the device; None once that is read.
        self.is_finite: torch.Tensor | None = None
        #: Whether one of several processes was asked to stop; None before their first step.
        self.is_stopping: bool | None = None

    def read(
        self,
        parts: Mapping[str, torch.Tensor],
        num_tokens: int,
        grad_norm: torch.Tensor,
        should_stop: ShouldStop,
    ) -> Numbers:
        """With several processes, this also tells whether one of them was asked to stop.

        Args:
            parts: part of the loss -> this process's mean, a scalar on the device.
            num_tokens: of this process.
        """
        shared = [*parts.values()]
        if self.processes.count > 1:
            asked = float(should_stop())
            # By kernels with the number as an argument: a copy from the host would synchronise.
            shared += [torch.full((), x, device=self.device) for x in (num_tokens, asked)]
        means = self.processes.average(torch.stack(shared))
        own = [grad_norm] if self.is_finite is None else [grad_norm, self.is_finite]
        copied = torch.cat([means.double(), torch.stack([x.double() for x in own])]).tolist()
        norm, *finite = copied[len(shared) :]
        self.is_finite = None
        tokens: float = num_tokens
        if self.processes.count > 1:
            tokens = copied[len(parts)] * self.processes.count
            self.is_stopping = copied[len(parts) + 1] > 0
        losses = dict(zip(parts, copied, strict=False))
        return Numbers(losses, tokens, norm, all(finite))

    def read_is_finite(self) -> bool:
        """Waits for the device if the last step's weights are not yet known to be finite."""
        is_finite, self.is_finite = self.is_finite, None
        return is_finite is None or bool(is_finite)

    def is_asked_to_stop(self, should_stop: ShouldStop) -> bool:
        """True on every process as soon as one is asked to stop; see `read`."""
        if self.processes.count == 1:
            return should_stop()
        if self.is_stopping is None:
            self.is_stopping = self.processes.sum(should_stop(), self.device) > 0
        return self.is_stopping

    def ask_again(self) -> None:
        """Before its next step every process asks the others anew; every process has to call this.

        For what one of them did after the step, and may have left out for a stop of which the
        others know nothing.
        """
        self.is_stopping = None

    def is_still_to_stop(self, should_stop: ShouldStop) -> bool:
        """Checks again after the steps, on all processes. False: `Run.take_steps` resumes."""
        self.ask_again()
        return self.is_asked_to_stop(should_stop)
