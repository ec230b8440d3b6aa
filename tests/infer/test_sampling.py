"""Which tokens can be drawn, and how often they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tpu_llm.config import ConfigError
from tpu_llm.infer.sampling import Greedy, Sample

PROBABILITIES = np.array([0.1, 0.4, 0.05, 0.25, 0.2])
LOGITS = jnp.log(jnp.asarray(PROBABILITIES))[None] + 3.0

# What the settings leave of the five tokens.
CUTS = [
    (Sample(), [0, 1, 2, 3, 4]),
    (Sample(top_k=1), [1]),
    (Sample(top_k=3), [1, 3, 4]),
    (Sample(top_k=9), [0, 1, 2, 3, 4]),
    (Sample(top_p=0.01), [1]),
    (Sample(top_p=0.6), [1, 3]),
    (Sample(top_p=0.7), [1, 3, 4]),
    (Sample(top_p=0.9), [0, 1, 3, 4]),
    (Sample(top_k=3, top_p=0.7), [1, 3]),  # of three, 1 and 3 have 0.65 / 0.85
]


@pytest.mark.parametrize(('sampling', 'kept'), CUTS)
def test_what_is_cut_cannot_be_drawn_and_the_rest_keeps_its_odds(sampling, kept):
    cut = np.asarray(sampling.cut(LOGITS))[0]
    assert np.flatnonzero(np.isfinite(cut)).tolist() == kept
    np.testing.assert_array_equal(cut[kept], LOGITS[0, jnp.array(kept)])


def test_rows_are_cut_each_by_itself():
    logits = jnp.array([[0.0, 1.0, 2.0], [2.0, 1.0, 0.0]])
    assert np.isfinite(Sample(top_k=2).cut(logits)).tolist() == [[False, True, True], [True, True, False]]


def draws(sampling, count=20_000):
    keys = jax.random.split(jax.random.key(0), count)
    tokens = sampling(jnp.broadcast_to(LOGITS, (count, 5)), keys)
    return np.bincount(tokens, minlength=5) / count


@pytest.mark.parametrize(
    'sampling', [Sample(), Sample(temperature=0.5), Sample(temperature=2.0), Sample(top_k=3), Sample(top_p=0.6)]
)
def test_tokens_come_as_often_as_their_probabilities_say(sampling):
    """20,000 draws: four standard errors of a share are at most 0.014."""
    expected = PROBABILITIES ** (1 / sampling.temperature)
    kept = np.isfinite(np.asarray(sampling.cut(LOGITS / sampling.temperature))[0])
    expected = expected * kept / (expected * kept).sum()
    np.testing.assert_allclose(draws(sampling), expected, atol=0.015)


def test_greedy_takes_the_likeliest():
    keys = jax.random.split(jax.random.key(0), 2)
    assert Greedy()(jnp.array([[0.0, 3.0, 1.0], [2.0, -1.0, 0.0]]), keys).tolist() == [1, 0]


WRONG = [
    ({'temperature': 0.0}, r'temperature is 0.0; it must be above 0 \(for the likeliest token use Greedy\(\)\)'),
    ({'temperature': -1.0}, 'temperature is -1.0; it must be above 0'),
    ({'temperature': float('nan')}, 'temperature is nan; it must be above 0'),
    ({'top_k': -1}, 'top_k = -1 must not be negative, top_p = 1.0 be above 0 and at most 1'),
    ({'top_p': 0.0}, 'top_k = 0 must not be negative, top_p = 0.0 be above 0 and at most 1'),
    ({'top_p': 1.5}, 'top_k = 0 must not be negative, top_p = 1.5 be above 0 and at most 1'),
]


@pytest.mark.parametrize(('fields', 'message'), WRONG)
def test_settings_that_cannot_be_say_why(fields, message):
    with pytest.raises(ConfigError, match=message):
        Sample(**fields)
