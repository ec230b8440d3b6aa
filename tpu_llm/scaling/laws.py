"""Forms of a scaling law: the loss of a model of N parameters after D tokens, with derivatives.

Every form is fitted by the logarithm of the loss. `log_loss` takes θ [B, P], many candidates at once, and runs [n]; it
returns ln L [B, n] and its derivatives by each of the P numbers of θ, each [B, n]. Numbers of θ are logarithms of the
constants where those are above 0 and spread over decades; `constants` says them as they are published.
"""

import dataclasses
import itertools
from typing import ClassVar, Protocol

import numpy as np

from tpu_llm.scaling.points import Points

_STEEPEST = 500.0  # a line search may try anything; exp(500) is still a number


class Law(Protocol):
    """A form: a dataclass of what is known beforehand."""

    labels: ClassVar[tuple[str, ...]]  # of the constants
    least: ClassVar[tuple[int, int]]  # different sizes, and different numbers of tokens, without which it has no answer

    def log_loss(self, theta: np.ndarray, runs: Points) -> tuple[np.ndarray, list[np.ndarray]]: ...

    def starts(self) -> list[tuple[float, ...]]:
        """For each number of θ the values of the grid from which fits start."""
        ...

    def constants(self, theta: np.ndarray) -> np.ndarray:
        """θ [..., P] as the published constants [..., P]."""
        ...

    def theta(self, constants: np.ndarray) -> np.ndarray:
        """The other way."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class Chinchilla:
    """L = E + A / N^alpha + B / D^beta (Hoffmann et al., 2022, arXiv 2203.15556, approach 3), and its grid."""

    labels: ClassVar[tuple[str, ...]] = ('E', 'A', 'B', 'alpha', 'beta')
    least: ClassVar[tuple[int, int]] = (3, 3)

    def log_loss(self, theta: np.ndarray, runs: Points) -> tuple[np.ndarray, list[np.ndarray]]:
        return _three_terms(theta, np.log(runs.parameters), np.log(runs.tokens))

    def starts(self) -> list[tuple[float, ...]]:
        scales, powers = tuple(np.arange(0.0, 26.0, 5.0)), tuple(np.arange(0.0, 2.1, 0.5))
        return [tuple(np.arange(-1.0, 1.1, 0.5)), scales, scales, powers, powers]

    def constants(self, theta: np.ndarray) -> np.ndarray:
        with np.errstate(over='ignore'):  # a bootstrap that found no law
            return np.concatenate([np.exp(theta[..., :3]), theta[..., 3:]], -1)

    def theta(self, constants: np.ndarray) -> np.ndarray:
        return np.concatenate([np.log(constants[..., :3]), constants[..., 3:]], -1)


@dataclasses.dataclass(frozen=True, slots=True)
class Kaplan:
    """L = ((N_c / N)^(alpha_N / alpha_D) + D_c / D)^alpha_D (Kaplan et al., 2020, arXiv 2001.08361, equation 1.5).

    It leaves no loss in the end. θ = (ln D_c, (alpha_N / alpha_D) ln N_c, alpha_N / alpha_D, alpha_D).
    """

    labels: ClassVar[tuple[str, ...]] = ('N_c', 'D_c', 'alpha_N', 'alpha_D')
    least: ClassVar[tuple[int, int]] = (2, 2)

    def log_loss(self, theta: np.ndarray, runs: Points) -> tuple[np.ndarray, list[np.ndarray]]:
        data, size, ratio, power = (theta[..., i, None] for i in range(4))
        log_n, log_d = np.log(runs.parameters), np.log(runs.tokens)
        first, second = size - ratio * log_n, data - log_d
        total = np.logaddexp(first, second)
        share = np.exp(first - total)
        value = power * total
        by_size = power * share
        return value, [power - by_size, by_size, -by_size * log_n, total]

    def starts(self) -> list[tuple[float, ...]]:
        powers = (0.05, 0.1, 0.2, 0.4)
        return [tuple(np.arange(10.0, 41.0, 5.0)), tuple(np.arange(10.0, 41.0, 5.0)), (0.5, 0.75, 1.0, 1.5), powers]

    def constants(self, theta: np.ndarray) -> np.ndarray:
        data, size, ratio, power = (theta[..., i] for i in range(4))
        with np.errstate(over='ignore'):
            return np.stack([np.exp(size / ratio), np.exp(data), ratio * power, power], -1)

    def theta(self, constants: np.ndarray) -> np.ndarray:
        size, data, power_n, power_d = (constants[..., i] for i in range(4))
        return np.stack([np.log(data), power_n / power_d * np.log(size), power_n / power_d, power_d], -1)


@dataclasses.dataclass(frozen=True, slots=True)
class Repeats:
    """Repeated tokens and parameters beyond those that the different tokens pay for are worth ever less.

    Muennighoff et al., 2023 (arXiv 2305.16264): in the law of `base` (E, A, B, alpha, beta), N and D are replaced by
    D' = U (1 + R_D (1 − exp(−r / R_D))), where U tokens differ and each is seen 1 + r times, and likewise by N', where
    U_N, the compute-optimal size for U tokens, is seen as the unique part of N. Fitted are R_D and R_N, by logarithm.
    """

    base: tuple[float, float, float, float, float]

    labels: ClassVar[tuple[str, ...]] = ('R_D', 'R_N')
    least: ClassVar[tuple[int, int]] = (1, 1)

    def effective(self, theta: np.ndarray, runs: Points) -> tuple[np.ndarray, np.ndarray]:
        """N' and D', each [B, n]."""
        stars = np.exp(theta)
        return (
            _worth(runs.parameters, self._size(runs), stars[..., 1, None])[0],
            _worth(runs.tokens, runs.unique, stars[..., 0, None])[0],
        )

    def log_loss(self, theta: np.ndarray, runs: Points) -> tuple[np.ndarray, list[np.ndarray]]:
        stars = np.exp(theta)
        size, size_by = _worth(runs.parameters, self._size(runs), stars[..., 1, None])
        data, data_by = _worth(runs.tokens, runs.unique, stars[..., 0, None])
        known = np.broadcast_to(Chinchilla().theta(np.array(self.base)), (*theta.shape[:-1], 5))
        value, (_, by_a, by_b, _, _) = _three_terms(known, np.log(size), np.log(data))
        return value, [-self.base[4] * by_b * data_by / data, -self.base[3] * by_a * size_by / size]

    def _size(self, runs: Points) -> np.ndarray:
        """U_N, at most N: the size whose compute-optimal tokens are the different ones."""
        _, a, b, alpha, beta = self.base
        g = (alpha * a / (beta * b)) ** (1 / (alpha + beta))
        return np.minimum(runs.parameters, (runs.unique * g) ** (beta / alpha) * g)

    def starts(self) -> list[tuple[float, ...]]:
        grid = tuple(np.log([0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0]))
        return [grid, grid]

    def constants(self, theta: np.ndarray) -> np.ndarray:
        return np.exp(theta)

    def theta(self, constants: np.ndarray) -> np.ndarray:
        return np.log(constants)


def _three_terms(theta: np.ndarray, log_n: np.ndarray, log_d: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """ln(E + A/N^alpha + B/D^beta) and its derivatives by ln E, ln A, ln B, alpha and beta."""
    e, a, b, alpha, beta = (theta[..., i, None] for i in range(5))
    # Over E: ln L = e + ln(1 + A N^−alpha / E + B D^−beta / E).
    by_size = np.exp(np.minimum(a - e - alpha * log_n, _STEEPEST))
    by_data = np.exp(np.minimum(b - e - beta * log_d, _STEEPEST))
    rest = 1.0 / (1.0 + by_size + by_data)
    by_size *= rest
    by_data *= rest
    return e - np.log(rest), [rest, by_size, by_data, -by_size * log_n, -by_data * log_d]


def _worth(seen: np.ndarray, unique: np.ndarray, star: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What `seen` is worth where `unique` of it differs, and the derivative by the logarithm of `star`."""
    ratio = (seen / unique - 1.0) / star
    gone = np.exp(-ratio)
    return unique * (1.0 + star * (1.0 - gone)), unique * star * (1.0 - gone - ratio * gone)


def grid(law: Law) -> np.ndarray:
    """The starts of a law: [count, P]."""
    return np.array(list(itertools.product(*law.starts())))
