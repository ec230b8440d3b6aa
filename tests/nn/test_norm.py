"""Norms against NumPy, and their float32 inside."""

import jax.numpy as jnp
import numpy as np
import pytest
import toy

from tpu_llm.models.graph import ModelGraph
from tpu_llm.nn.norm import NORMS, HeadNorm, LayerNorm, RMSNorm
from tpu_llm.nn.param import initialise, named_params

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


def test_layer_norm_without_bias_is_the_rest_of_it():
    norm = make(NORMS['layer_no_bias'])
    assert norm.bias is None
    normal = (X - X.mean(-1, keepdims=True)) / np.sqrt(X.var(-1, keepdims=True) + 1e-2)
    np.testing.assert_allclose(norm(jnp.asarray(X, jnp.float32)), normal * np.asarray(norm.scale[...]), atol=1e-5)


def test_an_offset_is_added_to_the_scale():
    norm = make(NORMS['rms_offset'])
    expected = X / np.sqrt((X**2).mean(-1, keepdims=True) + 1e-2) * (1 + np.asarray(norm.scale[...]))
    np.testing.assert_allclose(norm(jnp.asarray(X, jnp.float32)), expected, atol=1e-5)


def test_a_fixed_layer_norm_has_no_parameters():
    norm = make(NORMS['layer_fixed'])
    assert list(named_params(norm)) == []
    normal = (X - X.mean(-1, keepdims=True)) / np.sqrt(X.var(-1, keepdims=True) + 1e-2)
    np.testing.assert_allclose(norm(jnp.asarray(X, jnp.float32)), normal, atol=1e-5)


@pytest.mark.parametrize('kind', NORMS)
def test_freshly_drawn_norms_only_normalise(kind):
    x = jnp.asarray(X, jnp.float32)
    norm = initialise(NORMS[kind](8, eps=1e-2), 0)
    plain = NORMS['layer_fixed'](8, eps=1e-2)(x)
    if kind.startswith('rms'):
        plain = X / np.sqrt((X**2).mean(-1, keepdims=True) + 1e-2)
    np.testing.assert_allclose(norm(x), plain, atol=1e-5)


# What is normed together, the shape of the scale, and its dims.
HEADS = {'head': ('d', (4,), 'H'), 'each_head': ('d', (2, 4), 'NH'), 'all_heads': ('nd', (2, 4), 'NH')}


@pytest.mark.parametrize('over', HEADS)
@pytest.mark.parametrize('kind', NORMS)
def test_heads_are_normed_each_or_together(kind, over):
    together, shape, dims = HEADS[over]
    graph = ModelGraph(HeadNorm(kind, over, 'NH', (2, 4), eps=1e-2))
    norm = graph.bind(toy.weights(graph))
    x = X[:, :, None].reshape(2, 3, 2, 4)
    axes = (-1,) if together == 'd' else (-2, -1)
    y = x - x.mean(axes, keepdims=True) if kind.startswith('layer') else x
    y = y / np.sqrt((y**2).mean(axes, keepdims=True) + 1e-2)
    if kind == 'layer_fixed':
        assert norm.scale is None
    else:
        assert norm.scale.shape == shape
        assert norm.scale.get_metadata('dims') == dims
        y = y * (np.asarray(norm.scale[...]) + (kind == 'rms_offset'))
    np.testing.assert_allclose(norm(jnp.asarray(x, jnp.float32)), y, atol=1e-5)


@pytest.mark.parametrize('kind', [RMSNorm, LayerNorm])
def test_bfloat16_is_rounded_once_at_the_end(kind):
    norm, x = make(kind), jnp.asarray(X, jnp.bfloat16)
    np.testing.assert_array_equal(norm(x), norm(x.astype(jnp.float32)).astype(jnp.bfloat16))


@pytest.mark.parametrize('kind', [RMSNorm, LayerNorm])
def test_zeros_stay_finite(kind):
    assert jnp.isfinite(make(kind)(jnp.zeros((1, 1, 8)))).all()
