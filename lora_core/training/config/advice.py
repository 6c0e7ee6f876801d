"""Settings that lower a run's memory."""

from __future__ import annotations

from collections.abc import Sequence

from ...messages import message
from ..model.model_config import AUTO
from .config import TrainConfig


def advise(config: TrainConfig) -> tuple[str, ...]:
    """What lowers the memory of a run, what costs least first."""
    model, data = config.model, config.data
    ways: Sequence[tuple[bool, str]] = (
        (
            model.gradient_checkpointing not in (True, AUTO),
            message("set model.gradient_checkpointing to true"),
        ),
        (data.batch_size > 1, message("set data.batch_size to 1 and raise optimizer.accumulation")),
        (config.optimizer.name == "adamw", message('set optimizer.name to "adamw8bit"')),
        (
            model.storage in ("bf16", "fp32"),
            message('set model.storage to "fp8", half the base\'s size'),
        ),
        (
            model.storage != "nf4",
            message('set model.storage to "nf4", a third of the base\'s size'),
        ),
        (config.lora.rank > 16, "lower lora.rank"),
        (True, message("cache the training set at a smaller size or with fewer references")),
        (True, message("set model.offload_blocks, at the price of time")),
    )
    return tuple(sentence for applies, sentence in ways if applies)
