"""Fine-tuning a few parameters: what is added to a model trains, and the model itself is frozen.

Each kind is a config with `wrap(model)`, which puts wrappers around modules in place, and `trains(path)`, which says
what a run changes. Paths of what was there stay as they were.
"""
