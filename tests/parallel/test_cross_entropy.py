"""The loss over a vocabulary that is split: every device keeps the logits of its own part."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from tpu_llm.kernels import reference
from tpu_llm.kernels.cross_entropy import Options, cross_entropy
from tpu_llm.kernels.token_log_probs import token_log_probs
from tpu_llm.kernels.token_losses import token_losses
from tpu_llm.parallel import sharding

pytestmark = pytest.mark.usefixtures('quick_compile')

ROWS, LENGTH, WIDTH, VOCAB, CHUNK = 2, 24, 6, 1024, 8
OPERATION = r'= (.+?) (all-gather|all-to-all|all-reduce|reduce-scatter|collective-permute)(?:-start)?\('


def split_loss(hidden, kernel, targets, weights):
    return cross_entropy(
        hidden, kernel, targets, weights, Options(vocab_size=VOCAB, chunk=CHUNK), jnp.dtype('float32')
    )[0]


def whole_loss(hidden, kernel, targets, weights):
    kernel = jax.lax.with_sharding_constraint(kernel, sharding.current().replicated)
    options = {'vocab_size': VOCAB, 'softcap': 0.0, 'z_loss': 0.0, 'label_smoothing': 0.0}
    return (reference.cross_entropy(hidden, kernel, targets, **options) * weights).sum()


def collectives(loss, layout):
    """(operation, shape) of everything that travels in the compiled loss and its gradients."""
    table = layout.rules.activations
    arguments = [
        ((ROWS, LENGTH, WIDTH), 'BTD', jnp.float32),
        ((WIDTH, VOCAB), 'XV', jnp.float32),
        ((ROWS, LENGTH), 'BT', jnp.int32),
        ((ROWS, LENGTH), 'BT', jnp.float32),
    ]
    args = [jax.ShapeDtypeStruct(s, t, sharding=layout.named(table, dims, s)) for s, dims, t in arguments]
    with sharding.use(layout):
        text = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*args).compile().as_text()
    return [
        (operation, tuple(map(int, dims.split(','))))
        for shapes, operation in re.findall(OPERATION, text)
        for dims in re.findall(r'\[([\d,]+)\]', shapes)
    ]


@pytest.mark.parametrize('axes', [{'tensor': 4}, {'fsdp': 2, 'tensor': 4}])
def test_no_logits_travel(axes):
    layout = toy.layout(**axes)
    rows = ROWS // axes.get('fsdp', 1)
    found = collectives(split_loss, layout)
    assert found
    # Sums over the vocabulary, one number a position, and gradients: no device sees another's part of the vocabulary.
    assert {operation for operation, _ in found} == {'all-reduce'}
    assert not [shape for _, shape in found if VOCAB in shape]
    assert not [shape for _, shape in found if math.prod(shape) >= rows * CHUNK * VOCAB // 4]
    # What the test would find if they did.
    assert VOCAB in {size for _, shape in collectives(whole_loss, layout) for size in shape}


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_the_heads_gradient_is_summed_as_other_gradients_and_split_at_once(dtype):
    """In the dtype of the matmuls, in which weights are gathered; whole it would outlast the layers' backward pass."""
    layout = toy.layout(fsdp=2)

    def loss(hidden, kernel):
        targets, weights = jnp.zeros((ROWS, LENGTH), jnp.int32), jnp.ones((ROWS, LENGTH))
        return cross_entropy(hidden, kernel, targets, weights, Options(vocab_size=VOCAB), jnp.dtype(dtype))[0]

    with sharding.use(layout):
        gradient = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(
            jnp.ones((ROWS, LENGTH, WIDTH)), jnp.ones((WIDTH, VOCAB))
        )
    text = str(gradient)
    short = {'float32': 'f32', 'bfloat16': 'bf16'}[dtype]
    assert re.findall(rf'(\w+)\[{WIDTH},{VOCAB}\] = psum', text) == [short]
    split, kept = text.index('sharding_constraint'), text.index('optimization_barrier')
    assert "spec=P('fsdp', 'tensor')" in text[split:kept]


@pytest.mark.parametrize('axes', [{'tensor': 4}, {'fsdp': 2, 'tensor': 2, 'data': 2}])
def test_log_probs_of_tokens_are_those_of_one_device(axes):
    normal = np.random.default_rng(0).normal
    hidden, kernel = normal(size=(4, LENGTH, WIDTH)).astype('f'), normal(size=(WIDTH, VOCAB)).astype('f')
    targets = np.random.default_rng(1).integers(0, VOCAB, (4, LENGTH))

    def loss(hidden, kernel):
        options = Options(vocab_size=VOCAB - 9, chunk=5), jnp.dtype('float32')
        found = token_log_probs(hidden, kernel, targets, *options)
        each = (np.ones(targets.shape, np.float32),)
        total, squares = token_losses(hidden, kernel, targets, each, lambda p, w: (w * jnp.cos(p), w * p**2), *options)
        return jnp.sin(found).sum() + total, (found, squares)

    def run():
        gradient = jax.value_and_grad(lambda *args: loss(*args), argnums=(0, 1), has_aux=True)
        return jax.tree.leaves(jax.jit(gradient)(hidden, kernel))

    expected = run()
    with sharding.use(toy.layout(**axes)):
        for a, e in zip(run(), expected, strict=True):
            np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-5)
