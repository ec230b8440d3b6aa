"""Constants that are known are found again; on published runs, those of the replication."""

import os
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import minimize

from tests.scaling.law_data import TRUE, grid, loss
from tpu_llm.config import ConfigError
from tpu_llm.scaling.fit import DELTA, fit
from tpu_llm.scaling.laws import Chinchilla, Kaplan, Repeats
from tpu_llm.scaling.points import drop_highest, points, read

PUBLISHED = Path(
    os.environ.get('TPU_LLM_CHINCHILLA_POINTS', Path(__file__).parents[3] / 'shared/data/chinchilla_points.csv')
)
# Besiroglu et al., 2024, arXiv 2404.10102: E, A, B, alpha, beta and their standard errors.
REPLICATION = np.array([1.817, 482.0, 2085.4, 0.3478, 0.3659])
ERRORS = np.array([0.026, 124.5, 1293.3, 0.0154, 0.0206])

LAWS = {
    'chinchilla': (Chinchilla(), [0.5, 5.9, 7.4, 0.3, 0.4]),
    'kaplan': (Kaplan(), [31.0, 24.0, 0.8, 0.09]),
    'repeats': (Repeats(base=tuple(TRUE)), [2.5, 1.3]),
}


def repeated(stars=(15.0, 5.0)):
    """Runs over 1, 2, 4, 16 and 64 epochs of what differs, with the losses of the law."""
    runs = grid()
    epochs = np.resize([1.0, 2.0, 4.0, 16.0, 64.0], len(runs))
    made = points(runs.parameters, runs.tokens, runs.loss)
    object.__setattr__(made, 'unique', runs.tokens / epochs)
    law = Repeats(base=tuple(TRUE))
    made.loss[:] = np.exp(law.log_loss(np.log([stars]), made)[0][0])
    return law, made


@pytest.mark.parametrize('name', LAWS)
def test_derivatives_are_those_of_differences(name):
    law, theta = LAWS[name]
    runs = repeated()[1] if name == 'repeats' else grid()
    theta = np.array([theta])
    _, by = law.log_loss(theta, runs)
    for i in range(theta.shape[1]):
        step = np.zeros_like(theta)
        step[0, i] = 1e-5
        difference = (law.log_loss(theta + step, runs)[0] - law.log_loss(theta - step, runs)[0]) / 2e-5
        np.testing.assert_allclose(np.broadcast_to(by[i], difference.shape), difference, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize('name', LAWS)
def test_constants_and_theta_are_two_ways_to_say_one_thing(name):
    law, theta = LAWS[name]
    np.testing.assert_allclose(law.theta(law.constants(np.array(theta))), theta, rtol=1e-12)


def test_known_constants_are_found():
    found = fit(Chinchilla(), grid(), bootstraps=0)
    np.testing.assert_allclose(found.constants, TRUE, rtol=1e-6)
    assert found.warnings == ()


def test_known_constants_are_found_within_a_percent_among_a_few_runs_that_went_wrong():
    runs = grid(noise=2e-4)
    runs.loss[::13] *= 1.2  # Huber's loss does not care how far off they are
    found = fit(Chinchilla(), runs, bootstraps=200)
    np.testing.assert_allclose(found.constants, TRUE, rtol=0.01)
    low, high = np.quantile(found.draws, [0.005, 0.995], axis=0)
    assert np.all((low < TRUE) & (high > TRUE))


def test_kaplans_constants_are_found():
    true = np.array([8.8e13, 5.4e13, 0.076, 0.095])  # of the paper
    runs = grid()
    runs.loss[:] = ((true[0] / runs.parameters) ** (true[2] / true[3]) + true[1] / runs.tokens) ** true[3]
    np.testing.assert_allclose(fit(Kaplan(), runs, bootstraps=0).constants, true, rtol=1e-2)


def test_the_worth_of_repeats_is_found():
    law, runs = repeated()
    np.testing.assert_allclose(fit(law, runs, bootstraps=0).constants, [15.0, 5.0], rtol=1e-3)


def test_tokens_seen_once_are_worth_themselves_and_a_hundredth_time_nothing():
    law, runs = repeated()
    _, worth = law.effective(np.log([[15.0, 5.0]]), runs)
    once = runs.unique == runs.tokens
    np.testing.assert_allclose(worth[0][once], runs.tokens[once])
    object.__setattr__(runs, 'unique', runs.tokens / 1000)
    np.testing.assert_allclose(law.effective(np.log([[15.0, 5.0]]), runs)[1][0], 16 * runs.unique, rtol=1e-9)


def test_minima_of_bootstraps_are_those_of_scipy():
    """As published: L-BFGS on the sum of Huber losses."""
    runs = grid(noise=0.01)
    found = fit(Chinchilla(), runs, bootstraps=3, seed=3)
    counts = np.random.default_rng(3).multinomial(len(runs), np.full(len(runs), 1 / len(runs)), size=3)
    law, start = Chinchilla(), Chinchilla().theta(found.constants)
    for draw, weights in zip(found.draws, counts, strict=True):

        def huber(theta, weights=weights):
            value, by = law.log_loss(theta[None], runs)
            error = (value[0] - np.log(runs.loss)) / DELTA
            pull = np.clip(error, -1, 1)
            each = np.where(abs(error) <= 1, error**2 / 2, abs(error) - 0.5)
            # Sums rather than products of matrices: BLAS's threads would wait for each other most of the time.
            return np.sum(weights * each), np.array([np.sum(weights * pull * d[0]) for d in by]) / DELTA

        options = {'ftol': 1e-13, 'gtol': 1e-6, 'maxiter': 2000, 'maxcor': 20}
        theirs = minimize(huber, start, jac=True, method='L-BFGS-B', options=options)
        ours = huber(law.theta(draw))[0]
        assert ours <= theirs.fun * (1 + 1e-8)
        np.testing.assert_allclose(loss(1e7, 1e9, draw), loss(1e7, 1e9, law.constants(theirs.x)), rtol=1e-4)


@pytest.mark.skipif(not PUBLISHED.exists(), reason=f'no {PUBLISHED}; set TPU_LLM_CHINCHILLA_POINTS')
def test_published_runs_give_the_replications_constants():
    """The 245 runs of the Chinchilla paper's figure, without the five of highest loss."""
    runs = drop_highest(read(PUBLISHED, {'N': 'Model Size', 'C': 'Training FLOP'}).points, 5)
    found = fit(Chinchilla(), runs, bootstraps=500)
    assert np.all(np.abs(found.constants - REPLICATION) < ERRORS)
    # And what is known of them is as little: the intervals are as wide as theirs.
    np.testing.assert_allclose(found.draws.std(0), ERRORS, rtol=0.3)


def test_too_few_runs_say_how_many_are_needed():
    runs = grid()
    with pytest.raises(ConfigError, match=r'at least 6 finished runs, of 3 sizes and 3 .* there are 5, of 5 and 1'):
        fit(Chinchilla(), runs.take(np.arange(5)))
    with pytest.raises(ConfigError, match=r'there are 16, of 8 and 2'):
        fit(Chinchilla(), runs.take(np.arange(16)))


def test_an_optimum_on_the_edge_of_the_grid_is_told():
    runs = grid()
    runs.loss[:] = 400 / runs.parameters**0.34 + 1800 / runs.tokens**0.37  # nothing is left: ln E goes to −∞
    warnings = fit(Chinchilla(), runs, bootstraps=0).warnings
    assert any('E is below' in line for line in warnings), warnings


def test_a_constant_that_bootstraps_leave_open_is_told():
    warnings = fit(Chinchilla(), grid(noise=0.1).take(np.arange(0, 64, 7)), bootstraps=100).warnings
    assert any('put A anywhere from' in line for line in warnings), warnings
    assert fit(Chinchilla(), grid(noise=1e-3), bootstraps=100).warnings == ()
