"""A MODEL with an adapter: modules matched, then a side path or a merge."""
