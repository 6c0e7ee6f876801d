"""How pictures for users look: colours, letters, contact sheets."""
