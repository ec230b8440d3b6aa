"""One string makes a linear map: its shape, its fan-in, its dims, its bias."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from flax import nnx

from tpu_llm.models.graph import ModelGraph
from tpu_llm.nn.einsum import Einsum, add_trailing, project
from tpu_llm.parallel import sharding

pytestmark = pytest.mark.usefixtures('quick_compile')

SIZES = {'D': 8, 'N': 2, 'H': 3, 'K': 1, 'F': 5}
X = jnp.asarray(np.random.default_rng(0).standard_normal((2, 4, 8)), jnp.float32)

# spec, dims of the kernel, what it sums over, dims of the bias
MAPS = [
    ('BTD,DNH->BTNH', 'DNH', 'D', 'NH'),
    ('BTNH,NHD->BTD', 'NHD', 'NH', 'D'),
    ('BTD,DF->BTF', 'DF', 'D', 'F'),
]


def with_weights(module):
    graph = ModelGraph(module)
    return graph.bind(toy.weights(graph))


@pytest.mark.parametrize(('spec', 'dims', 'summed', 'bias'), MAPS)
def test_the_string_says_it_all(spec, dims, summed, bias):
    layer = with_weights(Einsum(spec, SIZES, bias=True))
    meta = layer.kernel.get_metadata()
    assert (meta['dims'], meta['summed']) == (dims, summed)
    assert layer.kernel.shape == tuple(SIZES[d] for d in dims)
    assert (layer.bias.get_metadata('dims'), layer.bias.get_metadata('summed')) == (bias, '')
    x = np.random.default_rng(1).standard_normal([2, 4, *(SIZES[d] for d in summed)])
    y = np.tensordot(x, np.asarray(layer.kernel[...], np.float64), len(summed)) + np.asarray(layer.bias[...])
    np.testing.assert_allclose(layer(jnp.asarray(x, jnp.float32)), y, atol=1e-5)


def test_weights_are_cast_to_the_inputs_dtype():
    layer = with_weights(Einsum('BTD,DF->BTF', SIZES, bias=True))
    assert layer.kernel.dtype == jnp.float32
    assert layer(X.astype(jnp.bfloat16)).dtype == jnp.bfloat16


class Maps(nnx.Module):
    def __init__(self, kind=Einsum):
        self.query = kind('BTD,DNH->BTNH', SIZES, bias=True)
        self.key = kind('BTD,DKH->BTKH', SIZES)


class Wrapped(Einsum):
    """A map with its own way to multiply."""

    def __call__(self, x):
        return 2 * super().__call__(x)


def matmuls(maps, layout=None):
    with sharding.use(layout):
        return str(jax.make_jaxpr(lambda x: project(x, (maps.query, maps.key)))(X)).count('dot_general')


def test_maps_of_one_input_are_joined_into_one_matmul_with_the_same_result():
    maps = with_weights(Maps())
    assert matmuls(maps) == 1
    for joined, alone in zip(project(X, (maps.query, maps.key)), (maps.query(X), maps.key(X)), strict=True):
        np.testing.assert_allclose(joined, alone, atol=1e-6)


def test_maps_stay_apart_where_tensor_splits_them_or_one_is_wrapped():
    maps = with_weights(Maps())
    assert matmuls(maps, toy.layout(tensor=2)) == 2
    assert matmuls(maps, toy.layout(fsdp=2)) == 1
    wrapped = with_weights(Maps(Wrapped))
    assert matmuls(wrapped) == 2
    np.testing.assert_allclose(project(X, (wrapped.query, wrapped.key))[1], 2 * maps.key(X), atol=1e-6)


def test_a_vector_is_added_over_the_last_dims():
    y = jnp.zeros((2, 3, 4, 5), jnp.bfloat16)
    vector = jnp.arange(20.0).reshape(4, 5)
    out = add_trailing(y, vector)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out[1, 2], vector)
