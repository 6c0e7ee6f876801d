"""One process or several: the few differences, behind one small interface.

Several processes are managed by Hugging Face Accelerate (`accelerate launch`), which does all the
communication. Without an Accelerator this is a single process and Accelerate need not be installed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.parallel import DistributedDataParallel

from ...errors import ConfigError
from ...messages import message
from ..model.sharding import check_launch

if TYPE_CHECKING:
    from accelerate import Accelerator

#: Bytes of gradients that are sent together, as DDP does: enough to be worth a message.
BUCKET = 25 * 2**20
#: Of this PyTorch; see `can_join_gpus`.
NO_NCCL = message(
    "several GPUs need NCCL to exchange their gradients, which this PyTorch does not "
    "include, like every PyTorch for Windows; train on one GPU, or on Linux or WSL"
)


def can_join_gpus() -> bool:
    """Whether processes of several GPUs can exchange gradients: by NCCL, or ROCm's RCCL."""
    return torch.distributed.is_available() and torch.distributed.is_nccl_available()


def find_accelerator(on_cpu: bool, patience_h: float | None = None) -> Accelerator | None:
    """The Accelerator of `accelerate launch`; None for a single process.

    Args:
        patience_h: hours for which a process waits for another; PyTorch's default if None.

    Raises:
        ConfigError: it is not installed, or is configured to shard the model in a way that
            training does not support.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return None
    check_launch(os.environ)
    if not on_cpu and torch.cuda.is_available() and not can_join_gpus():
        raise ConfigError(NO_NCCL)
    try:
        from accelerate import Accelerator, InitProcessGroupKwargs
    except ImportError:
        raise ConfigError(
            "several processes need Hugging Face Accelerate; run pip install accelerate"
        ) from None
    # Types are the configuration's; a user's Accelerate settings must not cast on top of them.
    handlers = []
    if patience_h is not None:
        handlers.append(InitProcessGroupKwargs(timeout=timedelta(hours=patience_h)))
    return Accelerator(cpu=on_cpu, mixed_precision="no", kwargs_handlers=handlers)


class Processes:
    """This process, and what it does together with the others."""

    def __init__(self, accelerator: Accelerator | None = None):
        self.accelerator: Any = accelerator  # None for a single process
        self.count = 1 if accelerator is None else accelerator.num_processes
        self.index = 0 if accelerator is None else accelerator.process_index
        self.is_sharded = False

    @property
    def is_main(self) -> bool:
        return self.index == 0

    def prepare(self, model: Any, parameters: Sequence[torch.nn.Parameter]) -> Any:
        """The model to call, with equal parameters on each process.

        DDP averages gradients in the backward pass; where FSDP holds the base (`sharding`),
        `average_gradients` does.
        """
        if self.count == 1:
            return model
        if holds_shards(model):  # Accelerate would return it unchanged
            from accelerate.utils import broadcast

            for parameter in parameters:
                broadcast(parameter.data)
            self.is_sharded = True
            return model
        leave_frozen_alone(model)
        # It is where it should be; moving it would bring offloaded blocks back.
        return self.accelerator.prepare(model, device_placement=[False])

    def without_sync(self, model: Any) -> AbstractContextManager:
        """Backward passes inside leave the gradients where they are; the next one averages all."""
        if self.count == 1 or self.is_sharded:
            return nullcontext()
        return self.accelerator.no_sync(model)

    def average_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Where no DDP has done so, once a step; a parameter without a gradient counts as 0."""
        if not self.is_sharded:
            return
        for bucket in make_buckets(parameters):
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
            mean = self.average(torch.cat([grad.flatten() for grad in gradients]))
            parts = mean.split([grad.numel() for grad in gradients])
            for parameter, part in zip(bucket, parts, strict=True):
                parameter.grad = part.view_as(parameter)

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


def holds_shards(model: Any) -> bool:
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule)


def make_buckets(
    parameters: Sequence[torch.nn.Parameter], size: int = BUCKET
) -> Iterator[list[torch.nn.Parameter]]:
    """Neighbouring tensors of one type, together at least `size` bytes if there are enough."""
    bucket: list[torch.nn.Parameter] = []
    num_bytes = 0
    for parameter in parameters:
        if bucket and (num_bytes >= size or parameter.dtype != bucket[0].dtype):
            yield bucket
            bucket, num_bytes = [], 0
        bucket.append(parameter)
        num_bytes += parameter.numel() * parameter.dtype.itemsize
    if bucket:
        yield bucket


def leave_frozen_alone(model: torch.nn.Module) -> None:
    """Keeps DDP from broadcasting the base at the start, and its buffers before every forward.

    Every process read the same file, so that would transfer tens of gigabytes needlessly; and types
    like fp8 cannot be sent everywhere.
    """
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    frozen += [name for name, _ in model.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)
