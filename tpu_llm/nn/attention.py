"""Multi-head attention: project, clip, norm, rotate, attend, project back."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from tpu_llm.arrays import Array, Float, Int
from tpu_llm.kernels.attention import Dropped, attention
from tpu_llm.kernels.mask import Mask
from tpu_llm.nn.cache import LayerCache
from tpu_llm.nn.context import Context
from tpu_llm.nn.dropout import site_keys
from tpu_llm.nn.einsum import Einsum, project
from tpu_llm.nn.norm import HeadNorm
from tpu_llm.nn.param import Init, Normal
from tpu_llm.nn.position import DistancePositions, RelativePositions, rotate
from tpu_llm.parallel import sharding
from tpu_llm.parallel.sharding import constrain


class Attention(nnx.Module):
    """N query heads over K key-value heads: MHA (K = N), GQA, MQA (K = 1)."""

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        window: int,
        scale: float,
        softcap: float,
        clip: float,
        norms: tuple[HeadNorm, HeadNorm] | None,
        positions: DistancePositions | RelativePositions | None,
        turns: bool,
        dropout: float,
        bias: tuple[str, ...],
        out_init: Init,
        impl: str,
        sequence: str,
    ):
        sizes = {'D': width, 'N': heads, 'K': kv_heads, 'H': head_dim}
        self.scale = scale or head_dim**-0.5
        # Scores start as large whatever they are multiplied by (T5 leaves its own as they are).
        query_init = Normal(width**-0.5 * (head_dim**-0.5 / self.scale))
        self.query = Einsum('BTD,DNH->BTNH', sizes, bias='qkv' in bias, init=query_init)
        self.key = Einsum('BTD,DKH->BTKH', sizes, bias='qkv' in bias)
        self.value = Einsum('BTD,DKH->BTKH', sizes, bias='qkv' in bias)
        self.out = Einsum('BTNH,NHD->BTD', sizes, bias='out' in bias, init=out_init)
        self.query_norm, self.key_norm = norms or (None, None)
        self.positions = positions
        self.turns = turns
        self.clip = clip
        self.window = window
        self.softcap = softcap
        self.dropout = dropout
        self.impl = impl
        self.sequence = sequence

    @jax.named_scope('attention')
    def __call__(
        self,
        x: Float[Array, 'B T D'],
        context: Context,
        layer: Int[Array, ''] | int = 0,
        cache: LayerCache | None = None,
    ) -> tuple[Float[Array, 'B T D'], LayerCache | None]:
        query, key, value = project(x, (self.query, self.key, self.value))
        if self.clip:
            query, key, value = (jnp.clip(x, -self.clip, self.clip) for x in (query, key, value))
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        if self.turns and (angles := context.turns(self.window)) is not None:
            query, key = rotate(query, angles), rotate(key, angles)
        query, key, value = constrain(query, 'BTNH'), constrain(key, 'BTKH'), constrain(value, 'BTKH')
        if cache is not None:
            assert context.cache is not None
            cache = cache.write(key, value, context.cache.index)
            key, value = cache.read(query.dtype)
        key, value, mask = self.seen(key, value, context)
        if isinstance(self.positions, DistancePositions):
            query, mask = self.positions(query, mask, self.scale)
        elif self.positions is not None:
            mask = dataclasses.replace(mask, relative=self.positions.of_rows(len(x)))
        attended = attention(
            query,
            _for_all(key),
            _for_all(value),
            mask,
            impl=self.impl,
            sequence=self.sequence if cache is None else None,
            scale=self.scale,
            softcap=self.softcap,
            dropped=dropped(self.dropout, context, layer),
        )
        return self.out(constrain(attended, 'BTNH')), cache

    def seen(
        self, key: Float[Array, 'B S K H'], value: Float[Array, 'B S K H'], context: Context
    ) -> tuple[Float[Array, 'B _ K H'], Float[Array, 'B _ K H'], Mask]:
        """The keys and values there are, and who sees them."""
        return key, value, context.mask(window=self.window)


def _for_all(head: Float[Array, 'B S K H']) -> Float[Array, 'B S _ H']:
    """A single head as often as heads are split over devices: each has it already."""
    layout = sharding.current()
    if layout is None or head.shape[2] > 1:
        return head
    parts = math.prod(layout.mesh.shape[axis] for axis in sharding.axis_names(layout.spec('BTKH')[2]))
    return jnp.broadcast_to(head, (*head.shape[:2], parts, head.shape[3]))


def dropped(rate: float, context: Context, layer: Int[Array, ''] | int, site: str = 'attention') -> Dropped | None:
    """Dropout on the attention weights of a layer; None where nothing is drawn."""
    if context.keys is None or rate == 0.0:
        return None
    return Dropped(rate, site_keys(context.keys, site, layer))
