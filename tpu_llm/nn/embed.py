"""Token embeddings, and the head that turns hidden states into logits."""

import jax.numpy as jnp
from flax import nnx

from tpu_llm.arrays import Array, Float, Int
from tpu_llm.nn.param import Normal, param


def padded_vocab(vocab_size: int, multiple: int) -> int:
    """The vocabulary as it lies in memory: a multiple that every shard can hold whole lanes of."""
    return -(-vocab_size // multiple) * multiple


class Embed(nnx.Module):
    """A vector a token. `table` is float32[V D], V padded to a multiple of `multiple` with zeros."""

    def __init__(self, vocab_size: int, width: int, *, multiple: int, std: float):
        rows = padded_vocab(vocab_size, multiple)
        self.table = param('VD', (rows, width), Normal(std), padding=rows - vocab_size)

    def __call__(self, tokens: Int[Array, 'B T'], dtype: jnp.dtype) -> Float[Array, 'B T D']:
        return self.table[...].astype(dtype)[tokens]


class Head(nnx.Module):
    """The unembedding, float32[D V], V padded like the embedding's."""

    def __init__(self, vocab_size: int, width: int, *, multiple: int):
        columns = padded_vocab(vocab_size, multiple)
        self.kernel = param('DV', (width, columns), Normal(width**-0.5), padding=columns - vocab_size)
