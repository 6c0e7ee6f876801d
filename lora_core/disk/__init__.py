"""What lies on the disk: files opened, read and written, whoever made them."""
