"""The policy-gradient objective against loops in float64, and its gradient against differences."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from tpu_llm.arrays import RolloutBatch
from tpu_llm.config import ConfigError
from tpu_llm.models.scalar_head import ScalarConfig
from tpu_llm.objectives.policy_gradient import PolicyGradient, Tokens, divergence

pytestmark = pytest.mark.usefixtures('quick_compile')

# Responses of 3, 1, 0 and 5 tokens; the third row was left out.
MASK = np.array([[0, 1, 1, 1, 0, 0], [0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0]], np.float32)
SEGMENTS = np.array([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]])
ROWS, LENGTH = MASK.shape


def numbers(seed, scale=1.0):
    return (scale * np.random.default_rng(seed).standard_normal(MASK.shape)).astype(np.float32)


LOG_PROBS = numbers(1) - 3
PLAIN = toy.batch(SEGMENTS)
BATCH = RolloutBatch(
    **{field.name: getattr(PLAIN, field.name) for field in dataclasses.fields(PLAIN)} | {'weights': jnp.asarray(MASK)},
    advantages=numbers(2),
    sampled=LOG_PROBS + numbers(3, 0.3),
    old=LOG_PROBS + numbers(4, 0.3),
    reference=LOG_PROBS + numbers(5, 0.5),
    values=numbers(6),
    returns=numbers(7),
)

KINDS = {
    'grpo': PolicyGradient(kl=0.1),
    'ppo': PolicyGradient(average='tokens', value=0.5),
    'dr. grpo': PolicyGradient(average='length', length=8),
    'dapo': PolicyGradient(average='tokens', clip_high=0.28, correction=1.1),
    'gspo': PolicyGradient(ratio='sequence', clip_low=0.03, clip_high=0.04),
    'rloo': PolicyGradient(clip_low=0.0, clip_high=0.0, kl=0.05, estimator='k1'),
    'k2, values free': PolicyGradient(kl=0.3, estimator='k2', value=1.0, value_clip=0.0),
}


def formula(objective, log_probs, values, batch=BATCH):
    """(loss sum, weight sum) in float64, a token at a time."""
    loss = weight = 0.0
    get = {field.name: np.asarray(getattr(batch, field.name), np.float64) for field in dataclasses.fields(batch)}
    for row in range(ROWS):
        tokens = [t for t in range(LENGTH) if get['weights'][row, t]]
        if not tokens:
            continue
        weight += len(tokens) if objective.average == 'tokens' else 1
        mean = sum(log_probs[row, t] - get['old'][row, t] for t in tokens) / len(tokens)
        for t in tokens:
            log_ratio = log_probs[row, t] - get['old'][row, t] if objective.ratio == 'token' else mean
            ratio, advantage = math.exp(log_ratio), get['advantages'][row, t]
            gain = ratio * advantage
            if objective.clip_high:
                gain = min(gain, min(max(ratio, 1 - objective.clip_low), 1 + objective.clip_high) * advantage)
            if objective.correction:
                gain *= min(math.exp(get['old'][row, t] - get['sampled'][row, t]), objective.correction)
            r = get['reference'][row, t] - log_probs[row, t]
            kl = {'k1': -r, 'k2': r * r / 2, 'k3': math.exp(r) - 1 - r}[objective.estimator]
            error = 0.0
            if objective.value:
                value, was, target = values[row, t], get['values'][row, t], get['returns'][row, t]
                error = (value - target) ** 2
                if objective.value_clip:
                    near = was + min(max(value - was, -objective.value_clip), objective.value_clip)
                    error = max(error, (near - target) ** 2)
            share = {'tokens': 1.0, 'length': 1 / max(objective.length, 1), 'sequences': 1 / len(tokens)}
            loss += share[objective.average] * (-gain + objective.kl * kl + objective.value * error / 2)
    return loss, weight


def tokens(batch):
    return Tokens(**{field.name: getattr(batch, field.name) for field in dataclasses.fields(Tokens)})


def run(objective, log_probs, values, batch=BATCH):
    def loss(log_probs, values):
        token_loss, sums = objective.policy_loss(log_probs, batch.weights, tokens(batch))
        if objective.value:
            token_loss = token_loss + objective.value * objective.value_loss(values, batch.weights, batch)
        return jnp.sum(objective.weigh(jnp.asarray(batch.weights)) * token_loss), sums

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(log_probs, values)


@pytest.mark.parametrize('kind', KINDS)
def test_loss_and_gradient_are_those_of_plain_numpy(kind):
    objective, values = KINDS[kind], numbers(8)
    (loss, sums), gradients = run(objective, jnp.asarray(LOG_PROBS), jnp.asarray(values))
    np.testing.assert_allclose(loss, formula(objective, LOG_PROBS.astype(float), values.astype(float))[0], rtol=2e-6)
    for which, gradient in enumerate(gradients):
        for at in np.ndindex(MASK.shape):
            ends = []
            for sign in (1, -1):
                given = [LOG_PROBS.astype(float), values.astype(float)]
                given[which][at] += sign * 1e-6
                ends.append(formula(objective, *given)[0])
            np.testing.assert_allclose(gradient[at], (ends[0] - ends[1]) / 2e-6, rtol=2e-4, atol=2e-6, err_msg=str(at))
    assert all(np.isfinite(x).all() for x in sums.values())


@pytest.mark.parametrize('kind', ['grpo', 'gspo', 'rloo'])
def test_where_nothing_has_moved_the_gradient_is_reinforce(kind):
    """The ratio is 1: only the advantages count, and no clip binds."""
    objective = dataclasses.replace(KINDS[kind], kl=0.0)
    batch = dataclasses.replace(BATCH, old=LOG_PROBS, advantages=np.broadcast_to(numbers(2)[:, :1], MASK.shape))
    (_, sums), (gradient, _) = run(objective, jnp.asarray(LOG_PROBS), jnp.asarray(LOG_PROBS), batch)
    weights = objective.weigh(jnp.asarray(MASK))
    np.testing.assert_allclose(gradient, -weights * batch.advantages, atol=1e-6)
    assert not sums['clipped'].any()
    np.testing.assert_allclose(sums['ratio'], 1.0)


def test_a_huge_ratio_is_clipped_and_has_no_gradient():
    batch = dataclasses.replace(BATCH, old=LOG_PROBS - 50, advantages=np.abs(numbers(2)))
    (loss, sums), (gradient, _) = run(KINDS['dapo'], jnp.asarray(LOG_PROBS), jnp.asarray(LOG_PROBS), batch)
    assert np.isfinite(loss)
    assert not gradient.any()
    assert sums['clipped'][MASK > 0].all()


def test_the_estimators_of_the_divergence():
    """Their means over many draws are the divergence: exactly of k1, near it of k3; k2 near it where it is small."""
    policy, reference = np.array([0.5, 0.3, 0.2]), np.array([0.45, 0.3, 0.25])
    exact = float((policy * np.log(policy / reference)).sum())
    ratio = jnp.asarray(np.log(reference / policy))
    means = {k: float((policy * divergence(ratio, k)).sum()) for k in ('k1', 'k2', 'k3')}
    assert means['k1'] == pytest.approx(exact, rel=1e-5)
    assert means['k3'] == pytest.approx(exact, rel=1e-5)
    assert means['k2'] == pytest.approx(exact, rel=0.1)


CONFIG = ScalarConfig.of(toy.config(layers=1))


@pytest.mark.parametrize('kind', ['ppo', 'grpo'])
def test_of_a_model(kind):
    """Sums are those of the loss over its own log-probs; rows that were left out change nothing; the critic learns."""
    objective, graph = KINDS[kind], toy.graph(CONFIG)
    weights = toy.weights(graph)

    @jax.jit
    def whole(weights, batch):
        def loss(weights):
            total, count, sums = objective(graph.bind(weights), batch, frozen=None, key=None, step=jnp.int32(0))
            return total, (count, sums)

        return jax.value_and_grad(loss, has_aux=True)(weights)

    (loss, (count, sums)), gradients = whole(weights, BATCH)
    model = graph.bind(weights)
    hidden = model.hidden(PLAIN.tokens, segments=PLAIN.segments, positions=PLAIN.positions)
    log_probs = jnp.take_along_axis(jax.nn.log_softmax(model.logits(hidden)), PLAIN.targets[..., None], 2)[..., 0]
    expected = formula(objective, np.asarray(log_probs, float), np.asarray(model.scores(hidden), float))
    np.testing.assert_allclose((loss, count), expected, rtol=1e-5)
    assert (np.abs(gradients['score']).max() > 0) == (kind == 'ppo')
    away = np.asarray(BATCH.reference - log_probs)[MASK > 0]
    np.testing.assert_allclose(sums['kl'] / count, np.mean(divergence(away, 'k3')), rtol=1e-4)
    other = dataclasses.replace(BATCH, tokens=BATCH.tokens.at[2].set(0), targets=BATCH.targets.at[2].set(1))
    (same, _), _ = whole(weights, other)
    np.testing.assert_allclose(same, loss, rtol=1e-6)


@pytest.mark.parametrize('kind', ['dapo', 'gspo'])
def test_where_no_log_probs_were_taken_before_they_are_those_of_the_step(kind):
    """And only the last columns, which hold the responses, are read."""
    objective, graph = KINDS[kind], toy.graph(toy.config(layers=1))
    weights = toy.weights(graph)
    model = graph.bind(weights)
    logits = model.logits(model.hidden(PLAIN.tokens, segments=PLAIN.segments, positions=PLAIN.positions))
    own = jnp.take_along_axis(jax.nn.log_softmax(logits), PLAIN.targets[..., None], 2)[..., 0]
    mask = MASK * (np.arange(LENGTH) >= 3)

    @jax.jit
    def run(weights, batch):
        def loss(weights):
            total, _, sums = objective(graph.bind(weights), batch, frozen=None, key=None, step=jnp.int32(0))
            return total, sums

        return jax.value_and_grad(loss, has_aux=True)(weights)

    batch = dataclasses.replace(BATCH, weights=jnp.asarray(mask), old=own, values=None, returns=None)
    last = {name: getattr(batch, name)[:, 3:] for name in ('advantages', 'sampled', 'reference')}
    expected, found = run(weights, batch), run(weights, dataclasses.replace(batch, old=None, **last))
    for a, e in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-4, atol=2e-6)
    assert found[0][1]['ratio'] > 0


@pytest.mark.parametrize(
    ('fields', 'said'),
    [
        ({'clip_low': 1.0}, r'clip_low = 1\.0 must be from 0 to below 1'),
        ({'clip_low': 0.0}, 'or both be 0 for no clip'),
        ({'average': 'length'}, "'length' takes a length above 0"),
        ({'length': 4}, "'length' takes a length above 0"),
        ({'kl': -1.0}, r'kl is -1\.0; it must not be negative'),
        ({'temperature': 0.0}, r'temperature is 0\.0; it must be above 0'),
    ],
)
def test_settings_that_cannot_be_say_why(fields, said):
    with pytest.raises(ConfigError, match=said):
        PolicyGradient(**fields).validate()


def test_a_critic_needs_a_head():
    with pytest.raises(ConfigError, match='a critic is a ScalarConfig'):
        PolicyGradient(value=0.5).check_model(toy.config())
    with pytest.raises(ConfigError, match='a critic is a ScalarConfig'):
        PolicyGradient().check_model(CONFIG)


def test_a_temperature_and_capped_logits_exclude_each_other():
    with pytest.raises(ConfigError, match=r'temperature = 0\.5 and model\.logit_softcap = 3\.0'):
        PolicyGradient(temperature=0.5).check_model(toy.config(logit_softcap=3.0))
