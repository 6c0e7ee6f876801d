"""Training edit LoRAs: a model, a cached training set and a configuration in, checkpoints out."""
