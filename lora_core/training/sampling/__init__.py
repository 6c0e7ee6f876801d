"""Sample images during training: denoised, decoded, written."""
