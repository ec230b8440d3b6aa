"""Factored moments at the ends of float32's range."""

import jax.numpy as jnp
import numpy as np
import pytest

from tpu_llm.optim.factored import scale_by_factored_moments
from tpu_llm.optim.params import ParamInfo

# One row never had a gradient, as a token that was not seen.
GRADIENT = np.random.default_rng(0).standard_normal((6, 5)).astype(np.float32)
GRADIENT[2] = 0.0


def step(gradient):
    method = scale_by_factored_moments({'table': ParamInfo('VD', '')}, decay_rate=0.8, min_factored=2)
    params = {'table': jnp.asarray(gradient)}
    updates, state = method.update(params, method.init(params))
    assert state.rows['table'].shape == (6, 1)
    assert state.columns['table'].shape == (1, 5)
    assert not state.full
    return np.asarray(updates['table'])


@pytest.mark.parametrize('scale', [1e-12, 1e-6, 1e6, 1e18])
def test_the_step_does_not_depend_on_the_gradients_scale(scale):
    expected = step(GRADIENT)
    assert np.isclose(np.sqrt((expected**2).mean()), 1.0, atol=0.1)
    np.testing.assert_allclose(step(GRADIENT * np.float32(scale)), expected, rtol=1e-4)
