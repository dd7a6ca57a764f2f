"""What the emitted module calls. Knows nothing of graphs."""
