"""Settings that lower a run's memory."""

from __future__ import annotations

from collections.abc import Sequence

from ..model.model_config import AUTO
from .config import TrainConfig


def advise(config: TrainConfig) -> tuple[str, ...]:
    """What lowers the memory of a run, what costs least first."""
    model, data = config.model, config.data
    ways: Sequence[tuple[bool, str]] = (
        (
            model.gradient_checkpointing not in (True, AUTO),
            "set model.gradient_checkpointing to true",
        ),
        (data.batch_size > 1, "set data.batch_size to 1 and raise optimizer.accumulation"),
        (config.optimizer.name == "adamw", 'set optimizer.name to "adamw8bit"'),
        (model.storage in ("bf16", "fp32"), 'set model.storage to "fp8", half the base\'s size'),
        (model.storage != "nf4", 'set model.storage to "nf4", a third of the base\'s size'),
        (config.lora.rank > 16, "lower lora.rank"),
        (True, "cache the training set at a smaller size or with fewer references"),
        (True, "set model.offload_blocks, at the price of time"),
    )
    return tuple(sentence for applies, sentence in ways if applies)
