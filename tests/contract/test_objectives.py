"""What every objective must do. A new one is one more row of OBJECTIVES: the objective, its formula in float64 NumPy
from the model's logits, and its value per token where all logits are equal.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import numpy_decoder
import pytest
import toy

from tpu_llm.config import ConfigError
from tpu_llm.models.decoder import Dropout
from tpu_llm.objectives.next_token import NextToken

pytestmark = pytest.mark.usefixtures('quick_compile')

CONFIG = toy.config(layers=1, logit_softcap=3.0, dropout=Dropout(residual=0.3))
GRAPH = toy.graph(CONFIG)
WEIGHTS = toy.weights(GRAPH)
BATCH = dataclasses.replace(
    toy.batch(np.array([[1, 1, 1, 2, 2, 2, 0, 0], [1] * 8])),
    weights=jnp.array([[1, 1, 1, 0, 1, 2, 0, 0], [0, 0, 1, 0.5, 1, 1, 1, 1]], jnp.float32),
)


def next_token(logits, batch, *, z_loss=0.0, label_smoothing=0.0):
    log_z = np.log(np.exp(logits).sum(-1))
    nll = log_z[..., None] - logits
    target = np.take_along_axis(nll, np.asarray(batch.targets)[..., None], -1)[..., 0]
    loss = (1 - label_smoothing) * target + label_smoothing * nll.mean(-1) + z_loss * log_z**2
    return (loss * np.asarray(batch.weights)).sum()


LOG_V = np.log(CONFIG.vocab_size)

OBJECTIVES = {
    'next token': (NextToken(chunk=4), next_token, LOG_V),
    'smoothed, with z-loss': (
        NextToken(label_smoothing=0.1, z_loss=0.01),
        lambda logits, batch: next_token(logits, batch, label_smoothing=0.1, z_loss=0.01),
        LOG_V + 0.01 * LOG_V**2,
    ),
}


@pytest.fixture(scope='module', params=OBJECTIVES)
def row(request):
    """The objective with its gradient, compiled once; its formula; its value at equal logits."""
    objective, formula, uniform = OBJECTIVES[request.param]

    def loss(weights, batch, key=None):
        loss, weight, sums = objective(GRAPH.bind(weights), batch, frozen=None, key=key, step=jnp.int32(0))
        return loss, (weight, sums)

    return jax.jit(jax.value_and_grad(loss, has_aux=True)), formula, uniform


def exact(formula, weights, batch=BATCH):
    logits = numpy_decoder.logits(CONFIG, weights, batch.tokens, batch.segments, batch.positions)
    return formula(logits, batch)


def test_it_gives_finite_float32_sums(row):
    (loss, (weight, sums)), gradients = row[0](WEIGHTS, BATCH)
    for value in (loss, weight, *sums.values()):
        assert value.shape == ()
        assert value.dtype == jnp.float32
        assert jnp.isfinite(value)
    assert weight == BATCH.weights.sum()
    for name, gradient in gradients.items():
        assert jnp.isfinite(gradient).all()
        assert jnp.abs(gradient).max() > 0, f'{name} does not learn'


def test_loss_is_that_of_plain_numpy(row):
    (loss, _), _ = row[0](WEIGHTS, BATCH)
    np.testing.assert_allclose(loss, exact(row[1], WEIGHTS), rtol=1e-6)


def test_tokens_of_weight_zero_change_nothing(row):
    ignored = BATCH.weights == 0
    other = dataclasses.replace(BATCH, targets=jnp.where(ignored, (BATCH.targets + 1) % 19, BATCH.targets))
    result, changed = row[0](WEIGHTS, BATCH), row[0](WEIGHTS, other)
    jax.tree.map(np.testing.assert_array_equal, result, changed)


def test_it_drops_where_it_is_given_a_key(row):
    whole, _ = row[0](WEIGHTS, BATCH)
    dropped, _ = row[0](WEIGHTS, BATCH, jax.random.key(0))
    assert abs(dropped[0] - whole[0]) > 0.1


def test_a_batch_is_the_sum_of_its_parts(row):
    """Loss, weight and gradients are linear in the weights."""
    parts = [dataclasses.replace(BATCH, weights=BATCH.weights * share) for share in (0.25, 0.75)]
    (loss, (weight, _)), gradients = row[0](WEIGHTS, BATCH)
    (losses, (weights, _)), partial = jax.tree.map(jnp.add, *(row[0](WEIGHTS, part) for part in parts))
    np.testing.assert_allclose((losses, weights), (loss, weight), rtol=1e-6)
    for name, gradient in gradients.items():
        np.testing.assert_allclose(partial[name], gradient, atol=1e-5)


def test_equal_logits_give_the_closed_form(row):
    flat = WEIGHTS | {'head.kernel': jnp.zeros_like(WEIGHTS['head.kernel'])}
    (loss, (weight, sums)), _ = row[0](flat, BATCH)
    np.testing.assert_allclose(loss / weight, row[2], rtol=1e-6)
    np.testing.assert_allclose(sums['nll'] / weight, LOG_V, rtol=1e-6)


def test_gradient_is_that_of_float64_differences(row):
    """Along random directions in one parameter at a time; central differences of 1e-5 are off by about 1e-9."""
    _, gradients = row[0](WEIGHTS, BATCH)
    random = np.random.default_rng(0)
    for name, gradient in gradients.items():
        direction = random.standard_normal(gradient.shape)
        direction /= np.linalg.norm(direction)
        ends = [
            exact(row[1], {**WEIGHTS, name: np.asarray(WEIGHTS[name], np.float64) + sign * 1e-5 * direction})
            for sign in (1, -1)
        ]
        slope = (ends[0] - ends[1]) / 2e-5
        np.testing.assert_allclose((gradient * direction).sum(), slope, rtol=1e-4, atol=1e-4, err_msg=name)


WRONG = [
    ({'label_smoothing': 1.0}, r'label_smoothing is 1.0; write a number from 0 to below 1'),
    ({'label_smoothing': -0.1}, r'label_smoothing is -0.1; write a number from 0 to below 1'),
    ({'z_loss': -1e-4}, r'z_loss = -0.0001 and chunk = 0 must not be negative'),
    ({'chunk': -8}, r'z_loss = 0.0 and chunk = -8 must not be negative'),
]


@pytest.mark.parametrize(('fields', 'message'), WRONG)
def test_settings_that_cannot_be_say_why(fields, message):
    with pytest.raises(ConfigError, match=message):
        NextToken(**fields).validate()
