"""Settings of what a run is fed."""

from __future__ import annotations

from dataclasses import dataclass

from ...checks import check_number, check_text


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    folder: str
    """A cached training set; see `lora_core.training.data.dataset`."""
    batch_size: int = 1
    """Samples of one forward pass on one process."""
    caption_dropout: float = 0.0
    """Share of the samples that are shown with an empty caption."""
    use_masks: bool = True
    """Weigh the loss by the masks that items have."""
    prior: str = ""
    """A second training set whose results should stay unchanged (prior preservation)."""
    prior_weight: float = 1.0
    """Weight of the prior's loss."""

    def __post_init__(self) -> None:
        check_text(self, "folder")
        check_number(self, "batch_size", 1)
        check_number(self, "caption_dropout", 0, 1)
        check_number(self, "prior_weight", 0)
