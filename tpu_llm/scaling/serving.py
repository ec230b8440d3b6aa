"""A model that will be used a lot should be smaller and trained for longer than compute-optimal.

Sardana et al. (2023, arXiv 2401.00448): among all sizes and tokens that reach one loss, that which costs least to train
and to serve, 6 N D + 2 N D_served FLOPs. A FLOP of serving is often dearer, since fewer of a chip's are used:
`price` says how much.
"""

import dataclasses

import numpy as np

from tpu_llm.config import ConfigError
from tpu_llm.scaling.allocate import Allocation, allocate
from tpu_llm.scaling.fit import Fit
from tpu_llm.scaling.laws import Chinchilla

_TRAIN, _SERVE = 6.0, 2.0  # FLOPs a parameter and token


@dataclasses.dataclass(frozen=True, slots=True)
class Trade:
    """A run, and what it costs over its life; FLOPs of serving are weighed by their price."""

    parameters: float
    tokens: float
    loss: float
    training: float
    serving: float

    @property
    def total(self) -> float:
        return self.training + self.serving


def tokens_for(fit: Fit, parameters: np.ndarray, loss: float) -> np.ndarray:
    """D at which a model of N parameters reaches the loss; infinite where it never does."""
    e, a, b, alpha, beta = _constants(fit)
    left = loss - e - a / parameters**alpha
    with np.errstate(divide='ignore', invalid='ignore'):
        return np.where(left > 0, (b / left) ** (1 / beta), np.inf)


def trade(fit: Fit, loss: float, served: float, price: float = 1.0) -> Trade:
    """The cheapest size that reaches `loss` and then serves so many tokens.

    Raises ConfigError for a loss that no size reaches.
    """
    e, a, _, alpha, _ = _constants(fit)
    if loss <= e:
        raise ConfigError(f'loss = {loss}: by this fit none is below E = {e:.4g}, however large and long; ask for more')
    if served < 0 or price <= 0:
        raise ConfigError(f'served = {served} and price = {price}: tokens are not negative, and a price is above 0')
    least = (a / (loss - e)) ** (1 / alpha)  # a model of this size would need endless tokens
    low, high = np.log(least), np.log(least) + 30
    for _ in range(12):  # the cost has one minimum in ln N: narrow down to it
        tried = np.linspace(low, high, 201)[1:]
        cost = _cost(fit, np.exp(tried), loss, served, price)
        at, step = tried[np.argmin(cost)], tried[1] - tried[0]
        low, high = max(low, at - step), at + step
    size = float(np.exp(at))
    tokens = float(tokens_for(fit, np.array(size), loss))
    return Trade(size, tokens, loss, _TRAIN * size * tokens, price * _SERVE * size * served)


def optimal(fit: Fit, flops: float, served: float, price: float = 1.0) -> tuple[Trade, Allocation]:
    """What is compute-optimal for a budget of training, and what serving makes of it."""
    allocation = allocate(fit, flops)
    size, tokens = allocation.parameters.value, allocation.tokens.value
    return Trade(size, tokens, allocation.loss.value, flops, price * _SERVE * size * served), allocation


def _cost(fit: Fit, size: np.ndarray, loss: float, served: float, price: float) -> np.ndarray:
    return _TRAIN * size * tokens_for(fit, size, loss) + price * _SERVE * size * served


def _constants(fit: Fit) -> tuple[float, float, float, float, float]:
    if not isinstance(fit.law, Chinchilla):
        raise ConfigError(f'serving is weighed by the law of Chinchilla, and this fit is of {type(fit.law).__name__}')
    e, a, b, alpha, beta = map(float, fit.constants)
    return e, a, b, alpha, beta
