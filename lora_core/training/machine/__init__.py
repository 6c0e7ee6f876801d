"""What memory the machine has, and how much of it is taken."""
