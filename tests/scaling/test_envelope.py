"""The lowest of training curves, and what a model that serves should be."""

import numpy as np
import pytest

from tests.scaling.law_data import TRUE, grid, loss
from tpu_llm.config import ConfigError
from tpu_llm.scaling.allocate import allocate
from tpu_llm.scaling.envelope import envelope
from tpu_llm.scaling.fit import fit
from tpu_llm.scaling.laws import Chinchilla
from tpu_llm.scaling.points import points
from tpu_llm.scaling.serving import optimal, tokens_for, trade


def curves(sizes):
    """Runs of each size over tokens, a point a moment, with the loss of the law all the way."""
    n = np.repeat(sizes, 200)
    d = np.tile(np.geomspace(1e6, 1e11, 200), len(sizes))
    return points(n, d, loss(n, d), names=[f'{size:g}' for size in n])


def test_the_lowest_curves_follow_the_law():
    found = envelope(curves(np.geomspace(1e5, 1e9, 60)), bootstraps=20)
    inner = (found.parameters > 1e6) & (found.parameters < 1e8)
    _, a, b, alpha, beta = TRUE
    best = (alpha * a / (beta * b) * (found.flops / 6) ** beta) ** (1 / (alpha + beta))
    np.testing.assert_allclose(found.parameters[inner], best[inner], rtol=0.09)  # half the step between sizes
    np.testing.assert_allclose(found.tokens[inner] * found.parameters[inner] * 6, found.flops[inner], rtol=1e-6)
    assert found.size_law.power.value == pytest.approx(beta / (alpha + beta), abs=0.05)
    assert found.size_law.power.value + found.token_law.power.value == pytest.approx(1, abs=1e-6)


def test_where_the_largest_size_is_lowest_larger_ones_are_asked_for():
    assert 'add larger sizes' in envelope(curves(np.geomspace(1e5, 1e7, 9)), bootstraps=5).warnings[0]


def test_one_size_has_no_envelope():
    with pytest.raises(ConfigError, match='needs at least 2'):
        envelope(curves(np.array([1e6])), bootstraps=0)


@pytest.fixture(scope='module')
def law():
    return fit(Chinchilla(), grid(), bootstraps=0)


def test_without_serving_the_cheapest_run_is_the_compute_optimal_one(law):
    best = allocate(law, 1e21)
    found = trade(law, best.loss.value, served=0.0)
    assert found.parameters == pytest.approx(best.parameters.value, rel=1e-3)
    assert found.training == pytest.approx(1e21, rel=1e-6)


def test_serving_takes_a_smaller_model_and_no_size_is_cheaper(law):
    first, _ = optimal(law, 1e21, served=1e12)
    found = trade(law, first.loss, served=1e12)
    assert found.parameters < first.parameters
    assert found.tokens > first.tokens
    assert found.total < first.total
    sizes = np.geomspace(found.parameters / 3, found.parameters * 3, 301)
    costs = 6 * sizes * tokens_for(law, sizes, first.loss) + 2 * sizes * 1e12
    assert found.total <= costs.min() * (1 + 1e-9)
    assert loss(found.parameters, found.tokens, law.constants) == pytest.approx(first.loss, rel=1e-9)


def test_a_loss_below_what_is_left_in_the_end_is_refused(law):
    with pytest.raises(ConfigError, match=r'none is below E = 1\.7'):
        trade(law, 1.69, served=1e12)
