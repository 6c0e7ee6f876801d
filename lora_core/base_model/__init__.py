"""What Qwen-Image is: its modules, its files, the weights an adapter changes."""
