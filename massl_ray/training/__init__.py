"""Runs: the loop, its state and checkpoints, collectives, monitors. Knows nothing of Ray."""
