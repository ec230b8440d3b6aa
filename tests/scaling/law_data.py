"""Runs that follow a law with known constants."""

import numpy as np

from tpu_llm.scaling.points import points

TRUE = np.array([1.7, 400.0, 1800.0, 0.34, 0.37])  # E, A, B, alpha, beta


def loss(n, d, constants=TRUE):
    e, a, b, alpha, beta = constants
    return e + a / n**alpha + b / d**beta


def grid(noise=0.0, seed=0):
    """64 runs, sizes and tokens crossed; `noise` is the standard deviation of ln L."""
    n, d = (each.ravel() for each in np.meshgrid(np.geomspace(1e5, 1e9, 8), np.geomspace(1e7, 1e10, 8)))
    found = loss(n, d) * np.exp(noise * np.random.default_rng(seed).normal(size=len(n)))
    return points(n, d, found)
