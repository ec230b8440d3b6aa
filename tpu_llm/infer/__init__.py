"""Using a model: sampling, generation."""
