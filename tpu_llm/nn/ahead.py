"""What predicts further tokens than the next: DeepSeek-V3 (2024, arXiv 2412.19437), section 2.2, equations 21 to 23.

Depth k reads, at every position, the hidden state of the depth before (of the model, for the first) and the embedding
of the token k further on, and so has read as much as predicts the token after that. It is a layer like those of the
model; embedding and head are the model's own.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from tpu_llm.arrays import AnyArray, Array, Float
from tpu_llm.nn.einsum import Einsum
from tpu_llm.nn.param import Normal
from tpu_llm.nn.stack import make_stack


class Depth(nnx.Module):
    """norm(layer(M [norm(hidden); norm(embedding)])); M lies in two halves, [D D] each.

    Hidden states are those behind the last norm, here as in the model, which may be the layer's own (`normed`).
    """

    def __init__(
        self,
        width: int,
        make_layer: Callable[[int], nnx.Module],
        make_norm: Callable[[], nnx.Module],
        *,
        normed: bool,
        remat: str,
    ):
        sizes, init = {'D': width, 'Y': width}, Normal((2 * width) ** -0.5)
        self.hidden_norm = make_norm()
        self.token_norm = make_norm()
        self.hidden_map = Einsum('BTD,DY->BTY', sizes, init=init)
        self.token_map = Einsum('BTD,DY->BTY', sizes, init=init)
        self.stack = make_stack(make_layer, 1, prefix=1, remat=remat)
        self.norm = nnx.data(None if normed else make_norm())

    @jax.named_scope('ahead')
    def join(self, hidden: Float[Array, 'B T D'], tokens: Float[Array, 'B T D']) -> Float[Array, 'B T D']:
        """What the layer takes, of hidden states and the embeddings of tokens further on."""
        return self.hidden_map(self.hidden_norm(hidden)) + self.token_map(self.token_norm(tokens))

    def last(self, x: Float[Array, 'B T D']) -> Float[Array, 'B T D']:
        """The hidden states, of what the layer gives."""
        return x if self.norm is None else self.norm(x)


def shifted(x: AnyArray, count: int) -> Array:
    """[B, T]: at each place what stands `count` places further on; 0 where the row has ended."""
    return jnp.pad(jnp.asarray(x)[:, count:], ((0, 0), (0, min(count, x.shape[1]))))
