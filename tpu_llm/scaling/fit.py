"""Fits a law to runs, and says how far its constants are known: Huber's loss of logarithms, starts, bootstraps."""

import dataclasses
from collections.abc import Container, Iterator

import numpy as np

from tpu_llm.config import ConfigError
from tpu_llm.scaling.laws import Law, grid
from tpu_llm.scaling.minimise import minimise
from tpu_llm.scaling.points import Points

DELTA = 1e-3  # beyond this error of ln L, Huber's loss grows with the error, not with its square
_TRIED = 100  # starts of the grid that are followed down, those of lowest loss first
_WIDEST = 1e3  # the most that a constant may be over the least, where it is called bound
_BLOCK = 1 << 16  # numbers of an array at a time: they stay in the cache


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Fit:
    """A law's constants by `law.labels`, and those of each bootstrap, [bootstraps, P]."""

    law: Law
    constants: np.ndarray
    draws: np.ndarray
    runs: int
    objective: float  # the sum of Huber's losses
    spread: float  # root mean square of the errors of ln L
    warnings: tuple[str, ...]

    def predict(self, runs: Points) -> np.ndarray:
        """The losses that the law gives these runs."""
        return _predict(self.law, self.constants[None], runs)[0]

    @property
    def standard_errors(self) -> np.ndarray:
        """Standard deviations of the bootstraps; infinite where some of these found no law."""
        with np.errstate(all='ignore'):
            return (
                np.nan_to_num(self.draws.std(0), nan=np.inf, posinf=np.inf)
                if len(self.draws)
                else np.full(len(self.constants), np.nan)
            )

    def interval(self, runs: Points, level: float = 0.95) -> np.ndarray:
        """[2, n]: between which the bootstraps' predictions lie. A run's own noise is not in it."""
        return quantiles(_predict(self.law, self.draws, runs), level)


def _predict(law: Law, constants: np.ndarray, runs: Points) -> np.ndarray:
    with np.errstate(all='ignore'):  # a bootstrap may have found no law
        return np.exp(law.log_loss(law.theta(constants), runs)[0])


def quantiles(values: np.ndarray, level: float = 0.95) -> np.ndarray:
    """The bounds of the middle `level` of the first axis: [2, …]."""
    with np.errstate(invalid='ignore'):  # between two that are infinite
        return np.quantile(values, [(1 - level) / 2, (1 + level) / 2], axis=0)


def fit(law: Law, runs: Points, *, bootstraps: int = 1000, seed: int = 0, delta: float = DELTA) -> Fit:
    """The constants of least Huber loss of ln L, as in Hoffmann et al. (2022).

    Every point of the law's grid is looked at and the best hundred are followed down. A bootstrap draws as many of the
    runs with replacement, and starts from the fit. Raises ConfigError where there are too few runs.
    """
    check_enough(law, runs)
    starts = grid(law)
    equal = np.ones((1, len(runs)))
    there = _values(law, runs, starts, equal, delta)
    tried = starts[np.argsort(there, kind='stable')[:_TRIED]]
    found, values = _descend(law, runs, tried, equal, delta)
    best = int(np.argmin(values))
    theta = found[best]
    draws = np.random.default_rng(seed).multinomial(len(runs), np.full(len(runs), 1 / len(runs)), size=bootstraps)
    drawn = np.empty((0, len(theta)))
    if bootstraps:
        drawn, _ = _descend(law, runs, np.tile(theta, (bootstraps, 1)), draws.astype(float), delta)
    errors = law.log_loss(theta[None], runs)[0][0] - np.log(runs.loss)
    edges, constants = _edges(law, theta), law.constants(drawn)
    return Fit(
        law=law,
        constants=law.constants(theta),
        draws=constants,
        runs=len(runs),
        objective=float(values[best]),
        spread=float(np.sqrt(np.mean(errors**2))),
        warnings=(*edges.values(), *_loose(law, constants, edges)),
    )


def check_enough(law: Law, runs: Points) -> None:
    """Raises ConfigError that says how many runs are needed."""
    needed, (sizes, lengths) = len(law.labels) + 1, law.least
    there = len(np.unique(runs.parameters)), len(np.unique(runs.tokens))
    if len(runs) >= needed and there[0] >= sizes and there[1] >= lengths:
        return
    raise ConfigError(
        f'{type(law).__name__} has {len(law.labels)} constants ({", ".join(law.labels)}): it needs at least {needed} '
        f'finished runs, of {sizes} sizes and {lengths} numbers of tokens; there are {len(runs)}, of {there[0]} and '
        f'{there[1]}'
    )


def _descend(
    law: Law, runs: Points, start: np.ndarray, weights: np.ndarray, delta: float
) -> tuple[np.ndarray, np.ndarray]:
    """From θ [B, P] to minima, each run counted by its weight ([B, n] or [1, n])."""

    def function(which: np.ndarray, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        value, slope = np.empty(len(theta)), np.empty_like(theta)
        for part in _blocks(len(theta), len(runs)):
            weight = weights if len(weights) == 1 else weights[which[part]]
            value[part], slope[part] = _objective(law, runs, theta[part], weight, delta)
        return value, slope

    inverse = np.concatenate([
        _curvature(law, runs, start[part], weights if len(weights) == 1 else weights[part], delta)
        for part in _blocks(len(start), len(runs))
    ])  # fmt: skip
    return minimise(function, start, inverse)


def _blocks(problems: int, runs: int) -> list[slice]:
    step = max(1, _BLOCK // runs)
    return [slice(at, at + step) for at in range(0, problems, step)]


def _values(law: Law, runs: Points, theta: np.ndarray, weights: np.ndarray, delta: float) -> np.ndarray:
    parts = [_objective(law, runs, theta[part], weights, delta)[0] for part in _blocks(len(theta), len(runs))]
    return np.concatenate(parts)


def _objective(
    law: Law, runs: Points, theta: np.ndarray, weights: np.ndarray, delta: float
) -> tuple[np.ndarray, np.ndarray]:
    """Σ w Huber(ln L − ln loss) [B], over δ² so that its size is that of a sum of squares, and its gradient [B, P]."""
    value, by = law.log_loss(theta, runs)
    error = (value - np.log(runs.loss)) / delta
    pull = np.clip(error, -1.0, 1.0)
    total = np.einsum('bn,bn->b', np.broadcast_to(weights, error.shape), pull * (error - 0.5 * pull))
    pull *= weights / delta
    return total, np.stack([np.einsum('bn,bn->b', pull, each) for each in by], -1)


def _curvature(law: Law, runs: Points, theta: np.ndarray, weights: np.ndarray, delta: float) -> np.ndarray:
    """A first guess of the inverse Hessians [B, P, P]: that of the least squares to which Huber's loss is bounded."""
    value, by = law.log_loss(theta, runs)
    error = np.abs(value - np.log(runs.loss)) / delta
    weight = weights / np.maximum(error, 1.0) / delta**2
    slopes = np.stack([np.broadcast_to(each, value.shape) for each in by], 1)
    hessian = np.einsum('bin,bjn->bij', slopes * weight[:, None], slopes)
    scale = np.maximum(np.einsum('bii->bi', hessian), 1e-12)
    return np.linalg.inv(hessian + 1e-6 * scale[:, :, None] * np.eye(len(by)))


def _edges(law: Law, theta: np.ndarray) -> dict[str, str]:
    """What is at or beyond the edge of the grid, by label."""
    said = {}
    for label, start, found in zip(law.labels, law.starts(), theta, strict=True):
        if not min(start) < found < max(start):
            side = 'below' if found <= min(start) else 'above'
            said[label] = (
                f'the fit lies on the edge of its grid of starts: {label} is {side} it, so these runs hardly bound it; '
                'add runs that differ more'
            )
    return said


def _loose(law: Law, draws: np.ndarray, told: Container[str]) -> Iterator[str]:
    """Which other constants the bootstraps leave open: by a factor of a thousand, or down to nothing."""
    for label, values in zip(law.labels, draws.T, strict=True) if len(draws) else ():
        low, high = quantiles(np.nan_to_num(values, nan=np.finfo(float).max))  # of what found no law, the largest
        if label not in told and not 0 < high <= _WIDEST * low < np.inf:
            yield (
                f'95% of the bootstraps put {label} anywhere from {low:.3g} to {high:.3g}, so these runs hardly bound '
                'it; add runs that differ more'
            )
