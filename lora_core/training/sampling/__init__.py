"""Images on the way: denoised, decoded, written."""
