"""What is particular to latent attention; contract/test_decoders.py has that it is right, causal and cached exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from tpu_llm.config import ConfigError, validate
from tpu_llm.infer.generate import decode
from tpu_llm.infer.sampling import Greedy
from tpu_llm.nn.mla import MLA
from tpu_llm.nn.param import param_sharding
from tpu_llm.parallel import sharding

WIDTHS = {'kv_rank': 8, 'rope_dim': 4, 'value_dim': 6}


def config(**changes):
    return toy.config(kv_heads=4, mla=MLA(**WIDTHS), **changes)


def test_a_cache_holds_a_latent_and_a_rotary_key_of_each_token():
    cache = toy.graph(config()).bind(toy.weights(toy.graph(config()))).empty_cache(2, 5)
    assert [(layer.keys.shape, layer.values.shape) for layer in cache.layers] == [((3, 2, 1, 5, 12), (3, 2, 1, 5, 0))]


def test_generation_with_heads_split_is_that_of_one_device():
    """The cache has one head, which all tensor shards keep whole."""
    graph = toy.graph(config(), 128)
    weights = toy.weights(graph)
    tokens = jnp.array([[3, 5, 7], [2, 4, 6]], jnp.int32)

    def run(layout):
        def generate(weights):
            with sharding.use(layout):
                options = {'max_new': 4, 'sampling': Greedy(), 'eos': 1, 'vocab_size': 19}
                return decode(graph.bind(weights), tokens, jnp.ones_like(tokens), jax.random.key(0), **options)

        place = {name: param_sharding(layout, name, leaf) for name, leaf in graph.leaves.items()}
        return jax.jit(generate)(jax.device_put(weights, place))

    np.testing.assert_array_equal(run(toy.layout(fsdp=2, tensor=2)), run(toy.layout()))


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'kv_heads': 2}, 'it takes kv_heads = heads'),
        ({'position': 'none'}, "position = 'rope'"),
        ({'mla': MLA(**WIDTHS | {'rope_dim': 3})}, 'mla.rope_dim = 3 is odd; rope turns pairs, so make it even'),
        ({'mla': MLA(**WIDTHS | {'kv_rank': 0})}, 'mla.kv_rank is 0; it must be at least 1'),
        ({'mla': MLA(**WIDTHS, query_rank=-1)}, 'mla.query_rank is -1; it must be at least 0, which is none'),
    ],
)
def test_what_cannot_be_is_one_line(changes, message):
    with pytest.raises(ConfigError, match=message):
        validate(toy.config(**{'kv_heads': 4, 'mla': MLA(**WIDTHS)} | changes), 'model')
