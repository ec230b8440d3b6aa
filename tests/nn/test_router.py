"""Routing in closed form: who chooses whom, what the losses are worth, and what they teach."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tpu_llm.config import ConfigError, validate
from tpu_llm.models.graph import ModelGraph
from tpu_llm.nn.context import Context
from tpu_llm.nn.dropout import row_keys
from tpu_llm.nn.moe import MoE
from tpu_llm.nn.router import Router, RouterLayer

pytestmark = pytest.mark.usefixtures('quick_compile')

CHOICES = ('softmax_then_topk', 'topk_then_softmax', 'sigmoid')
BARE = Router(balance_loss=0.0)
SEGMENTS = jnp.array([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 0, 0]])
REAL = SEGMENTS > 0


def make_layer(router, experts=4, chosen=2, **weights):
    """A router whose logits are its input, unless its weights are given."""
    width = weights['map.kernel'].shape[0] if weights else experts
    graph = ModelGraph(RouterLayer(router, width, experts, chosen))
    return graph.bind({'map.kernel': jnp.eye(experts), 'bias': jnp.zeros(experts)} | weights)


def make_context(segments=SEGMENTS, key=None):
    keys = None if key is None else row_keys(key, segments.shape[0])
    return Context(segments=segments, positions=jnp.zeros_like(segments), keys=keys)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def route(layer, x, segments=SEGMENTS):
    choice = layer(x, make_context(segments), 0)
    return choice, layer.routing(choice, segments > 0, jnp.zeros(()))


def cycling(loudness, experts=4, rows=2, length=8):
    """Token t prefers expert t mod E, then the next ones."""
    prefers = (np.arange(experts) - np.arange(length)[:, None]) % experts
    return jnp.broadcast_to(jnp.asarray(-loudness * prefers, jnp.float32), (rows, length, experts))


# ------------------------------------------------------------------------------------------------ the choice


@pytest.mark.parametrize('choice', CHOICES)
def test_the_best_experts_are_chosen_in_order(choice):
    x = jnp.array([[[0.0, 3.0, 1.0, 2.0]]])
    chosen, _ = route(make_layer(dataclasses.replace(BARE, choice=choice), chosen=3), x, jnp.ones((1, 1), int))
    assert chosen.experts.tolist() == [[[1, 3, 2]]]


def test_weights_are_those_of_the_papers():
    logits = np.array([0.0, 3.0, 1.0, 2.0])
    odds, best = np.exp(logits) / np.exp(logits).sum(), [1, 3]
    squashed = 1 / (1 + np.exp(-logits))[best]
    expected = {
        'softmax_then_topk': odds[best],
        'topk_then_softmax': odds[best] / odds[best].sum(),
        'sigmoid': squashed / squashed.sum(),
    }
    for choice, weights in expected.items():
        layer = make_layer(dataclasses.replace(BARE, choice=choice, scale=2.5))
        chosen, _ = route(layer, jnp.asarray(logits, jnp.float32)[None, None], jnp.ones((1, 1), int))
        np.testing.assert_allclose(chosen.weights[0, 0], 2.5 * weights, rtol=1e-6)


def test_a_softmax_of_the_chosen_is_the_normalised_softmax_of_all():
    x = normal(2, 6, 5)
    routers = [
        dataclasses.replace(BARE, choice='softmax_then_topk', normalise=True),
        dataclasses.replace(BARE, choice='topk_then_softmax'),
    ]
    (one, _), (other, _) = (route(make_layer(router, experts=5, chosen=3), x) for router in routers)
    np.testing.assert_array_equal(one.experts, other.experts)
    np.testing.assert_allclose(one.weights, other.weights, rtol=1e-6)


@pytest.mark.parametrize('choice', CHOICES)
def test_padding_weighs_nothing(choice):
    chosen, _ = route(make_layer(dataclasses.replace(BARE, choice=choice)), normal(2, 6, 4))
    assert (chosen.weights > 0).all(axis=-1).tolist() == REAL.tolist()


def test_experts_outside_the_best_groups_are_not_chosen():
    x = jnp.array([[[9.0, -9.0, 5.0, 4.0, 4.5, 1.0]]])  # groups of two: best 9, 5, 4.5; sums 0, 9, 5.5
    one = jnp.ones((1, 1), int)
    for choice, expected in [('softmax_then_topk', [0, 2, 3]), ('sigmoid', [2, 4, 3])]:
        router = dataclasses.replace(BARE, choice=choice, groups=3, chosen_groups=2)
        chosen, _ = route(make_layer(router, experts=6, chosen=3), x, one)
        assert chosen.experts.tolist() == [[expected]]
        free = dataclasses.replace(router, chosen_groups=3)
        assert route(make_layer(free, experts=6, chosen=3), x, one)[0].experts.tolist() == [[[0, 2, 4]]]


def test_the_bias_joins_the_choice_but_not_the_weights():
    weights = {'map.kernel': jnp.eye(4), 'bias': jnp.array([1.0, 0.0, 0.0, 0.0])}
    layer = make_layer(dataclasses.replace(BARE, choice='sigmoid', bias_rate=0.1), **weights)
    x = jnp.array([[[0.0, 3.0, 1.0, 2.0]]])
    chosen, _ = route(layer, x, jnp.ones((1, 1), int))
    assert chosen.experts.tolist() == [[[0, 1]]]
    squashed = 1 / (1 + np.exp([-0.0, -3.0]))
    np.testing.assert_allclose(chosen.weights[0, 0], squashed / squashed.sum(), rtol=1e-6)


# ------------------------------------------------------------------------------------------- losses, statistics


@pytest.mark.parametrize('over', ['batch', 'row'])
def test_the_balance_loss_is_its_coefficient_for_an_even_load(over):
    router = Router(balance_loss=0.3, balance_over=over)
    _, routing = route(make_layer(router), cycling(2.0), jnp.ones((2, 8), int))
    np.testing.assert_allclose(routing.loss, 0.3, rtol=1e-6)
    np.testing.assert_allclose(routing.load, 0.25, rtol=1e-6)


@pytest.mark.parametrize('over', ['batch', 'row'])
def test_the_balance_loss_of_a_collapse_is_experts_times_as_high(over):
    router = Router(choice='softmax_then_topk', balance_loss=0.3, balance_over=over)
    x = jnp.broadcast_to(jnp.array([40.0, 0.0, 0.0, 0.0]), (2, 6, 4))
    _, routing = route(make_layer(router, chosen=1), x)
    np.testing.assert_allclose(routing.loss, 4 * 0.3, rtol=1e-6)
    np.testing.assert_allclose(routing.load, [1, 0, 0, 0])


def test_balance_over_rows_is_the_mean_over_parts_of_the_batch_and_over_the_batch_is_not():
    segments = jnp.asarray(np.arange(6) < np.array([6, 1, 3, 4])[:, None], jnp.int32)
    x = normal(4, 6, 4)
    losses = {}
    for over in ('row', 'batch'):
        layer = make_layer(Router(balance_loss=1.0, balance_over=over, z_loss=0.1))
        whole = route(layer, x, segments)[1].loss
        parts = [route(layer, x[i : i + 2], segments[i : i + 2])[1].loss for i in (0, 2)]
        losses[over] = float(whole), float((parts[0] * 7 + parts[1] * 7) / 14)
    assert losses['row'][0] == pytest.approx(losses['row'][1], rel=1e-6)
    assert losses['batch'][0] != pytest.approx(losses['batch'][1], rel=1e-2)


def test_what_padding_holds_changes_no_statistic():
    router = Router(balance_loss=1.0, z_loss=0.1, bias_rate=0.1)
    x = normal(2, 6, 4)
    zeros, sevens = (route(make_layer(router), jnp.where(REAL[..., None], x, fill))[1] for fill in (0.0, 7.0))
    for one, other in zip(jax.tree.leaves(zeros), jax.tree.leaves(sevens), strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_z_loss_is_the_mean_square_of_the_log_of_the_sum():
    x = normal(2, 6, 4)
    _, routing = route(make_layer(dataclasses.replace(BARE, z_loss=0.01)), x)
    log_z = np.log(np.exp(np.asarray(x, np.float64)).sum(-1))[np.asarray(REAL)]
    np.testing.assert_allclose(routing.loss, 0.01 * (log_z**2).mean(), rtol=1e-6)


def test_the_entropy_is_that_of_the_probabilities():
    ones = jnp.ones((2, 8), int)
    assert route(make_layer(BARE), cycling(0.0), ones)[1].entropy == pytest.approx(np.log(4))
    assert route(make_layer(BARE), cycling(100.0), ones)[1].entropy == pytest.approx(0.0, abs=1e-6)
    p = 1 / (1 + np.exp(-np.array([0.0, 3.0, 1.0, 2.0])))
    p /= p.sum()
    layer = make_layer(dataclasses.replace(BARE, choice='sigmoid'))
    _, routing = route(layer, jnp.broadcast_to(jnp.array([0.0, 3.0, 1.0, 2.0]), (2, 6, 4)))
    assert routing.entropy == pytest.approx(-(p * np.log(p)).sum(), rel=1e-5)


def test_the_gradient_of_the_bias_is_the_excess_load_and_its_loss_nothing():
    x = normal(2, 6, 4)

    def loss(bias):
        layer = make_layer(dataclasses.replace(BARE, bias_rate=0.1), **{'map.kernel': jnp.eye(4), 'bias': bias})
        _, routing = route(layer, x)
        return routing.loss, routing.load

    (value, load), gradient = jax.value_and_grad(loss, has_aux=True)(jnp.array([0.3, 0.0, -0.1, 0.0]))
    assert value == 0.0
    np.testing.assert_allclose(gradient, load - 0.25, rtol=1e-6)
    assert np.ptp(load) > 0.1


@pytest.mark.parametrize('choice', CHOICES)
def test_gradients_are_those_of_float64_differences(choice):
    """Of the weights and all losses, with the choices held: within 1e-6 none flips."""
    router = Router(choice=choice, balance_loss=1.0, z_loss=0.1, scale=1.5)
    direction = normal(2, 6, 2, seed=1)

    def loss(kernel, x):
        chosen, routing = route(make_layer(router, **{'map.kernel': kernel}), x)
        return (chosen.weights * direction).sum() + routing.loss, chosen.experts

    inputs = normal(5, 4, seed=2), normal(2, 6, 5, seed=3)
    gradients, experts = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(*inputs)
    real, experts = np.asarray(REAL), np.asarray(experts)[REAL]
    share = np.eye(4)[experts].mean(axis=(0, 1))

    def exact(kernel, x):
        logits = (x @ kernel)[real]
        scores = 1 / (1 + np.exp(-logits)) if choice == 'sigmoid' else np.exp(logits)
        odds = scores / scores.sum(-1, keepdims=True)
        weights = np.take_along_axis(odds, experts, -1)
        if choice != 'softmax_then_topk':
            weights = weights / weights.sum(-1, keepdims=True)
        log_z = np.log(np.exp(logits).sum(-1))
        losses = 4 * (share * odds.mean(0)).sum() + 0.1 * (log_z**2).mean()
        return (1.5 * weights * np.asarray(direction)[real]).sum() + losses

    random = np.random.default_rng(4)
    for _ in range(3):
        ways = [random.standard_normal(each.shape) for each in inputs]
        ends = [exact(*(np.float64(x) + h * way for x, way in zip(inputs, ways, strict=True))) for h in (1e-6, -1e-6)]
        slope = sum((np.float64(g) * way).sum() for g, way in zip(gradients, ways, strict=True))
        np.testing.assert_allclose(slope, (ends[0] - ends[1]) / 2e-6, rtol=1e-4)


# --------------------------------------------------------------------------------------------------- jitter


def test_jitter_is_of_training_alone_and_a_function_of_key_row_and_layer():
    layer = make_layer(dataclasses.replace(BARE, jitter=0.1))
    x = normal(2, 6, 4)

    def logits(key=None, index=0, rows=slice(None)):
        context = make_context(key=key)
        keys = None if key is None else context.keys[rows]
        return layer.logits(x[rows], dataclasses.replace(context, keys=keys), index)

    np.testing.assert_array_equal(logits(), x)
    noisy = logits(jax.random.key(0))
    np.testing.assert_array_equal(logits(jax.random.key(0)), noisy)
    np.testing.assert_array_equal(logits(jax.random.key(0), rows=slice(1, 2)), noisy[1:])
    for other in (logits(jax.random.key(1)), logits(jax.random.key(0), index=1)):
        assert (other != noisy).any()
    ratio = np.asarray(noisy / x)
    assert 0.9 <= ratio.min() < 0.95
    assert 1.05 < ratio.max() <= 1.1


def test_the_router_computes_in_float32_whatever_it_is_given():
    layer, x = make_layer(BARE), normal(2, 6, 4).astype(jnp.bfloat16)
    chosen, routing = route(layer, x)
    assert {chosen.logits.dtype, chosen.weights.dtype, routing.loss.dtype} == {jnp.dtype('float32')}
    # On a TPU a product of float32 is one of bfloat16 unless it says so.
    gradient = jax.make_jaxpr(jax.grad(lambda x: layer.logits(x, make_context(), 0).sum()))(x)
    products = [eqn for eqn in gradient.jaxpr.eqns if eqn.primitive.name == 'dot_general']
    assert products
    assert all(str(eqn.params['precision'][0]) == 'HIGHEST' for eqn in products)


# -------------------------------------------------------------------------------------------------- the edges

WRONG = [
    ({'experts': 0}, 'moe.experts is 0; it must be at least 1'),
    ({'every': 0}, 'moe.every is 0; it must be at least 1'),
    ({'shared': -1}, 'moe.shared is -1; it must not be negative'),
    ({'capacity': -0.5}, 'moe.capacity is -0.5; it must not be negative'),
    ({'chosen': 9}, 'moe.chosen = 9 is more than the 8 experts there are'),
    ({'grouped': 'megablocks'}, "moe.grouped = 'megablocks'; there are auto, megablox, tiles, ragged"),
    ({'capacity': 1.25, 'room': 1.5}, 'moe.room = 1.5 bounds dropless experts, and moe.capacity = 1.25 gives each its'),
    ({'router': Router(choice='expert_choice')}, 'needs moe.capacity: how many tokens an expert takes'),
    ({'router': Router(groups=3)}, 'router.groups = 3 does not divide experts = 8'),
    ({'router': Router(groups=0)}, 'router.chosen_groups = 1 must be from 1 to groups = 0'),
    ({'router': Router(groups=2, chosen_groups=3)}, 'router.chosen_groups = 3 must be from 1 to groups = 2'),
    ({'router': Router(groups=8), 'chosen': 2}, 'chosen = 2 experts a token, but 1 of 8 groups hold 1'),
    ({'router': Router(jitter=1.0)}, 'router.jitter is 1.0; write a number from 0 to below 1'),
    ({'router': Router(balance_loss=-0.1)}, 'router.balance_loss is -0.1; it must not be negative'),
    ({'router': Router(bias_rate=-0.1)}, 'router.bias_rate is -0.1; it must not be negative'),
    (
        {'router': Router(choice='sigmoid', normalise=True)},
        "normalise is for 'softmax_then_topk'; with 'sigmoid'",
    ),
    ({'router': Router(), 'chosen': 1}, "'topk_then_softmax' gives a single expert weight 1, which teaches the router"),
    (
        {'router': Router(choice='expert_choice', bias_rate=0.1), 'capacity': 1.0},
        'balances by itself and weighs by probability: leave out groups, bias_rate and scale',
    ),
]


@pytest.mark.parametrize(('changes', 'message'), WRONG)
def test_experts_that_cannot_be_say_why(changes, message):
    with pytest.raises(ConfigError, match=message):
        validate(MoE(**{'experts': 8, 'chosen': 2, 'expert_width': 4} | changes), 'model.moe')


def test_layers_have_experts_where_the_pattern_says():
    moe = MoE(experts=4, chosen=2, expert_width=4, first_dense=1, every=2)
    assert [moe.at(layer) for layer in range(6)] == [False, False, True, False, True, False]
