"""What the sweep nodes build: graphs, strengths, measured effects."""
