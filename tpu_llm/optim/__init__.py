"""Optimizers and schedules: optax, configured."""
