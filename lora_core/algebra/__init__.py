"""Deltas computed in their factors, without forming them."""
