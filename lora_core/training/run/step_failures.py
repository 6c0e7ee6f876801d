"""What a step can fail of, and what the user can do then."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from ...errors import NonFiniteLossError, OutOfMemoryError
from ...messages import message
from ...text import shorten_list
from ..config.advice import advise
from ..config.config import TrainConfig
from ..machine.memory import is_out_of_memory


def build_non_finite_error(
    loss: float, grad_norm: float, step: int, keys: Sequence[str], kept: Sequence[int]
) -> NonFiniteLossError:
    """
    Args:
        step: the one that was not applied.
        keys: of the items it showed.
        kept: steps of the checkpoints.
    """
    what = (
        message("the gradients are {grad_norm}", grad_norm=grad_norm)
        if math.isfinite(loss)
        else message("the loss is {loss}", loss=loss)
    )
    return NonFiniteLossError(
        message(
            "{what} at step {step} ({keys}); expected finite numbers. The step was not "
            "applied and {last}. Lower the learning rate, look at these "
            "items, or compute in a wider type.",
            what=what,
            step=step,
            keys=shorten_list(list(keys), 3),
            last=describe_last_checkpoint(kept),
        )
    )


def build_non_finite_weights_error(step: int, kept: Sequence[int]) -> NonFiniteLossError:
    """
    Args:
        step: the one whose update made them.
        kept: steps of the checkpoints.
    """
    return NonFiniteLossError(
        message(
            "the optimizer made NaN or Inf of finite gradients at step {step}, so that "
            "nothing of it was saved and {last}; lower the learning "
            "rate.",
            step=step,
            last=describe_last_checkpoint(kept),
        )
    )


def describe_last_checkpoint(kept: Sequence[int]) -> str:
    return (
        message("the last checkpoint is of step {kept}", kept=kept[-1])
        if kept
        else message("there is no checkpoint")
    )


@contextmanager
def explaining_lack_of_memory(
    config: TrainConfig, device: torch.device, step: int
) -> Iterator[None]:
    """If the model could keep less, it already does by then, down to each block's input.

    Raises:
        OutOfMemoryError: memory ran out inside the block.
    """
    try:
        yield
    except Exception as e:
        if not is_out_of_memory(e):
            raise
        on_host = device.type == "cpu"
        sentence = message(
            "{where} ran out of memory in step {step} ({reason})",
            where=message("the computer") if on_host else message("the device"),
            step=step,
            reason=" ".join(str(e).split())[:120] or type(e).__name__,
        )
        raise OutOfMemoryError(sentence, advise(config)) from e
