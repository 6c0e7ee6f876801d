"""A fake CUDA device, for tests of GPU code on a machine without a GPU."""
