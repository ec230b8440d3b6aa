"""Minimises many small smooth functions at once: BFGS, each with a line search of its own.

With a handful of numbers to find, all of the curvature fits in memory, so the limited memory of L-BFGS has nothing to
save. Problems go in step only in that each loop evaluates every one that is not done. There is no call to BLAS, whose
threads cost more than arrays of this size.
"""

from collections.abc import Callable

import numpy as np

# Of problems (indices [b]) at θ [b, P]: values [b] and gradients [b, P].
Function = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]

_DECREASE, _CURVATURE = 1e-4, 0.9  # the two conditions of Wolfe


def minimise(
    function: Function,
    start: np.ndarray,
    inverse: np.ndarray,
    *,
    evaluations: int = 500,
    tolerance: float = 1e-11,
) -> tuple[np.ndarray, np.ndarray]:
    """θ [B, P] and its values [B], from `start` and a first guess of the inverse Hessians [B, P, P].

    The line search halves and doubles (Lewis and Overton, 2013), which suits functions that bend sharply, as Huber's
    does. A problem is done where a step lowers its value by less than `tolerance` of it, twice running, or where the
    line search finds no lower point.
    """
    x, inverse = start.astype(float), inverse.copy()
    live = np.arange(len(x))
    value, slope = function(live, x)
    way = -_apply(inverse, slope)
    length, low, high = np.ones(len(x)), np.zeros(len(x)), np.full(len(x), np.inf)
    idle = np.zeros(len(x), int)
    for _ in range(evaluations):
        if not len(live):
            break
        descent = _dot(slope[live], way[live])
        tried = x[live] + length[live, None] * way[live]
        new, new_slope = function(live, tried)
        lower = new <= value[live] + _DECREASE * length[live] * descent
        steep = _dot(new_slope, way[live]) < _CURVATURE * descent
        high[live] = np.where(lower, high[live], length[live])
        low[live] = np.where(lower & steep, length[live], low[live])
        taken = lower & ~steep
        at = live[taken]
        _update(inverse, at, tried[taken] - x[at], new_slope[taken] - slope[at])
        little = value[at] - new[taken] <= tolerance * np.abs(value[at])
        idle[at] = np.where(little, idle[at] + 1, 0)
        x[at], value[at], slope[at] = tried[taken], new[taken], new_slope[taken]
        way[at] = -_apply(inverse[at], slope[at])
        length[live] = np.where(np.isinf(high[live]), 2 * length[live], (low[live] + high[live]) / 2)
        length[at], low[at], high[at] = 1.0, 0.0, np.inf
        stuck = (high[live] - low[live]) < 1e-12
        live = live[(idle[live] < 2) & ~stuck & np.any(slope[live] != 0, -1)]
    return x, value


def _update(inverse: np.ndarray, at: np.ndarray, step: np.ndarray, change: np.ndarray) -> None:
    """The BFGS update of the inverse Hessians `at`."""
    along = _dot(step, change)
    good = along > 1e-300
    at, step, change, along = at[good], step[good], change[good], along[good, None]
    old = inverse[at]
    turned = _apply(old, change)
    both = turned[:, :, None] * step[:, None, :]
    grown = (along + _dot(change, turned)[:, None])[..., None] * (step[:, :, None] * step[:, None, :])
    inverse[at] = old + grown / along[..., None] ** 2 - (both + both.transpose(0, 2, 1)) / along[..., None]


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.einsum('bi,bi->b', a, b)


def _apply(matrices: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    return np.einsum('bij,bj->bi', matrices, vectors)
