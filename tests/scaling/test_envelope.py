"""The lowest of training curves, and what a model that serves should be."""

import json

import numpy as np
import pytest

from tests.scaling.law_data import TRUE, grid, loss
from tpu_llm.config import ConfigError
from tpu_llm.scaling.allocate import allocate
from tpu_llm.scaling.envelope import curves as recorded
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


@pytest.mark.filterwarnings('error')
def test_ends_of_runs_are_no_curves():
    with pytest.raises(ConfigError, match='no run has two moments'):
        envelope(grid(), bootstraps=10)
    tokens = [1e8, 1.0001e8, 1e12, 1.0001e12]  # each run's moments are as good as one
    moments = points([1e6, 1e6, 2e6, 2e6], tokens, [3.0, 3.0, 2.0, 2.0], names='aabb')
    with pytest.raises(ConfigError, match='needs curves'):
        envelope(moments, bootstraps=10)


def test_a_sweep_has_logged_its_curves(tmp_path):
    rows = ['name,parameters,tokens,flops,loss,status', 'a,100,2000,1.4e6,3.0,finished', 'b,1,1,1,,failed']
    (tmp_path / 'table.csv').write_text('\n'.join(rows))
    (tmp_path / 'runs/a').mkdir(parents=True)
    lines = [{'step': 10, 'loss': 4.0}, {'step': 20, 'loss': 3.1}, {'step': 20, 'heldout_loss': 3.0}]
    (tmp_path / 'runs/a/metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    found = recorded(tmp_path)
    assert found.names == ('a', 'a')
    np.testing.assert_allclose(found.tokens, [1000, 2000])
    np.testing.assert_allclose(found.flops, [7e5, 1.4e6])
    np.testing.assert_allclose(found.loss, [4.0, 3.1])
    lines = [{'step': i, 'loss': 4.0 + i % 2, 'heldout_loss': 1 / i} for i in range(1, 41)]
    (tmp_path / 'runs/a/metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    np.testing.assert_allclose(recorded(tmp_path).loss, [line['heldout_loss'] for line in lines])
    lines = [{'step': line['step'], 'loss': line['loss']} for line in lines]
    (tmp_path / 'runs/a/metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    np.testing.assert_allclose(recorded(tmp_path).loss, np.full(20, 20**0.5))


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
