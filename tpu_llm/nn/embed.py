"""Token embeddings, and the head that turns hidden states into logits."""

import jax
import jax.numpy as jnp
from flax import nnx

from tpu_llm.arrays import Array, Float, Int
from tpu_llm.nn.einsum import Einsum
from tpu_llm.nn.param import Constant, Normal, param
from tpu_llm.parallel.sharding import constrain


def padded_vocab(vocab_size: int, multiple: int) -> int:
    """The vocabulary as it lies in memory: a multiple that every shard can hold whole lanes of."""
    return -(-vocab_size // multiple) * multiple


class Embed(nnx.Module):
    """A vector a token. `table` is float32[V D], V padded to a multiple of `multiple` with zeros.

    Where it has a `narrow` width of its own, a matrix takes its vectors to the model's (OPT-350m).
    """

    def __init__(self, vocab_size: int, width: int, *, multiple: int, std: float, narrow: int = 0):
        rows = padded_vocab(vocab_size, multiple)
        self.table = param('VD', (rows, narrow or width), Normal(std), padding=rows - vocab_size)
        self.widen = nnx.data(Einsum('BTY,YD->BTD', {'Y': narrow, 'D': width})) if narrow else None

    @jax.named_scope('embed')
    def __call__(self, tokens: Int[Array, 'B T'], dtype: jnp.dtype) -> Float[Array, 'B T D']:
        x = self.looked_up(tokens, dtype)
        return x if self.widen is None else self.widen(x)

    def looked_up(self, tokens: Int[Array, 'B T'], dtype: jnp.dtype) -> Float[Array, 'B T _']:
        # Whole vectors on every device: a lookup in a table split along its width would move the batch around.
        return constrain(self.table[...].astype(dtype), 'VD')[tokens]


class Head(nnx.Module):
    """The unembedding, float32[D V] unless the embedding is it, and its bias, float32[V]; V padded as there."""

    def __init__(self, vocab_size: int, width: int, *, multiple: int, tied: bool = False, bias: bool = False):
        columns = padded_vocab(vocab_size, multiple)
        padding = columns - vocab_size
        self.kernel = None if tied else param('DV', (width, columns), Normal(width**-0.5), padding=padding)
        self.bias = param('V', (columns,), Constant(0.0), padding=padding) if bias else None
