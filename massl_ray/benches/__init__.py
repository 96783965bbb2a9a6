"""Measurements: ours beside a reference, in one invocation. The command is `python -m massl_ray.bench NAME`."""
