"""Norms against NumPy, and their float32 inside."""

import jax.numpy as jnp
import numpy as np
import pytest
import toy

from tpu_llm.models.graph import ModelGraph
from tpu_llm.nn.norm import LayerNorm, RMSNorm

X = np.random.default_rng(0).standard_normal((2, 3, 8)) * 3 + 1


def make(kind, eps=1e-2):
    graph = ModelGraph(kind(8, eps=eps))
    return graph.bind(toy.weights(graph))


def test_rms_norm_is_its_formula():
    norm = make(RMSNorm)
    expected = X / np.sqrt((X**2).mean(-1, keepdims=True) + 1e-2) * np.asarray(norm.scale[...])
    np.testing.assert_allclose(norm(jnp.asarray(X, jnp.float32)), expected, atol=1e-5)


def test_layer_norm_is_its_formula():
    norm = make(LayerNorm)
    normal = (X - X.mean(-1, keepdims=True)) / np.sqrt(X.var(-1, keepdims=True) + 1e-2)
    expected = normal * np.asarray(norm.scale[...]) + np.asarray(norm.bias[...])
    np.testing.assert_allclose(norm(jnp.asarray(X, jnp.float32)), expected, atol=1e-5)


@pytest.mark.parametrize('kind', [RMSNorm, LayerNorm])
def test_bfloat16_is_rounded_once_at_the_end(kind):
    norm, x = make(kind), jnp.asarray(X, jnp.bfloat16)
    np.testing.assert_array_equal(norm(x), norm(x.astype(jnp.float32)).astype(jnp.bfloat16))


@pytest.mark.parametrize('kind', [RMSNorm, LayerNorm])
def test_zeros_stay_finite(kind):
    assert jnp.isfinite(make(kind)(jnp.zeros((1, 1, 8)))).all()
