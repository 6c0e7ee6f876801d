"""The loss: noise levels, weightings, auxiliary terms."""
