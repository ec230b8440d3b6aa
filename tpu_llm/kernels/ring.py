"""Ring attention: queries stay, keys and values travel round the `seq` axis (Liu et al., 2023, arXiv 2310.01889).

Every device attends to the keys it holds, then to those that come by; the parts merge by their log-sums, so that a
device never holds more than a few pieces of the row. The next piece is under way while the present one is worked on.
The backward pass goes round once more, and the gradients of keys and values travel along with them.

A part is any pair of functions with the contract of `kernels/blockwise.py`, and an entry of `PARTS`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from tpu_llm.arrays import Array, Float
from tpu_llm.kernels import blockwise, splash_part
from tpu_llm.kernels.blockwise import UNSEEN, Options
from tpu_llm.kernels.mask import Mask


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """Attention to some of the keys."""

    forward: Callable[..., tuple[Array, Array]]
    backward: Callable[..., tuple[Array, Array, Array]]


PARTS = {
    'blockwise': Part(blockwise.forward, blockwise.backward),
    'splash': Part(splash_part.forward, splash_part.backward),  # where positions are places in the row
}


def attend(
    query: Float[Array, 'B T N H'],
    key: Float[Array, 'B S K H'],
    value: Float[Array, 'B S K U'],
    mask: Mask,
    part: Part,
    options: Options,
    peers: int = 1,
) -> Float[Array, 'B T N U']:
    """Attention to the keys of all `peers`, where the mesh's `seq` axis is manual; of one, to the keys given.

    A window cuts the way short, which takes rows for being in natural or in zig-zag order (`parallel/sequence.py`).
    """
    # Scaled here, and not in every visit. Heads outermost: the products then run over contiguous [T, H] planes.
    query = (query * options.scale).astype(query.dtype)
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (query, key, value))
    # Keys and values travel and are summed side by side, so narrower values are filled up with zeros.
    v = jnp.pad(v, [(0, 0)] * 3 + [(0, k.shape[-1] - v.shape[-1])])
    # All layers share the mask. Without this, JAX would compute it once, block by block, and keep it: T x S of it.
    q, mask = jax.lax.optimization_barrier((q, mask))
    out: Any = _attend(q, k, v, mask, part, options, peers)
    return out.transpose(0, 2, 1, 3)[..., : value.shape[-1]]


def ways(mask: Mask, peers: int) -> tuple[tuple[int, int], ...]:
    """How keys travel, as (direction, hops): all the way round, or a few hops either way.

    In zig-zag order the pieces up to `near` before and after a device's own two are at most `near` hops away.
    """
    piece = mask.key_segments.shape[1] / 2
    near = max(1, math.ceil((mask.window - 1) / piece)) if mask.window else peers
    return ((1, near), (-1, near)) if 2 * near < peers - 1 else ((1, peers - 1),)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _attend(query, key, value, mask, part, options, peers) -> Array:
    return _forward(query, key, value, mask, part, options, peers)[0]


def _forward(query, key, value, mask, part, options, peers) -> tuple[Array, Any]:
    def visit(sums: Any, piece: Any) -> tuple[Any, tuple[()]]:
        k, v, here = _unpack(piece, mask)

        def see(sums: Any) -> Any:
            return _merge(sums, part.forward(query, k, v, here, options))

        return jax.lax.cond(blockwise.visible(here, options).any(), see, lambda sums: sums, sums), ()

    sums = jnp.zeros(query.shape), jnp.full(query.shape[:-1], UNSEEN)
    (out, log_sum), _ = _travel(visit, sums, _pack(key, value, mask), (), mask, peers)
    # A policy that saves these spares the backward pass a second forward pass.
    out, log_sum = checkpoint_name(out.astype(query.dtype), 'attended'), checkpoint_name(log_sum, 'attended')
    return out, (query, key, value, mask, out, log_sum)


def _backward(part, options, peers, saved, d_out) -> tuple[Array, Array, Array, None]:
    query, key, value, mask, out, log_sum = saved
    delta = jnp.einsum('BNTH,BNTH->BNT', out, d_out, preferred_element_type=jnp.float32)
    none = jnp.zeros((2, *key.shape))  # of keys and values; one array, which XLA:TPU sends during a visit as it should

    def visit(d_query: Array, piece: Any) -> tuple[Array, Array]:
        k, v, here = _unpack(piece, mask)

        def see(d_query: Array) -> tuple[Array, Array]:
            d_q, d_k, d_v = part.backward(query, k, v, here, log_sum, delta, d_out, options)
            return d_query + d_q, jnp.stack([d_k, d_v]).astype(none.dtype)

        return jax.lax.cond(blockwise.visible(here, options).any(), see, lambda d_query: (d_query, none), d_query)

    own = _pack(key, value, mask)
    d_query, (d_key, d_value) = _travel(visit, jnp.zeros(query.shape), own, none, mask, peers)
    return d_query.astype(query.dtype), d_key.astype(key.dtype), d_value.astype(value.dtype), None


_attend.defvjp(_forward, _backward)


def _travel(visit: Callable[..., Any], state: Any, own: Any, empty: Any, mask: Mask, peers: int) -> tuple[Any, Any]:
    """`state, added = visit(state, piece)` for one's own piece and for those that come by.

    What visits add to a piece travels with it, and home in the end: returned are the state and one's own.
    """
    (direction, hops), *others = ways(mask, peers)
    state, luggage = _one_way(visit, state, own, empty, direction, hops + 1, peers)
    luggage = _send(luggage, -direction * hops, peers)
    for direction, hops in others:
        state, more = _one_way(visit, state, _send(own, direction, peers), empty, direction, hops, peers)
        luggage = jax.tree.map(jnp.add, luggage, _send(more, -direction * hops, peers))
    return state, luggage


def _one_way(
    visit: Callable[..., Any], state: Any, piece: Any, empty: Any, direction: int, pieces: int, peers: int
) -> tuple[Any, Any]:
    """Visits so many pieces, of which this is the first; returned are the state and the luggage of the last."""

    def hop(carry: tuple[Any, Any, Any], _: None) -> tuple[tuple[Any, Any, Any], None]:
        state, piece, luggage = carry
        # The visit depends on nothing that is sent here, so the one goes on during the other.
        following, arriving = _send((piece, luggage), direction, peers)
        state, added = visit(state, piece)
        return (state, following, jax.tree.map(jnp.add, arriving, added)), None

    (state, _, luggage), _ = jax.lax.scan(hop, (state, piece, empty), length=pieces)
    return state, luggage


def _send(tree: Any, hops: int, peers: int) -> Any:
    """To the device so many places further along `seq`."""
    if hops % peers == 0:
        return tree
    to = [(device, (device + hops) % peers) for device in range(peers)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, 'seq', to), tree)


def _pack(key: Array, value: Array, mask: Mask) -> tuple[Array, ...]:
    return key, value, mask.key_segments, mask.key_positions


def _unpack(piece: tuple[Array, ...], mask: Mask) -> tuple[Array, Array, Mask]:
    key, value, segments, positions = piece
    return key, value, dataclasses.replace(mask, key_segments=segments, key_positions=positions)


def _merge(one: tuple[Array, Array], other: tuple[Array, Array]) -> tuple[Array, Array]:
    """What is attended, and its log-sum, over two sets of keys, of which each query sees some."""
    total = jnp.logaddexp(one[1], other[1])
    weight = jnp.exp(other[1] - total)[..., None]
    # What a part says where nothing is seen may be anything, and 0 times it not 0.
    return jnp.where(weight > 0, one[0] + weight * (other[0] - one[0]), one[0]), total
