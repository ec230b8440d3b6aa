"""Maps that share a matrix compute what they computed apart, and the model they were taken from stays as it was."""

import jax
import numpy as np
import pytest
import toy

from tpu_llm.infer.generate import for_decoding
from tpu_llm.models.graph import ModelGraph
from tpu_llm.nn.einsum import Cut
from tpu_llm.nn.mla import MLA
from tpu_llm.nn.moe import MoE
from tpu_llm.nn.param import named_params

MODELS = {
    'llama': {},
    'biased': {'bias': ('qkv', 'mlp'), 'qk_norm': 'head'},
    'plain mlp': {'mlp': 'gelu'},
    'latent': {'kv_heads': 4, 'mla': MLA(kv_rank=8, query_rank=6, rope_dim=4, value_dim=6)},
    'a dense layer before experts': {'moe': MoE(experts=4, chosen=2, expert_width=8, first_dense=1)},
}


@pytest.mark.parametrize('changes', MODELS.values(), ids=MODELS)
def test_the_same_function(changes):
    graph = toy.graph(toy.config(**changes))
    model = graph.bind(toy.weights(graph))
    before = {name: np.asarray(leaf[...]) for name, leaf in named_params(model)}
    joined = for_decoding(model)
    tokens = np.arange(12, dtype=np.int32).reshape(2, 6)
    np.testing.assert_allclose(jax.jit(joined)(tokens), jax.jit(model)(tokens), rtol=0, atol=2e-5)
    after = dict(named_params(model))
    assert set(after) == set(before)
    for name, array in before.items():
        np.testing.assert_array_equal(after[name][...], array)


def test_twice_is_once():
    graph = toy.graph(toy.config())
    once = for_decoding(graph.bind(toy.weights(graph)))
    again = for_decoding(once)
    assert type(again.stack.prefix[0].attention.query) is Cut
    assert again.stack.prefix[0].mlp.gate.whole[...] is once.stack.prefix[0].mlp.gate.whole[...]


def test_a_weight_counts_once():
    graph = toy.graph(toy.config())
    assert ModelGraph(for_decoding(graph.bind(toy.weights(graph)))).count() == graph.count()
