"""What the dataset node does: folders looked up, pairs encoded."""
