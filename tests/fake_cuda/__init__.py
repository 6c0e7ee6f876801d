"""A make-believe CUDA device, for what a machine without a GPU can say about one with it."""
