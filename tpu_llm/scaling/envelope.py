"""Approach 1: the least loss that any run had reached at each number of FLOPs, and by which size and tokens.

Hoffmann et al. (2022, arXiv 2203.15556, section 3.1). The loss in the middle of a run counts as what that many FLOPs
give, though its learning rate had not come down; so each size should have runs of several lengths (`ladder.horizons`),
each with a schedule of its own.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
from etils import epath

from tpu_llm.config import ConfigError
from tpu_llm.scaling import table
from tpu_llm.scaling.allocate import estimate
from tpu_llm.scaling.points import Points, read
from tpu_llm.scaling.sweep import RUNS
from tpu_llm.scaling.valleys import PowerLaw
from tpu_llm.train import metrics

_BINS = 1500  # of FLOPs, evenly by logarithm, as in the paper
_PARTS = 20  # of a run whose losses are smoothed
_LEAST = 3  # bins; a line through two is exact, whatever the runs


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


def curves(workdir: epath.PathLike) -> Points:
    """The moments that the finished runs of a sweep logged: of the held-out loss where every run has that twice or
    more, else of the loss of training, by the means of a run's twentieths: the least of many noisy losses is too low.
    """
    folder = epath.Path(workdir)
    runs = read(folder / table.CSV).points
    logged = [metrics.read(folder / RUNS / name / 'metrics.jsonl') for name in runs.names]
    held_out = all(sum('heldout_loss' in line for line in lines) > 1 for lines in logged)
    metric = 'heldout_loss' if held_out else 'loss'
    which, shares, losses = [], [], []
    for i, lines in enumerate(logged):
        last = lines[-1]['step']
        track = [(line['step'] / last, line[metric]) for line in lines if math.isfinite(line.get(metric, math.nan))]
        for share, loss in track if held_out else _smooth(track):
            which.append(i)
            shares.append(share)
            losses.append(loss)
    there, done = runs.take(np.array(which, int)), np.array(shares)
    tokens = there.tokens * done
    unique = np.minimum(there.unique, tokens)
    return dataclasses.replace(there, tokens=tokens, flops=there.flops * done, loss=np.array(losses), unique=unique)


def _smooth(track: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Geometric means, as a curve is nearly straight in logarithms."""
    parts = np.array_split(np.log(track), min(_PARTS, len(track)))
    return [tuple(np.exp(part.mean(0)).tolist()) for part in parts]


def envelope(curves: Points, *, bootstraps: int = 1000, seed: int = 0, bins: int = _BINS) -> Envelope:
    """Of curves: a point is one moment of the run that `names` says.

    A bootstrap draws whole runs. Raises ConfigError where no run has two moments, or fewer than two sizes are ever the
    lowest.
    """
    moments = Counter(name for name, _ in set(zip(curves.names, curves.flops, strict=True)))
    names = tuple(name for name in dict.fromkeys(curves.names) if moments[name] > 1)
    if not names:
        raise ConfigError(
            'no run has two moments: an envelope is of training curves, a row a moment, `name` saying of which run; '
            'of a table of ends see fit and valleys, and of a sweep give the folder: envelope WORKDIR'
        )
    curves = curves.take(np.isin(curves.names, names))
    which = np.array([names.index(name) for name in curves.names])
    flops = np.geomspace(curves.flops.min(), curves.flops.max(), bins)
    tracks = [_track(curves.take(which == i), flops) for i in range(len(names))]
    losses = np.stack([loss for loss, _ in tracks])  # [runs, bins]; infinite where the run had no loss
    tokens = np.stack([seen for _, seen in tracks])
    sizes = np.array([curves.parameters[which == i][0] for i in range(len(names))])
    reached = np.isfinite(losses).any(0)
    if np.count_nonzero(reached) < _LEAST:
        raise ConfigError('the moments of each run are of nearly the same FLOPs; an envelope needs curves: log more')
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
    """ln scale and power of size and of tokens, over the bins that these runs reach; NaN where those are too few."""
    least = losses[runs]
    lowest = runs[np.argmin(least, 0)]
    there = np.isfinite(least).any(0)
    if np.count_nonzero(there) < _LEAST:
        return (np.nan, np.nan), (np.nan, np.nan)
    at, x = np.flatnonzero(there), np.log(flops[there])
    slopes = []
    for y in (np.log(sizes[lowest[at]]), np.log(tokens[lowest[at], at])):
        power = np.sum((x - x.mean()) * y) / np.sum((x - x.mean()) ** 2)
        slopes.append((float(y.mean() - power * x.mean()), float(power)))
    return slopes[0], slopes[1]


def _power(laws: np.ndarray) -> PowerLaw:
    scale, power = np.exp(laws[:, 0]), laws[:, 1]
    return PowerLaw(estimate(scale[0], scale[1:]), estimate(power[0], power[1:]))
