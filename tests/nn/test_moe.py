"""What changes the experts' memory and speed but not their numbers, and what cannot decode.

Tolerance: 1e-5 on numbers of order 1, float32 sums in another order.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from tpu_llm.config import ConfigError
from tpu_llm.nn.moe import MoE
from tpu_llm.nn.router import Router
from tpu_llm.objectives.next_token import NextToken

pytestmark = pytest.mark.usefixtures('quick_compile')

DROPLESS = MoE(experts=4, chosen=2, expert_width=12)
CAPACITY = dataclasses.replace(DROPLESS, capacity=1.0)
BATCH = toy.batch([[1] * 5 + [2] * 3, [1] * 6 + [0] * 2])


def make_loss(moe, **changes):
    graph = toy.graph(toy.config(layers=2, moe=moe, **changes))

    def loss(weights):
        return NextToken(chunk=4)(graph.bind(weights), BATCH, frozen=None, key=None, step=jnp.int32(0))[0]

    return loss, toy.weights(graph)


@pytest.fixture(scope='module', params=['dropless', 'capacity'])
def plain(request, quick_compile):
    moe = {'dropless': DROPLESS, 'capacity': CAPACITY}[request.param]
    loss, weights = make_loss(moe)
    return moe, jax.jit(jax.value_and_grad(loss))(weights)


@pytest.mark.parametrize('remat', ['full', 'gate+up'])
def test_what_is_saved_changes_neither_loss_nor_gradients(plain, remat):
    moe, (expected, gradients) = plain
    loss, weights = make_loss(moe, remat=remat)
    value, others = jax.jit(jax.value_and_grad(loss))(weights)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for name, gradient in gradients.items():
        np.testing.assert_allclose(others[name], gradient, atol=1e-5, err_msg=name)


def matmuls(jaxpr) -> int:
    """dot_generals in a program, those of the programs inside it included."""
    inner = [p for eqn in jaxpr.eqns for p in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, 'eqns'))]
    inner = [getattr(p, 'jaxpr', p) for p in inner if hasattr(p, 'eqns')]
    return sum(eqn.primitive.name == 'dot_general' for eqn in jaxpr.eqns) + sum(map(matmuls, inner))


@pytest.mark.parametrize('moe', [DROPLESS, CAPACITY])
def test_saved_gates_and_ups_are_not_computed_again(moe):
    counts = {}
    for remat in ('none', 'gate+up', 'full'):
        loss, weights = make_loss(moe, remat=remat)
        counts[remat] = matmuls(jax.make_jaxpr(jax.grad(loss))(weights).jaxpr)
    assert counts['none'] < counts['gate+up'] == counts['full'] - 2


def test_the_ways_to_bring_tokens_to_experts_agree_where_nothing_is_dropped():
    results = []
    for change in ({'grouped': 'tiles'}, {'grouped': 'ragged'}, {'capacity': 2.0}):
        loss, weights = make_loss(dataclasses.replace(DROPLESS, **change))
        results.append(jax.tree.leaves(jax.jit(jax.value_and_grad(loss))(weights)))
    for each in zip(*results, strict=True):
        for other in each[1:]:
            np.testing.assert_allclose(other, each[0], atol=1e-5)


def test_experts_that_choose_cannot_decode():
    graph = toy.graph(toy.config(moe=dataclasses.replace(CAPACITY, router=Router(choice='expert_choice'))))
    model = graph.bind(toy.weights(graph))
    ones = jnp.ones((1, 1), jnp.int32)
    with pytest.raises(ValueError, match="'expert_choice' looks at whole rows and cannot decode token by token"):
        model.extend(ones, model.empty_cache(1, 4), segments=ones, positions=ones)


def test_a_model_none_of_whose_layers_has_experts_is_an_error():
    message = r'moe.first_dense = 1 and every = 3 leave none of the 3 layers with experts'
    with pytest.raises(ConfigError, match=message):
        toy.config(moe=dataclasses.replace(DROPLESS, first_dense=1, every=3)).make()
