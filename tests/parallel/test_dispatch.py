"""Places of experts, and rows on the way to them, are on a mesh what they are on one device (dropless: matrix.py).

Tolerance: 1e-6 of the loss, and of every gradient 1e-5 of its largest entry: float32 sums in another order.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from jax.sharding import PartitionSpec

from tpu_llm.nn.moe import MoE
from tpu_llm.nn.param import param_sharding
from tpu_llm.nn.router import Router
from tpu_llm.objectives.next_token import NextToken
from tpu_llm.parallel import sharding
from tpu_llm.parallel.experts import collect, dropless, exchange, spread

pytestmark = pytest.mark.usefixtures('quick_compile')

# Three places an expert, which do not divide over `seq`.
MODELS = {
    'capacity': MoE(experts=4, chosen=2, expert_width=12, capacity=0.75, router=Router(balance_over='row')),
    'expert choice': MoE(experts=4, chosen=2, expert_width=12, capacity=0.75, router=Router(choice='expert_choice')),
}
MESHES = ({'expert': 4, 'tensor': 2}, {'fsdp': 2, 'expert': 2, 'seq': 2}, {'data': 4, 'seq': 2})
BATCH = toy.batch([[1] * 5 + [2] * 3, [1] * 6 + [0] * 2] * 4)


def loss_and_gradients(model, layout):
    graph = toy.graph(toy.config(layers=2, moe=MODELS[model]), 256)
    places = {name: param_sharding(layout, name, leaf) for name, leaf in graph.leaves.items()}
    weights = {name: jax.device_put(w, places[name]) for name, w in toy.weights(graph).items()}

    def loss(weights):
        with sharding.use(layout):
            loss, _, sums = NextToken(chunk=2)(graph.bind(weights), BATCH, frozen=None, key=None, step=jnp.int32(0))
        return loss, sums['expert_dropped']

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(weights)


@functools.cache
def alone(model):
    return loss_and_gradients(model, toy.layout())


@pytest.mark.parametrize('axes', MESHES, ids=str)
@pytest.mark.parametrize('model', MODELS)
def test_places_on_a_mesh_are_those_of_one_device(model, axes):
    (expected, dropped), gradients = alone(model)
    (loss, missed), sharded = loss_and_gradients(model, toy.layout(**axes))
    assert (dropped > 0).all()
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_allclose(missed, dropped, rtol=1e-6)
    for name, gradient in gradients.items():
        np.testing.assert_allclose(sharded[name], gradient, atol=1e-5 * np.abs(gradient).max(), err_msg=name)


def test_an_exchange_brings_each_row_to_its_receiver_in_the_order_of_the_senders():
    """Four devices with up to six rows each; row 10 p + i is the i-th of device p."""
    sent = np.array([[1, 2, 0, 3], [0, 0, 0, 0], [5, 0, 1, 0], [2, 2, 1, 1]])
    layout, size = toy.layout(expert=4), 9
    lands = np.cumsum(sent, axis=0) - sent
    rows = np.array([[10 * p + i for i in range(6)] for p in range(4)], np.float32).reshape(24, 1)
    starts = np.cumsum(sent, axis=1) - sent
    expected = np.zeros((4, size))
    for q in range(4):
        mine = [10 * p + starts[p, q] + i for p in range(4) for i in range(sent[p, q])]
        expected[q, : len(mine)] = mine

    def there(rows):
        return exchange(rows, jnp.asarray(sent), jnp.asarray(starts), jnp.asarray(lands), size)

    def and_back(rows):
        return exchange(rows, jnp.asarray(sent.T), jnp.asarray(lands.T), jnp.asarray(starts.T), 6)

    def run(body, rows):
        here = PartitionSpec('expert')
        with sharding.use(layout):
            return jax.jit(sharding.manual(body, layout, in_specs=here, out_specs=here))(rows)

    received = run(there, jnp.asarray(rows))
    np.testing.assert_array_equal(np.asarray(received).reshape(4, size), expected)
    filled = np.arange(6) < sent.sum(axis=1)[:, None]
    np.testing.assert_array_equal(run(and_back, received), np.where(filled.reshape(24, 1), rows, 0))


def dispatch(room, favourite):
    """Every token's own number, times its weight of 1, from the expert it chose; and the choices without room."""
    layout, x = toy.layout(expert=4), jnp.arange(1.0, 33.0).reshape(8, 4, 1)
    experts = jnp.where(favourite, 3, jnp.arange(32).reshape(8, 4, 1) % 4)
    kernels, dims = {'up': jnp.ones((4, 1, 1))}, {'up': 'EDF'}

    def compute(rows, weights, sizes, kernels, expected):
        return jnp.where(jnp.arange(len(rows)) < sizes.sum(), rows[:, 0] * weights, jnp.nan)[:, None]

    with sharding.use(layout):
        run = jax.jit(lambda x: dropless(x, experts, jnp.ones((8, 4, 1)), kernels, dims, compute, room))
        y, missed = run(x)
    return np.asarray(y)[..., 0], float(missed.sum())


@pytest.mark.parametrize('room', [0.0, 1.0, 4.0])
def test_an_even_load_finds_room_whatever_there_is_of_it(room):
    y, missed = dispatch(room, favourite=False)
    np.testing.assert_array_equal(y, np.arange(1.0, 33.0).reshape(8, 4))
    assert missed == 0


def test_what_finds_no_room_is_dropped_and_counted():
    """All 32 choose the last device's expert, which takes twice its even share of 8: its own, and the next one's."""
    y, missed = dispatch(2.0, favourite=True)
    np.testing.assert_array_equal(y.reshape(-1), [*range(1, 9), *[0] * 16, *range(25, 33)])
    assert missed == 16
    assert dispatch(0.0, favourite=True)[1] == 0


def test_tokens_are_spread_over_their_choices_and_collected():
    """Five tokens of three choices each, all first choices before the second ones, in any order."""
    random = np.random.default_rng(0)
    order = jnp.asarray(random.permutation(15))
    inverse = jnp.argsort(order)
    tokens, rows = random.standard_normal((5, 4)), random.standard_normal((15, 4))
    tokens, rows = (jnp.asarray(x, jnp.float32) for x in (tokens, rows))
    spreading = functools.partial(spread, order=order, inverse=inverse, choices=3)
    collecting = functools.partial(collect, order=order, inverse=inverse, choices=3)
    np.testing.assert_array_equal(spreading(tokens), np.tile(tokens, (3, 1))[order])
    by_choice = np.asarray(rows)[inverse].reshape(3, 5, 4)
    np.testing.assert_allclose(collecting(rows), by_choice.sum(axis=0), rtol=1e-6)
    # Each is the other's gradient.
    np.testing.assert_array_equal(jax.vjp(spreading, tokens)[1](rows)[0], collecting(rows))
    np.testing.assert_array_equal(jax.vjp(collecting, rows)[1](tokens)[0], spreading(tokens))


def test_choices_are_summed_in_float32():
    """1 and a small number many times: in bfloat16 each sum would be rounded back to 1."""
    choices = 9
    rows = jnp.asarray([[1.0]] + [[2.0**-9]] * (choices - 1), jnp.bfloat16)
    order = jnp.arange(choices)
    assert collect(rows, order, order, choices).astype(jnp.float32) == 1 + 2.0**-6
