"""Valleys of one budget each, their minima, and what these are as powers of the budget."""

import numpy as np
import pytest

from tests.scaling.law_data import TRUE, loss
from tpu_llm.config import ConfigError
from tpu_llm.scaling.allocate import allocate, exponents
from tpu_llm.scaling.fit import fit
from tpu_llm.scaling.laws import Chinchilla, Kaplan
from tpu_llm.scaling.points import points
from tpu_llm.scaling.valleys import budgets, profiles

BUDGETS = (1e15, 1e16, 1e17, 1e18)


def optimum(flops):
    _, a, b, alpha, beta = TRUE
    return (alpha * a / (beta * b) * (flops / 6) ** beta) ** (1 / (alpha + beta))


def parabolas(noise=0.0, sizes=5, shift=1.0, seed=0):
    """Valleys that are parabolas, with minima at 0.1 C^0.5 and losses 3 C^-0.05 there."""
    c = np.repeat(BUDGETS, sizes)
    n = 0.1 * c**0.5 * shift * np.tile(np.geomspace(0.25, 4, sizes), len(BUDGETS))
    depth = 3 * c**-0.05 + 0.02 * np.log(n / (0.1 * c**0.5)) ** 2
    return points(n, c / (6 * n), depth + noise * np.random.default_rng(seed).normal(size=len(n)), c)


def test_minima_and_powers_of_parabolas_are_exact():
    found = profiles(parabolas(), bootstraps=0)
    for valley, flops in zip(found.valleys, BUDGETS, strict=True):
        assert valley.parameters.value == pytest.approx(0.1 * flops**0.5, rel=1e-9)
        assert valley.tokens.value == pytest.approx(flops**0.5 / 0.6, rel=1e-9)
        assert valley.loss.value == pytest.approx(3 * flops**-0.05, rel=1e-9)
        np.testing.assert_allclose(valley(valley.runs.parameters), valley.runs.loss, rtol=1e-9)
    assert found.parameters.power.value == pytest.approx(0.5, abs=1e-9)
    assert found.parameters(1e20) == pytest.approx(1e9, rel=1e-6)
    assert found.tokens.power.value == pytest.approx(0.5, abs=1e-9)
    assert found.warnings == ()


def test_intervals_hold_what_is_true_as_often_as_they_say():
    held = []
    for seed in range(40):
        found = profiles(parabolas(noise=2e-3, seed=seed), bootstraps=200, seed=seed)
        held.append(found.parameters.power.low < 0.5 < found.parameters.power.high)
        pairs = zip(found.valleys, BUDGETS, strict=True)
        held += [valley.parameters.low < 0.1 * c**0.5 < valley.parameters.high for valley, c in pairs]
    assert 0.85 < np.mean(held) < 0.99


def test_the_three_ways_agree_on_one_law():
    """Losses of a law: parabolas find its optimum within a few percent, its fit exactly."""
    c = np.repeat(BUDGETS, 7)
    n = np.concatenate([optimum(budget) * np.geomspace(0.5, 2, 7) for budget in BUDGETS])
    runs = points(n, c / (6 * n), loss(n, c / (6 * n)))
    law = fit(Chinchilla(), runs, bootstraps=10)
    for valley in profiles(runs, bootstraps=0).valleys:
        assert valley.parameters.value == pytest.approx(optimum(valley.flops), rel=0.02)
        allocated = allocate(law, valley.flops)
        assert allocated.parameters.value == pytest.approx(optimum(valley.flops), rel=1e-6)
        assert allocated.loss.value == pytest.approx(valley.loss.value, rel=1e-3)
    size, tokens = exponents(law)
    assert size.value == pytest.approx(TRUE[4] / (TRUE[3] + TRUE[4]), rel=1e-6)
    assert size.value + tokens.value == pytest.approx(1)


def test_kaplans_optimum_is_the_least_loss_of_a_budget():
    n, d = (each.ravel() for each in np.meshgrid(np.geomspace(1e5, 1e9, 6), np.geomspace(1e7, 1e10, 6)))
    law = fit(Kaplan(), points(n, d, ((8.8e13 / n) ** 0.8 + 5.4e13 / d) ** 0.095), bootstraps=0)
    tried = np.geomspace(1e6, 1e9, 20001)
    losses = law.predict(points(tried, 1e18 / 6 / tried, np.ones_like(tried)))
    assert allocate(law, 1e18).parameters.value == pytest.approx(tried[np.argmin(losses)], rel=1e-3)


def test_budgets_that_were_rounded_are_one_budget():
    runs = points([1, 2, 3, 1, 2, 3], [1] * 6, [1.0] * 6, [1.00e9, 1.04e9, 0.97e9, 3.1e9, 3.0e9, 2.95e9])
    assert [len(group) for group in budgets(runs)] == [3, 3]


@pytest.mark.parametrize(('shift', 'side'), [(10.0, 'the smallest size'), (0.1, 'the largest size')])
def test_a_minimum_at_the_edge_of_the_sizes_is_told_and_not_used(shift, side):
    found = profiles(parabolas(shift=shift), bootstraps=0)
    assert found.parameters is None
    assert all(side in valley.problem for valley in found.valleys)
    assert 'needs at least 2' in found.warnings[-1]


def test_runs_far_above_the_least_loss_bend_no_parabola():
    runs = parabolas(sizes=7)
    runs.loss[6::7] += 1.0  # the largest model of each budget has hardly trained
    found = profiles(runs, bootstraps=0)
    assert {len(valley.near) for valley in found.valleys} <= {5, 6}
    assert found.parameters.power.value == pytest.approx(0.5, abs=1e-9)
    assert found.valleys[0].parameters.value == pytest.approx(0.1 * BUDGETS[0] ** 0.5, rel=1e-9)


def test_a_hill_has_no_minimum():
    runs = parabolas()
    runs.loss[:5] = 10 - runs.loss[:5]
    found = profiles(runs, bootstraps=0)
    assert 'do not bend up' in found.valleys[0].problem
    assert found.parameters.power.value == pytest.approx(0.5, abs=1e-9)


def test_a_budget_of_too_few_sizes_is_named():
    runs = parabolas()
    warnings = profiles(runs.take(np.arange(3, len(runs))), bootstraps=0).warnings
    assert warnings == ('budget 1e+15: it has 2 sizes, and a valley needs 3; it is left out',)


def test_too_few_sizes_say_how_many_are_needed():
    with pytest.raises(ConfigError, match=r'needs at least 3 finished runs of different sizes.*has 2'):
        profiles(parabolas(sizes=2))
