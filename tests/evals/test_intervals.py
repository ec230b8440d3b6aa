"""Intervals against closed forms, and what they are for: to hold the true figure as often as they say."""

import math

import numpy as np
import pytest
from scipy import stats

from tpu_llm.evals import intervals


@pytest.mark.parametrize(('hits', 'of'), [(0, 7), (3, 7), (7, 7), (40, 100)])
def test_a_share_has_wilsons_interval(hits, of):
    z, p = stats.norm.ppf(0.975), hits / of
    middle = (p + z * z / (2 * of)) / (1 + z * z / of)
    reach = z * math.sqrt(p * (1 - p) / of + z * z / (4 * of * of)) / (1 + z * z / of)
    found = intervals.share(hits, of)
    assert (found.value, found.low, found.high) == pytest.approx((p, middle - reach, middle + reach), abs=1e-12)


def test_a_mean_has_students_interval():
    values = [1.0, 4.0, 2.0, 7.0]
    low, high = stats.t.interval(0.9, 3, loc=3.5, scale=stats.sem(values))
    found = intervals.mean(values, level=0.9)
    assert (found.value, found.low, found.high) == pytest.approx((3.5, low, high), abs=1e-12)
    one = intervals.mean([2.0])
    assert (one.value, one.low, one.high) == (2.0, -math.inf, math.inf)


def test_of_nothing_nothing_is_known():
    for found in (intervals.share(0, 0), intervals.mean([]), intervals.resampled(math.nan, np.array([math.nan]))):
        assert all(map(math.isnan, (found.value, found.low, found.high)))


def test_a_bound_may_be_infinite_and_what_is_undefined_is_left_out():
    draws = np.array([math.nan, 1.0, 2.0, 3.0, math.inf])
    found = intervals.resampled(2.0, draws, level=0.5)
    assert (found.low, found.high) == (1.0, 3.0)
    assert intervals.resampled(2.0, draws).high == math.inf
