"""Training: the state, the step, the loop that runs it, and what a run writes down about itself."""
