"""Whole models, composed from nn by their configs."""
