"""Training edit LoRAs: a model, a cached training set and a configuration in, checkpoints out."""

from .data.dataset import CachedItem, DatasetWriter, read_dataset

__all__ = ["CachedItem", "DatasetWriter", "read_dataset"]
