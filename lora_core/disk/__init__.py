"""Files on disk: opened, read and written, whoever made them."""
