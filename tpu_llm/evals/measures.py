"""What rows add up to, how sure that is, and how sure the difference of two models on the same rows is.

A metric keeps of each row what it adds to sums (a hit and a one; nats and bytes; the n-gram counts of BLEU) and which
number the sums come to. So one resampling serves all: rows are drawn, their sums are taken, the number follows.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from scipy import stats

from tpu_llm.arrays import Float
from tpu_llm.evals import text_metrics
from tpu_llm.evals.intervals import Estimate, resampled, share

Sums = Float[np.ndarray, '*draws K']

DRAWS = 2000
_BLOCK = 100  # draws at a time: with many rows the counts of all would not fit


def _ratio(sums: Sums) -> np.ndarray:
    return sums[..., 0] / sums[..., 1]


# From sums over rows to the metric.
FORMS: dict[str, Callable[[Sums], np.ndarray]] = {
    'mean': _ratio,
    'bits': lambda sums: _ratio(sums) / math.log(2),
    'perplexity': lambda sums: np.exp(_ratio(sums)),
    'bleu': text_metrics.bleu,
    'chrf': text_metrics.chrf,
}


@dataclasses.dataclass(frozen=True, slots=True)
class Measured:
    """One metric: what each row adds, and the form that its sums come to."""

    added: Float[np.ndarray, 'R K']
    form: str = 'mean'

    @property
    def value(self) -> float:
        return float(FORMS[self.form](self.added.sum(axis=0)))

    @property
    def proportion(self) -> bool:
        """Whether it is a share of rows: each is a hit or none."""
        return self.form == 'mean' and bool(np.isin(self.added[:, 0], (0, 1)).all() and (self.added[:, 1] == 1).all())

    def drawn(self, counts: Float[np.ndarray, 'draws R']) -> np.ndarray:
        """The metric of rows that were drawn so many times."""
        return FORMS[self.form](counts @ self.added)


def mean(values: Sequence[float] | np.ndarray) -> Measured:
    """The mean of one value a row."""
    values = np.asarray(values, np.float64)
    return Measured(np.stack([values, np.ones_like(values)], axis=1))


def estimate(measured: Measured) -> Estimate:
    """With Wilson's interval for a share of rows, else the percentiles of 2,000 bootstrap draws of the rows."""
    rows = len(measured.added)
    if measured.proportion:
        return share(int(measured.added[:, 0].sum()), rows)
    if rows < 2:
        return Estimate(measured.value, -math.inf, math.inf)
    return resampled(measured.value, _drawn(rows, measured.drawn))


def _drawn(rows: int, figure: Callable[[Float[np.ndarray, 'draws R']], np.ndarray]) -> np.ndarray:
    """A figure of each draw of as many rows as there are; it is given how often each row is in each of some draws."""
    random, share_of_each = np.random.default_rng(0), np.full(rows, 1 / rows)
    blocks = (random.multinomial(rows, share_of_each, size=_BLOCK).astype(np.float64) for _ in range(DRAWS // _BLOCK))
    return np.concatenate([figure(counts) for counts in blocks])


# -------------------------------------------------------------------------------------------------------- two models


@dataclasses.dataclass(frozen=True, slots=True)
class Difference:
    """Of one metric, the first model minus the second on the same rows, and p of there being none, by a test."""

    estimate: Estimate
    p: float
    test: Literal['McNemar', 'paired bootstrap']


def difference(first: Measured, second: Measured) -> Difference:
    """The interval is of the paired bootstrap; p is McNemar's exact test for hits, else of the bootstrap's differences.

    For the latter they are moved so that their middle is no difference (Efron and Tibshirani, 1993, chapter 16).
    """
    assert first.added.shape == second.added.shape, 'the same rows'
    assert first.form == second.form, 'the same metric'
    value, rows = first.value - second.value, len(first.added)
    drawn = _drawn(rows, lambda counts: first.drawn(counts) - second.drawn(counts))
    found = resampled(value, drawn) if rows > 1 else Estimate(value, -math.inf, math.inf)
    if first.proportion and second.proportion:
        return Difference(found, mcnemar(first.added[:, 0] > 0, second.added[:, 0] > 0), 'McNemar')
    further = np.count_nonzero(np.abs(drawn - value) >= abs(value) - 1e-12)
    return Difference(found, 1.0 if rows < 2 else (1 + further) / (1 + DRAWS), 'paired bootstrap')


def mcnemar(first: np.ndarray, second: np.ndarray) -> float:
    """p of the exact test of McNemar (1947): rows that only one of two models got right are heads and tails."""
    heads, tails = int(np.sum(first & ~second)), int(np.sum(~first & second))
    return float(stats.binomtest(heads, heads + tails).pvalue) if heads + tails else 1.0
