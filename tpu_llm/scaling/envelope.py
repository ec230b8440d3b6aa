"""Approach 1: the least loss that any run had reached at each number of FLOPs, and by which size and tokens.

Hoffmann et al. (2022, arXiv 2203.15556, section 3.1). The loss in the middle of a run counts as what that many FLOPs
give, though its learning rate had not come down; so each size should have runs of several lengths (`ladder.horizons`),
each with a schedule of its own.
"""

import dataclasses

import numpy as np

from tpu_llm.config import ConfigError
from tpu_llm.scaling.allocate import estimate
from tpu_llm.scaling.points import Points
from tpu_llm.scaling.valleys import PowerLaw

_BINS = 1500  # of FLOPs, evenly by logarithm, as in the paper


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Envelope:
    """At each of `flops`: which run is lowest (an index of `names`), its size, tokens and loss."""

    names: tuple[str, ...]
    flops: np.ndarray
    lowest: np.ndarray
    parameters: np.ndarray
    tokens: np.ndarray
    loss: np.ndarray
    size_law: PowerLaw
    token_law: PowerLaw
    warnings: tuple[str, ...]


def envelope(curves: Points, *, bootstraps: int = 1000, seed: int = 0, bins: int = _BINS) -> Envelope:
    """Of curves: a point is one moment of the run that `names` says.

    A bootstrap draws whole runs. Raises ConfigError where fewer than two sizes are ever the lowest.
    """
    names = tuple(dict.fromkeys(curves.names))
    which = np.array([names.index(name) for name in curves.names])
    flops = np.geomspace(curves.flops.min(), curves.flops.max(), bins)
    tracks = [_track(curves.take(which == i), flops) for i in range(len(names))]
    losses = np.stack([loss for loss, _ in tracks])  # [runs, bins]; infinite where the run had no loss
    tokens = np.stack([seen for _, seen in tracks])
    sizes = np.array([curves.parameters[which == i][0] for i in range(len(names))])
    reached = np.isfinite(losses).any(0)
    flops, losses, tokens = flops[reached], losses[:, reached], tokens[:, reached]
    lowest = np.argmin(losses, 0)
    if len(np.unique(sizes[lowest])) < 2:
        raise ConfigError(
            f'of {len(names)} runs only one size is ever the lowest; an envelope needs at least 2 that are, each at '
            'FLOPs of its own: add sizes, or longer runs'
        )
    drawn = np.random.default_rng(seed).integers(len(names), size=(bootstraps, len(names)))
    laws = [_laws(flops, losses, sizes, tokens, np.arange(len(names)))]
    laws += [_laws(flops, losses, sizes, tokens, draw) for draw in drawn]
    by_size, by_tokens = (np.array([each[k] for each in laws]) for k in (0, 1))
    at = np.arange(len(flops))
    edge = sizes[lowest] == sizes.max()
    warnings = []
    if edge[-1]:
        warnings.append(
            f'the largest size, {sizes.max():.4g}, is the lowest from {flops[np.argmax(edge)]:.3g} FLOPs on: what is '
            'best there may be larger still; add larger sizes'
        )
    return Envelope(
        names=names,
        flops=flops,
        lowest=lowest,
        parameters=sizes[lowest],
        tokens=tokens[lowest, at],
        loss=losses[lowest, at],
        size_law=_power(by_size),
        token_law=_power(by_tokens),
        warnings=tuple(warnings),
    )


def _track(run: Points, flops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A run's loss and tokens at each number of FLOPs, between its moments by straight lines of logarithms."""
    order = np.argsort(run.flops, kind='stable')
    at, x = np.log(flops), np.log(run.flops[order])
    outside = (at < x[0] - 1e-12) | (at > x[-1] + 1e-12)
    loss = np.exp(np.interp(at, x, np.log(run.loss[order])))
    return np.where(outside, np.inf, loss), np.exp(np.interp(at, x, np.log(run.tokens[order])))


def _laws(
    flops: np.ndarray, losses: np.ndarray, sizes: np.ndarray, tokens: np.ndarray, runs: np.ndarray
) -> tuple[tuple[float, float], tuple[float, float]]:
    """ln scale and power of size and of tokens, over the bins that these runs reach."""
    least = losses[runs]
    lowest = runs[np.argmin(least, 0)]
    there = np.isfinite(least).any(0)
    at, x = np.flatnonzero(there), np.log(flops[there])
    slopes = []
    for y in (np.log(sizes[lowest[at]]), np.log(tokens[lowest[at], at])):
        power = np.sum((x - x.mean()) * y) / np.sum((x - x.mean()) ** 2)
        slopes.append((float(y.mean() - power * x.mean()), float(power)))
    return slopes[0], slopes[1]


def _power(laws: np.ndarray) -> PowerLaw:
    scale, power = np.exp(laws[:, 0]), laws[:, 1]
    return PowerLaw(estimate(scale[0], scale[1:]), estimate(power[0], power[1:]))
