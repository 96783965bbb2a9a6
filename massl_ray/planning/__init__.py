"""What a run needs, takes and costs, worked out before it starts. Imports no Ray."""
