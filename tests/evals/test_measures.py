"""Sums over rows, their intervals and the differences of two models, against closed forms and published numbers."""

import math

import numpy as np
import pytest
from scipy import stats

from tpu_llm.evals.measures import Measured, difference, estimate, mcnemar, mean


def test_forms():
    added = np.array([[3.0, 2.0], [5.0, 6.0]])
    assert Measured(added).value == 1.0
    assert Measured(added, 'bits').value == pytest.approx(1 / math.log(2))
    assert Measured(added, 'perplexity').value == pytest.approx(math.e)


def test_shares_have_wilsons_interval():
    """81 of 263: 0.2553 to 0.3662 (Newcombe, 1998, table I, method 3)."""
    found = estimate(mean([1.0] * 81 + [0.0] * 182))
    assert found.value == pytest.approx(81 / 263)
    assert (found.low, found.high) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert not mean([0.5, 1.0]).proportion
    assert not Measured(np.array([[1.0, 2.0], [0.0, 3.0]])).proportion


def test_means_have_that_of_the_bootstrap():
    """Of 400 normal values it is, but for the draws, the mean and 1.96 standard errors."""
    values = np.random.default_rng(3).normal(5.0, 2.0, 400)
    found, error = estimate(mean(values)), values.std() / 20
    assert (found.low, found.high) == pytest.approx(
        (values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.15 * error
    )
    assert estimate(mean(values)) == found  # drawn in the same way each time


def test_ratios_draw_rows_and_not_bytes():
    """Bits per byte of long and short rows: against the delta method for a ratio of means."""
    random = np.random.default_rng(4)
    size = random.integers(10, 1000, 300).astype(float)
    nats = size * random.normal(1.0, 0.2, 300)
    found = estimate(Measured(np.stack([nats, size], axis=1), 'bits'))
    ratio = nats.sum() / size.sum()
    error = math.sqrt(np.mean((nats - ratio * size) ** 2) / 300) / size.mean() / math.log(2)
    half = (found.high - found.low) / 2
    assert half == pytest.approx(1.96 * error, rel=0.1)


def test_of_a_single_row_nothing_is_known():
    found = estimate(mean([0.3]))
    assert (found.value, found.low, found.high) == (0.3, -math.inf, math.inf)
    assert difference(mean([0.3]), mean([0.1])).p == 1.0


@pytest.mark.parametrize(
    ('first', 'second', 'p'),
    [
        # 9 rows that only the first got right, 1 only the second: 2 · (1 + 10) / 2^10; the others do not count.
        ([1] * 9 + [0] + [1] * 5, [0] * 9 + [1] + [1] * 5, 22 / 1024),
        ([1, 1, 0, 0], [1, 0, 1, 0], 1.0),
        ([1, 0], [1, 0], 1.0),
        ([1] * 6, [0] * 6, 2 / 64),
    ],
)
def test_mcnemars_exact_test(first, second, p):
    assert mcnemar(np.array(first, bool), np.array(second, bool)) == pytest.approx(p)
    found = difference(mean(first), mean(second))
    assert (found.test, found.p) == ('McNemar', pytest.approx(p))
    assert found.estimate.value == pytest.approx(np.mean(first) - np.mean(second))


def test_pairs_know_more_than_two_intervals():
    """Rows differ far more than the models do: paired, a difference of a tenth of their spread is certain."""
    random = np.random.default_rng(5)
    hard = random.uniform(0, 1, 200)
    first, second = hard + 0.02 + random.normal(0, 0.02, 200), hard
    found = difference(mean(first), mean(second))
    error = (first - second).std() / math.sqrt(200)
    assert found.test == 'paired bootstrap'
    assert (found.estimate.high - found.estimate.low) / 2 == pytest.approx(1.96 * error, rel=0.1)
    assert found.p == pytest.approx(1 / 2001)  # none of 2,000 draws is as far off
    assert estimate(mean(first)).low < estimate(mean(second)).high


def test_the_bootstraps_p_is_that_of_the_t_test():
    random = np.random.default_rng(6)
    first, second = random.normal(0.02, 1, 300), random.normal(0, 1, 300)
    t = stats.ttest_rel(first, second).pvalue
    assert 0.02 < t < 0.9
    assert difference(mean(first), mean(second)).p == pytest.approx(t, abs=0.04)
