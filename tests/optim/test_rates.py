"""A parameter's own rate and gain, as a model that grew from a smaller one asks for them."""

import jax.numpy as jnp
import numpy as np
import pytest

from tpu_llm.config import ConfigError
from tpu_llm.optim.optimizer import SGD, Adafactor, AdamW, Lion, Muon
from tpu_llm.optim.params import ParamInfo
from tpu_llm.optim.schedule import Schedule

FLAT = Schedule(peak=0.1, decay='constant')
RATE, GAIN = 0.25, 4.0
RANDOM = np.random.default_rng(0)
VALUE, GRADIENT = RANDOM.standard_normal((2, 6, 5))


def moved(optimizer, gradient, **info):
    """What one step takes off a matrix."""
    tx = optimizer.make({'up.kernel': ParamInfo('DF', 'D', **info)}, 10)
    params, gradients = ({'up.kernel': jnp.asarray(x, jnp.float32)} for x in (VALUE, gradient))
    after, _, _ = tx(gradients, tx.init(params), params, jnp.int32(0), FLAT.peak)
    return VALUE - np.asarray(after['up.kernel'], np.float64)


@pytest.mark.parametrize(
    ('optimizer', 'direction'),
    [
        (AdamW(schedule=FLAT, eps=0.3, clip=0.0), lambda g: g / (np.abs(g) + 0.3)),
        (SGD(schedule=FLAT, clip=0.0), lambda g: g),
        (Lion(schedule=FLAT, clip=0.0), np.sign),
        (Adafactor(schedule=FLAT, clip=0.0), np.sign),
    ],
    ids=['AdamW', 'SGD', 'Lion', 'Adafactor'],
)
def test_the_optimizer_sees_the_gained_gradient_and_steps_at_the_rate(optimizer, direction):
    expected = 0.1 * RATE * direction(GAIN * GRADIENT)
    np.testing.assert_allclose(moved(optimizer, GRADIENT, rate=RATE, gain=GAIN), expected, atol=1e-5)


def test_eps_means_the_same_for_gradients_that_are_smaller_in_a_larger_model():
    adam = AdamW(schedule=FLAT, eps=0.3, clip=0.0)
    np.testing.assert_allclose(moved(adam, GRADIENT / GAIN, gain=GAIN), moved(adam, GRADIENT), atol=1e-6)


def test_decay_takes_as_much_a_step_whatever_the_rate():
    adam = AdamW(schedule=FLAT, weight_decay=0.5, clip=0.0)
    plain = AdamW(schedule=FLAT, clip=0.0)
    taken = moved(adam, GRADIENT, rate=RATE) - moved(plain, GRADIENT, rate=RATE)
    np.testing.assert_allclose(taken, 0.1 * 0.5 * VALUE, atol=1e-6)


def test_gradients_are_clipped_as_they_are():
    sgd = SGD(schedule=FLAT, momentum=0.0, clip=1.0)
    expected = 0.1 * GAIN * GRADIENT / np.linalg.norm(GRADIENT)
    np.testing.assert_allclose(moved(sgd, GRADIENT, gain=GAIN), expected, atol=1e-6)


def test_muon_has_no_such_rule():
    with pytest.raises(ConfigError, match='those of Muon are orthogonal matrices; use AdamW'):
        moved(Muon(schedule=FLAT), GRADIENT, rate=RATE)
