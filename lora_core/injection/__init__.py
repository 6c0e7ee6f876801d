"""Trainable LoRA layers in a model: planned, injected, ejected."""
