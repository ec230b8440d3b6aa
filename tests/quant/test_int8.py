"""int8 matrices: the numbers of a hand-made one, and a model that still says nearly the same with a quarter of them."""

import jax.numpy as jnp
import numpy as np
import pytest
import toy
from flax import nnx

from tpu_llm.nn.einsum import Einsum
from tpu_llm.nn.mla import MLA
from tpu_llm.nn.moe import MoE
from tpu_llm.nn.param import named_params
from tpu_llm.quant.convert import QuantizedEinsum, int8, quantize


def test_a_column_has_its_own_scale():
    einsum = Einsum('BTD,DF->BTF', {'D': 2, 'F': 3}, bias=True)
    kernel = np.array([[1.27, 0.0, -3.0], [-0.634, 0.0, 1.0]], np.float32)
    einsum.kernel = einsum.kernel.replace(jnp.asarray(kernel))
    einsum.bias = einsum.bias.replace(jnp.asarray([1.0, 2.0, 3.0]))
    quantize(einsum, 'int8')
    quantized = einsum
    np.testing.assert_array_equal(quantized.kernel.codes[...], [[127, 0, -127], [-63, 0, 42]])
    np.testing.assert_allclose(quantized.kernel.scale[...], [0.01, 0.0, 3 / 127], rtol=1e-6, atol=1e-30)
    x = jnp.array([[[2.0, 1.0]]])
    np.testing.assert_allclose(quantized(x)[0, 0], [2.54 - 0.63 + 1, 2.0, -6 + 3 * 42 / 127 + 3], rtol=1e-5)


@pytest.mark.parametrize(
    'changes',
    [
        {},
        {'bias': ('qkv', 'out', 'mlp'), 'qk_norm': 'head'},
        {'kv_heads': 4, 'mla': MLA(kv_rank=8, query_rank=6, rope_dim=4, value_dim=6)},
        {'moe': MoE(experts=4, chosen=2, expert_width=8, first_dense=1)},
    ],
    ids=['llama', 'biased', 'latent', 'experts'],
)
def test_logits_barely_move(changes):
    graph = toy.graph(toy.config(**changes))
    model = graph.bind(toy.weights(graph)).unstacked()
    tokens = np.arange(12, dtype=np.int32).reshape(2, 6)
    before = model(tokens)
    held = sum(leaf.get_value().nbytes for _, leaf in named_params(model))
    int8(model)
    assert any(isinstance(module, QuantizedEinsum) for _, module in nnx.iter_modules(model))
    after = model(tokens)
    assert 0 < jnp.abs(after - before).max() < 0.05 * jnp.abs(before).max()
    assert sum(leaf.get_value().nbytes for _, leaf in named_params(model)) < held


def test_stacked_layers_are_those_one_by_one():
    graph = toy.graph(toy.config())
    stacked, apart = graph.bind(toy.weights(graph)), graph.bind(toy.weights(graph)).unstacked()
    int8(stacked)
    int8(apart)
    ours, theirs = (dict(named_params(model)) for model in (stacked.unstacked(), apart))
    assert set(ours) == set(theirs)
    for path, leaf in ours.items():
        np.testing.assert_allclose(leaf[...], theirs[path][...], rtol=1e-6, err_msg=path)
