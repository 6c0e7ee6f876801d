"""What a run is fed: the cached training set, and batches of it."""
