"""Key schemes: how adapters spell their tensors, read and written."""
