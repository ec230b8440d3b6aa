"""The kernel under layouts: interpreted where every axis is manual, it equals one device; what cannot be says why.

Tolerance: 1e-5 on numbers of order 1, in float32.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from tpu_llm.config import ConfigError
from tpu_llm.kernels.attention import attention
from tpu_llm.kernels.mask import Mask
from tpu_llm.nn.position import from_segments
from tpu_llm.parallel import sharding

pytestmark = pytest.mark.usefixtures('quick_compile')

ROWS, LENGTH, HEADS, KV_HEADS, WIDTH = 2, 256, 4, 2, 4
SEGMENTS = jnp.asarray([[1] * 60 + [2] * 140 + [0] * 56, [1] * LENGTH])
POSITIONS = from_segments(SEGMENTS)
MASK = Mask(
    query_segments=SEGMENTS, query_positions=POSITIONS, key_segments=SEGMENTS, key_positions=POSITIONS, window=90
)


def inputs():
    random = np.random.default_rng(0)
    return [
        jnp.asarray(random.standard_normal((ROWS, LENGTH, n, WIDTH)), jnp.float32)
        for n in (HEADS, KV_HEADS, KV_HEADS, HEADS)
    ]


def run(layout, impl, sequence):
    def weighted(query, key, value, direction):
        out = attention(query, key, value, MASK, impl=impl, sequence=sequence)
        return (out * direction).sum(), out

    with sharding.use(layout):
        (_, out), gradients = jax.jit(jax.value_and_grad(weighted, argnums=(0, 1, 2), has_aux=True))(*inputs())
    return out, *gradients


@pytest.mark.parametrize(
    ('axes', 'sequence'), [({'fsdp': 2, 'tensor': 2}, 'gather'), ({'seq': 2, 'tensor': 2}, 'ulysses')]
)
def test_splash_equals_one_device(axes, sequence):
    actual, expected = run(toy.layout(**axes), 'splash', sequence), run(None, 'xla', None)
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, e, atol=1e-5)


def test_a_saved_result_spares_a_second_forward_pass():
    """Interpreted, every pass adds loops over blocks."""

    def loops(*names):
        attend = jax.checkpoint(
            lambda *inputs: attention(*inputs, MASK, impl='splash'),
            policy=jax.checkpoint_policies.save_only_these_names(*names),
        )
        gradient = jax.grad(lambda *inputs: (attend(*inputs) ** 2).sum(), argnums=(0, 1, 2))
        return jax.jit(gradient).lower(*inputs()[:3]).as_text().count('stablehlo.while')

    assert loops('attended') < loops()


@pytest.mark.parametrize('impl', ['splash', 'xla', 'blockwise'])
def test_saved_by_name_as_the_kernel_reads_them(impl, capsys):
    """For splash heads come before tokens: the backward pass finds them so. Every implementation knows the names."""
    attend = jax.checkpoint(
        lambda *inputs: attention(*inputs, MASK, impl=impl).sum(),
        policy=jax.checkpoint_policies.save_only_these_names('query', 'key', 'value'),
    )
    jax.ad_checkpoint.print_saved_residuals(attend, *inputs()[:3])
    saved = re.findall(r"f32\[([\d,]+)\] named '(\w+)'", capsys.readouterr().out)
    for name, heads in (('query', HEADS), ('key', KV_HEADS), ('value', KV_HEADS)):
        dims = (ROWS, heads, LENGTH, WIDTH) if impl == 'splash' else (ROWS, LENGTH, heads, WIDTH)
        assert (','.join(map(str, dims)), name) in saved


WRONG = [
    (
        {'seq': 2},
        "attention = 'splash' needs whole rows, and seq = 2 splits them; "
        "set sequence to 'ulysses', or attention to 'auto'",
    ),
    (
        {'tensor': 4},
        r'an activation \(BTKH\): K = 2 is not divisible by tensor = 4; make config.model.kv_heads a multiple of 4',
    ),
]


@pytest.mark.parametrize(('axes', 'message'), WRONG)
def test_what_cannot_be_says_why(axes, message):
    with sharding.use(toy.layout(**axes)), pytest.raises(ConfigError, match=message):
        attention(*inputs()[:3], MASK, impl='splash', sequence='gather')
