"""NEFTune: the noise is as large as published, of every text by its own length, and gone in evaluation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from tpu_llm.config import ConfigError, validate
from tpu_llm.objectives.next_token import NextToken
from tpu_llm.objectives.noisy import Noisy, text_lengths

pytestmark = pytest.mark.usefixtures('quick_compile')

SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 2, 0], [1, 2, 2, 3, 3, 3, 0, 0]])
LENGTHS = [[3, 3, 3, 4, 4, 4, 4, 1], [1, 2, 2, 3, 3, 3, 2, 2]]


@pytest.fixture(scope='module')
def model():
    graph = toy.graph(toy.config(layers=1))
    return graph.bind(toy.weights(graph))


def embedded(model, objective, key):
    """What the layers see at first: with the stack taken out, hidden states are normed embeddings."""
    seen = []

    class Watched(type(model)):
        def _layers(self, x, context, stack):
            seen.append(x)
            return super()._layers(x, context, stack)

    model.__class__, before = Watched, model.__class__
    try:
        objective.read(model, toy.batch(SEGMENTS), key)
    finally:
        model.__class__ = before
    return np.asarray(seen[0])


def test_lengths_are_those_of_the_texts():
    assert text_lengths(jnp.asarray(SEGMENTS)).tolist() == LENGTHS


def test_noise_fills_its_bounds_and_no_more(model):
    plain = embedded(model, NextToken(), None)
    draws = [embedded(model, Noisy(alpha=5.0), jax.random.key(i)) - plain for i in range(12)]
    noise = np.abs(np.stack(draws)) * np.sqrt(np.array(LENGTHS) * plain.shape[-1])[None, ..., None] / 5.0
    assert noise.max() <= 1.0 + 1e-4
    assert (noise.max(axis=(0, 3)) > 0.95).all()
    assert noise.mean() == pytest.approx(0.5, abs=0.02)
    assert np.abs(np.mean(draws)) < 0.02


def test_rows_and_keys_draw_apart(model):
    plain = embedded(model, NextToken(), None)
    one, other = (embedded(model, Noisy(), jax.random.key(i)) - plain for i in (0, 1))
    assert not np.allclose(one, other)
    assert not np.allclose(one[0, 3:6], one[1, 3:6])


def test_evaluation_and_the_unembedding_have_none(model):
    batch = toy.batch(SEGMENTS)
    common = {'frozen': None, 'step': jnp.zeros((), jnp.int32)}
    loss, weight, _ = Noisy()(model, batch, key=None, **common)
    expected, _, _ = NextToken()(model, batch, key=None, **common)
    assert (float(loss), float(weight)) == (float(expected), float(jnp.sum(batch.weights)))
    before = model.embed
    noisy, _, _ = Noisy()(model, batch, key=jax.random.key(0), **common)
    assert float(noisy) != float(expected)
    assert model.embed is before
    gradient = jax.grad(lambda x: Noisy(alpha=1e-6)(model, _weighed(batch, x), key=jax.random.key(0), **common)[0])
    assert np.isfinite(gradient(batch.weights)).all()
    assert float(Noisy(alpha=1e-6)(model, batch, key=jax.random.key(0), **common)[0]) == pytest.approx(float(expected))


def _weighed(batch, weights):
    return dataclasses.replace(batch, weights=weights)


def test_no_noise_says_so():
    with pytest.raises(ConfigError, match='alpha is 0; write a number above 0, published are 5, 10 and 15'):
        validate(Noisy(alpha=0))
    with pytest.raises(ConfigError, match='label_smoothing is 1'):
        validate(Noisy(label_smoothing=1.0))
