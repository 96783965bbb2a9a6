"""Sweeps: many runs of the trainer, and what they say together."""
