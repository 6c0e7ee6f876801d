"""The look of images for users: colours, letters, contact sheets."""
