"""One process or several: the few things that differ, behind one small interface.

Several processes are Hugging Face Accelerate's (`accelerate launch`); nothing here communicates on
its own. Without an Accelerator this is a single process and Accelerate need not be installed.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from accelerate import Accelerator


class Processes:
    """The process this is, and what it does together with the others."""

    def __init__(self, accelerator: Accelerator | None = None):
        self.accelerator = accelerator
        self.count = 1 if accelerator is None else accelerator.num_processes
        self.index = 0 if accelerator is None else accelerator.process_index

    @property
    def is_main(self) -> bool:
        return self.index == 0

    def prepare(self, model: Any) -> Any:
        """The model as it has to be called, so that its gradients are averaged over processes."""
        if self.count == 1:
            return model
        leave_frozen_alone(model)
        # It lies where it shall lie; moving it would bring offloaded blocks back.
        return self.accelerator.prepare(model, device_placement=[False])

    def without_sync(self, model: Any) -> AbstractContextManager:
        """Backward passes inside leave the gradients where they are; the next one averages all."""
        return nullcontext() if self.count == 1 else self.accelerator.no_sync(model)

    def average(self, tensor: torch.Tensor) -> torch.Tensor:
        """The mean over processes, the same on each."""
        return tensor if self.count == 1 else self.accelerator.reduce(tensor, reduction="mean")

    def sum(self, number: float, device: torch.device) -> float:
        if self.count == 1:
            return number
        tensor = torch.tensor(float(number), device=device)
        return self.accelerator.reduce(tensor, reduction="sum").item()

    def gather(self, value: Any) -> list[Any]:
        """One value of each process, in their order, on every process."""
        if self.count == 1:
            return [value]
        from accelerate.utils import gather_object

        return gather_object([value])

    def wait(self) -> None:
        if self.count > 1:
            self.accelerator.wait_for_everyone()


def leave_frozen_alone(model: torch.nn.Module) -> None:
    """Keeps DDP from sending the base around: at the start, and its buffers before every forward.

    Every process read the same file, so that it would be tens of gigabytes for nothing; and types
    like fp8 cannot be sent everywhere.
    """
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    frozen += [name for name, _ in model.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)
