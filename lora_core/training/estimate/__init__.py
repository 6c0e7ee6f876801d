"""What a run will need, measured before it starts."""
