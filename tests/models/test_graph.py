"""A graph gives the model back with other weights, also while it is traced, and counts them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from tpu_llm.models.graph import ModelGraph
from tpu_llm.nn.param import initialise, named_params

pytestmark = pytest.mark.usefixtures('quick_compile')

CONFIG = toy.config(layers=1)


def test_weights_go_out_and_in_by_path():
    model = initialise(CONFIG.make(vocab_multiple=8), 0)
    graph = ModelGraph(model)
    weights = {name: leaf.get_value() for name, leaf in named_params(model)}
    tokens = jnp.arange(6).reshape(2, 3)
    np.testing.assert_array_equal(graph.bind(weights)(tokens), model(tokens))
    doubled = graph.bind(weights | {'head.kernel': 2 * weights['head.kernel']})
    np.testing.assert_allclose(doubled(tokens), 2 * model(tokens), rtol=1e-6)
    assert {name: (x.shape, x.dtype) for name, x in weights.items()} == {
        name: (x.shape, x.dtype) for name, x in graph.shapes().items()
    }


def test_it_binds_what_has_no_values():
    graph = toy.graph(CONFIG)
    out = jax.eval_shape(lambda weights: graph.bind(weights)(jnp.zeros((2, 3), jnp.int32)), graph.shapes())
    assert out.shape == (2, 3, 19)


def test_padding_of_the_vocabulary_is_not_counted():
    graph = toy.graph(CONFIG)
    stored = sum(leaf.size for leaf in graph.leaves.values())
    assert stored - graph.count() == 2 * 5 * 16
