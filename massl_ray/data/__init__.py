"""Images in: where they are, in which order they come, how they are decoded. Knows nothing of training, Ray or reports."""
