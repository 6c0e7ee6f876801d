"""New adapters from old: merged, resized, extracted from a finetune."""
