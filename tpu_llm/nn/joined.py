"""Maps of one input whose kernels lie in one matrix, as decoding on a CPU reads it best: a row an output.

There decoding is bound by reading weights. One product with all of them is faster than three, and a few tokens times
short contiguous rows is faster than times long ones. Heads are summed over as one dim: XLA would copy the matrix at
every use to bring two of them into its own order. Training joins maps anew in every step instead (`einsum.project`).
"""

import math
from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx

from tpu_llm.arrays import Array, Float
from tpu_llm.nn.attention import Attention
from tpu_llm.nn.einsum import Cut, Einsum
from tpu_llm.nn.mamba import MambaLayer
from tpu_llm.nn.mamba2 import Mamba2Layer
from tpu_llm.nn.mla import LatentAttention
from tpu_llm.nn.mlp import MLP

_TOGETHER = {
    Attention: (('query', 'key', 'value'), ('out',)),
    LatentAttention: (('latent', 'key_rope'), ('query', 'query_rope'), ('out',)),
    MLP: (('gate', 'up'),),
    MambaLayer: (('input', 'gate'),),
    Mamba2Layer: (('gate', 'input', 'write', 'read', 'step'),),
}


def join(model: nnx.Module) -> None:
    """Joins, in place, maps of every attention, state space and gated MLP of a model whose layers are not stacked."""
    for _, module in list(nnx.iter_modules(model)):
        for names in _TOGETHER.get(type(module), ()):
            maps = [getattr(module, name) for name in names]
            if all(type(each) is Einsum for each in maps):
                for name, cut in zip(names, _cuts(maps), strict=True):
                    setattr(module, name, cut)


def _cuts(maps: Sequence[Einsum]) -> list[Cut]:
    first = maps[0].kernel
    summed = first.get_metadata('summed')
    shapes = [each.kernel.shape[len(summed) :] for each in maps]
    widths = [math.prod(shape) for shape in shapes]
    kernels: list[Float[Array, 'Y D']] = [
        each.kernel[...].reshape(-1, width).T for each, width in zip(maps, widths, strict=True)
    ]
    whole = first.replace(jnp.concatenate(kernels), dims=f'Y{summed[0]}')
    return [Cut(whole, sum(widths[:i]), shapes[i], each.bias) for i, each in enumerate(maps)]
