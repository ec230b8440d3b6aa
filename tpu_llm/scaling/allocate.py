"""Where a law puts a budget: the size and the tokens of least loss for so many FLOPs."""

import dataclasses

import numpy as np

from tpu_llm.config import ConfigError
from tpu_llm.scaling.fit import Fit, quantiles
from tpu_llm.scaling.laws import Chinchilla, Kaplan
from tpu_llm.scaling.points import points

_POWERS = ('alpha', 'beta')
FLOPS = 6.0  # a parameter and token of training, where nothing better is known


@dataclasses.dataclass(frozen=True, slots=True)
class Estimate:
    """A number and between which bounds 95 % of the bootstraps lie; NaN bounds where there are none."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f'{self.value:.4g} ({self.low:.4g} to {self.high:.4g})'


def estimate(value: float, draws: np.ndarray) -> Estimate:
    draws = draws[np.isfinite(draws)]
    low, high = quantiles(draws) if len(draws) else (np.nan, np.nan)
    return Estimate(float(value), float(low), float(high))


@dataclasses.dataclass(frozen=True, slots=True)
class Allocation:
    """Of one budget of `flops`."""

    flops: float
    parameters: Estimate
    tokens: Estimate
    loss: Estimate


def allocate(fit: Fit, flops: float, per_parameter: float = FLOPS) -> Allocation:
    """The compute-optimal run of a budget, where a token costs `per_parameter` FLOPs of training a parameter.

    Raises ConfigError for a law of repeats, which has no optimum of its own, and for a budget that is none.
    """
    if not flops > 0:
        raise ConfigError(f'flops = {flops}; a budget is a number above 0')
    both = np.concatenate([fit.constants[None], fit.draws])
    size = _optimum(fit, both, flops / per_parameter)
    tokens = flops / per_parameter / size
    with np.errstate(all='ignore'):
        loss = np.array([_loss(fit, one, n, d) for one, n, d in zip(both, size, tokens, strict=True)])
    return Allocation(flops, *(estimate(each[0], each[1:]) for each in (size, tokens, loss)))


def no_optimum(fit: Fit) -> str:
    """Why the law puts no budget anywhere: more parameters, or more tokens, do not lower its loss; else empty."""
    named = dict(zip(fit.law.labels, fit.constants, strict=True))
    bad = [f'{label} = {value:.4g}' for label, value in named.items() if label.startswith(_POWERS) and not value > 0]
    return f'no compute optimum: {" and ".join(bad)}; the law has one where its powers are above 0' if bad else ''


def _optimum(fit: Fit, constants: np.ndarray, product: float) -> np.ndarray:
    """N of least loss with N D = `product`, for each row of constants."""
    if isinstance(fit.law, Chinchilla):
        _, a, b, alpha, beta = constants.T
        with np.errstate(all='ignore'):  # of bootstraps that found no law; their NaN is in no interval
            return np.exp((np.log(alpha * a / (beta * b)) + beta * np.log(product)) / (alpha + beta))
    if isinstance(fit.law, Kaplan):
        # The sum in brackets is (N_c/N)^s + D_c N / product, with s = alpha_N / alpha_D.
        size, data, power_n, power_d = constants.T
        ratio = power_n / power_d
        return (ratio * size**ratio * product / data) ** (1 / (ratio + 1))
    raise ConfigError(f'{type(fit.law).__name__} is no law of size and tokens alone; allocate by the law it builds on')


def _loss(fit: Fit, constants: np.ndarray, size: float, tokens: float) -> float:
    log, _ = fit.law.log_loss(fit.law.theta(constants[None]), points([size], [tokens], [1.0]))
    return float(np.exp(log[0, 0]))


def exponents(fit: Fit) -> tuple[Estimate, Estimate]:
    """a and b of N ∝ C^a and D ∝ C^b."""
    both = np.concatenate([fit.constants[None], fit.draws])
    if isinstance(fit.law, Chinchilla):
        power = both[:, 4] / (both[:, 3] + both[:, 4])
    elif isinstance(fit.law, Kaplan):
        power = both[:, 3] / (both[:, 2] + both[:, 3])
    else:
        raise ConfigError(f'{type(fit.law).__name__} has no exponents of its own; see the law it builds on')
    return estimate(power[0], power[1:]), estimate(1 - power[0], 1 - power[1:])
