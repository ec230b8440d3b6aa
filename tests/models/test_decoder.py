"""What changes a decoder's memory and speed but not its numbers, dropout, and the configs that cannot be."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from tpu_llm.config import ConfigError
from tpu_llm.models.decoder import Dropout
from tpu_llm.objectives.next_token import NextToken

pytestmark = pytest.mark.usefixtures('quick_compile')

DROPOUT = Dropout(residual=0.2, attention=0.2, embedding=0.1)
CONFIG = toy.config(windows=(3,), kv_heads=1, mlp='geglu', bias=True, dropout=DROPOUT)
BATCH = toy.batch(np.array([[1, 1, 1, 1, 2, 2, 2, 0], [1] * 8]))
WEIGHTS = toy.weights(toy.graph(CONFIG))

# What a layer saves, and how many layers a step of the scan runs.
MACHINE = [('none', 2), ('full', 1), ('dots', 0), ('query+key+value', 2), ('attended+gate+up', 1)]


def loss_of(remat='none', unroll=1):
    graph = toy.graph(dataclasses.replace(CONFIG, remat=remat, unroll=unroll))

    def loss(weights, key):
        return NextToken()(graph.bind(weights), BATCH, frozen=None, key=key, step=jnp.int32(0))[0]

    return loss


@pytest.fixture(scope='module')
def plain():
    return jax.jit(jax.value_and_grad(loss_of()))(WEIGHTS, jax.random.key(0))


@pytest.mark.parametrize(('remat', 'unroll'), MACHINE)
def test_what_is_saved_and_unrolled_changes_neither_loss_nor_gradients(plain, remat, unroll):
    loss, gradients = jax.jit(jax.value_and_grad(loss_of(remat, unroll)))(WEIGHTS, jax.random.key(0))
    np.testing.assert_allclose(loss, plain[0], rtol=1e-6)
    for name, gradient in gradients.items():
        np.testing.assert_allclose(gradient, plain[1][name], rtol=1e-4, atol=1e-5, err_msg=name)


def matmuls(jaxpr) -> int:
    """dot_generals in a program, those of the programs inside it included."""
    inner = [p for eqn in jaxpr.eqns for p in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, 'eqns'))]
    inner = [getattr(p, 'jaxpr', p) for p in inner if hasattr(p, 'eqns')]
    return sum(eqn.primitive.name == 'dot_general' for eqn in jaxpr.eqns) + sum(map(matmuls, inner))


def test_the_less_is_saved_the_more_is_computed_again():
    policies = ['none', 'dots', 'attended+gate+up', 'full']
    counts = [matmuls(jax.make_jaxpr(jax.grad(loss_of(remat)))(WEIGHTS, jax.random.key(0)).jaxpr) for remat in policies]
    assert counts == sorted(set(counts))


# ------------------------------------------------------------------------------------------------- dropout


def hidden(config, key, weights=WEIGHTS, *, unstacked=False):
    def run(weights, key):
        model = toy.graph(config).bind(weights)
        return (model.unstacked() if unstacked else model).hidden(BATCH.tokens, dropout_key=key)

    return np.asarray(jax.jit(run)(weights, key))


@pytest.fixture(scope='module')
def dropped():
    return hidden(CONFIG, jax.random.key(0))


def test_dropout_is_a_function_of_its_key(dropped):
    np.testing.assert_array_equal(hidden(CONFIG, jax.random.key(0)), dropped)
    assert np.abs(hidden(CONFIG, jax.random.key(1)) - dropped).max() > 0.1


def test_dropout_is_the_same_scanned_or_not(dropped):
    np.testing.assert_allclose(hidden(CONFIG, jax.random.key(0), unstacked=True), dropped, atol=1e-5)


def test_without_a_key_nothing_is_dropped():
    np.testing.assert_array_equal(
        hidden(CONFIG, None), hidden(dataclasses.replace(CONFIG, dropout=None), jax.random.key(0))
    )


def test_layers_drop_different_entries():
    config = toy.config(layers=2, mlp='relu', bias=True, dropout=Dropout(residual=0.5))
    zero = {name: jnp.zeros_like(w) for name, w in toy.weights(toy.graph(config)).items()}
    ones = {name: jnp.ones_like(w) for name, w in zero.items() if name.endswith(('.scale', 'mlp.down.bias'))}
    out = hidden(config, jax.random.key(0), zero | ones)  # each layer adds 0 or 2 to an entry
    shares = out / out.max(axis=-1, keepdims=True)
    assert set(np.round(shares, 3).ravel().tolist()) == {0.0, 0.5, 1.0}


# ------------------------------------------------------------------------------------------------- the edges


def test_an_embedding_table_too_short_for_the_row_is_an_error():
    graph = toy.graph(toy.config(position='learned', max_length=7))
    with pytest.raises(ValueError, match='rows of 8 tokens are longer than the 7 learned positions'):
        graph.bind(toy.weights(graph))(BATCH.tokens)


def test_host_arrays_are_welcome():
    graph = toy.graph(toy.config(layers=1))
    tokens, segments = np.ones((1, 3), np.int32), np.ones((1, 3), np.int32)
    assert graph.bind(toy.weights(graph))(tokens, segments=segments).shape == (1, 3, 19)


WRONG = [
    ({'heads': 6, 'kv_heads': 4}, 'heads = 6 is not divisible by kv_heads = 4; each key-value head serves'),
    ({'layers': 0}, 'layers is 0; it must be at least 1'),
    ({'head_dim': 5}, 'head_dim = 5 is odd; rope turns pairs, so make it even'),
    ({'width': 15, 'position': 'sinusoidal'}, 'width = 15 is odd; sinusoidal positions need it even'),
    ({'position': 'learned'}, "max_length = 0 with position = 'learned'; it is the number of learned positions"),
    ({'max_length': 8}, "max_length = 8 with position = 'rope'; .* 0 for every other scheme"),
    ({'windows': ()}, r'windows = \(\); write one window a layer of the period, 0 for none'),
    ({'windows': (4, -1)}, r'windows = \(4, -1\); write one window'),
    ({'attention': 'flash'}, "attention = 'flash'; there are xla, reference"),
    ({'unroll': -1}, 'unroll = -1; it must be at least 0'),
    (
        {'remat': 'query+kei'},
        r"remat 'query\+kei': unknown name 'kei' \(did you mean 'key'\?\); write none, full, dots",
    ),
]


@pytest.mark.parametrize(('changes', 'message'), WRONG)
def test_a_config_that_cannot_be_says_why(changes, message):
    with pytest.raises(ConfigError, match=message):
        toy.config(**changes).make()


@pytest.mark.parametrize('place', ['residual', 'attention', 'embedding'])
@pytest.mark.parametrize('rate', [-0.1, 1.0])
def test_dropout_is_a_probability_below_one(place, rate):
    with pytest.raises(ConfigError, match=rf'dropout.{place} is {rate}; write a probability from 0 to below 1'):
        Dropout(**{place: rate}).validate()
