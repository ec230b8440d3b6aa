"""Compiles every kernel, forward and backward, for one TPU generation, on a machine without TPUs.

python tests/kernels/compile_kernels.py v5e      prints a line for each kernel
"""

import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from tpu_llm.kernels import divergence as divergences
from tpu_llm.kernels import grouped_matmul as grouped
from tpu_llm.kernels.attention import attention
from tpu_llm.kernels.cross_entropy import Options, cross_entropy
from tpu_llm.kernels.divergence import Head, Likely, divergence, likely_divergence
from tpu_llm.kernels.mask import Mask
from tpu_llm.parallel import sharding
from tpu_llm.parallel.mesh import AXES
from tpu_llm.parallel.rules import PRESETS
from tpu_llm.parallel.sharding import Layout

TOPOLOGIES = {
    'v4': {'topology_name': 'v4:2x2x1', 'chip_config_name': 'megacore'},
    'v5e': {'topology_name': 'v5e:2x2'},
    'v5p': {'topology_name': 'v5p:2x2x1'},
    'v6e': {'topology_name': 'v6e:2x2'},
    'tpu7x': {'topology_name': 'tpu7x:2x2x1'},
}
ROWS, LENGTH, HEADS, KV_HEADS = 2, 4096, 4, 2


def layout(generation, **axes):
    devices = topologies.get_topology_desc(platform='tpu', **TOPOLOGIES[generation]).devices
    sizes = [axes.get(axis, 1) for axis in AXES]
    devices = np.asarray(devices[: int(np.prod(sizes))]).reshape(sizes)
    return Layout(jax.sharding.Mesh(devices, AXES), PRESETS['zero3'])


def attend(query, key, value, segments, positions, *, impl, sequence=None, window=0, softcap=0.0):
    mask = Mask(
        query_segments=segments,
        query_positions=positions,
        key_segments=segments,
        key_positions=positions,
        window=window,
    )
    return attention(query, key, value, mask, impl=impl, sequence=sequence, softcap=softcap)


def attention_shapes(width):
    heads = [((ROWS, LENGTH, n, width), 'BTNH', jnp.bfloat16) for n in (HEADS, KV_HEADS, KV_HEADS)]
    return [*heads, *[((ROWS, LENGTH), 'BT', jnp.int32)] * 2]


def matmul(rows, kernels, sizes, *, transposed=False):
    return grouped.grouped_matmul(rows, kernels, sizes, transposed=transposed)


def loss(hidden, kernel, targets, weights):
    return cross_entropy(hidden, kernel, targets, weights, Options(vocab_size=32_000), jnp.dtype('bfloat16'))[0]


def apart(hidden, kernel, targets, weights, seen, their_kernel):
    student, teacher = (Head(*pair, None, jnp.dtype('bfloat16')) for pair in ((hidden, kernel), (seen, their_kernel)))
    return divergence(student, teacher, targets, weights, APART)[0]


def likely_apart(hidden, kernel, targets, weights, tokens, log_probs):
    student, teacher = Head(hidden, kernel, None, jnp.dtype('bfloat16')), Likely(tokens, log_probs, weights)
    return likely_divergence(student, teacher, targets, weights, APART)[0]


SPLIT = {'fsdp': 2, 'tensor': 2}
GROUPED = [((65_536, 2048), 'MD', jnp.bfloat16), ((8, 2048, 4096), 'EXY', jnp.bfloat16), ((8,), 'E', jnp.int32)]
WIDE = ((65_536, 4096), 'MF', jnp.bfloat16)
LOSS = [
    ((ROWS, 1024, 512), 'BTD', jnp.float32),
    ((512, 32_768), 'XV', jnp.float32),
    ((ROWS, 1024), 'BT', jnp.int32),
    ((ROWS, 1024), 'BT', jnp.float32),
]
APART = divergences.Options(kind='jensen_shannon', vocab_size=32_000)
TEACHER = [((ROWS, 1024, 1024), 'BTD', jnp.float32), ((1024, 32_768), 'XV', jnp.float32)]
LIKELY = [((ROWS, 1024, 64), 'BTX', jnp.int32), ((ROWS, 1024, 64), 'BTX', jnp.float32)]
# What is compiled: the function, its arguments (shape, dims, dtype), the mesh, and whether it is a TPU kernel.
KERNELS = {
    'splash': (partial(attend, impl='auto'), attention_shapes(128), SPLIT, True),
    'splash, wide heads': (partial(attend, impl='splash', softcap=50.0, window=1500), attention_shapes(256), {}, True),
    'blockwise': (partial(attend, impl='blockwise', window=1500, softcap=50.0), attention_shapes(128), SPLIT, False),
    'ring': (partial(attend, impl='auto', sequence='ring'), attention_shapes(128), {'seq': 4}, True),
    'ring, wide heads': (
        partial(attend, impl='splash', sequence='ring', softcap=50.0, window=1500),
        attention_shapes(256),
        {'seq': 4},
        True,
    ),
    'ring, blockwise': (partial(attend, impl='blockwise', sequence='ring'), attention_shapes(128), {'seq': 4}, False),
    'grouped matmul': (matmul, GROUPED, {}, True),
    'grouped matmul, transposed': (partial(matmul, transposed=True), [WIDE, *GROUPED[1:]], {}, True),
    'cross-entropy': (loss, LOSS, SPLIT, False),
    'divergence': (apart, [*LOSS, *TEACHER], SPLIT, False),
    'divergence of the likeliest': (likely_apart, [*LOSS, *LIKELY], SPLIT, False),
}


def compile_kernel(generation, name):
    function, shapes, axes, is_kernel = KERNELS[name]
    lies = layout(generation, **axes)
    args = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=lies.named(lies.rules.activations, dims, shape))
        for shape, dims, dtype in shapes
    ]
    floats = [i for i, x in enumerate(args) if jnp.issubdtype(x.dtype, jnp.floating)][:3]

    def total(*args):
        return function(*args).astype(jnp.float32).sum()

    with sharding.use(lies):
        lowered = jax.jit(jax.grad(total, argnums=floats)).trace(*args).lower(lowering_platforms=('tpu',))
    assert ('tpu_custom_call' in lowered.compile().as_text()) == is_kernel, name
    return name


if __name__ == '__main__':
    for name in KERNELS:  # one after another: two compiles at once overflow a stack of libtpu's (SparseCore programs)
        print(f'{compile_kernel(sys.argv[1], name)}: compiled', flush=True)
