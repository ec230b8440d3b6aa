"""Rows split over the mesh's `seq` axis (context parallelism): which tokens a device holds, how it sees the others.

Every device holds T / P consecutive tokens of a row. For attention it either gathers all keys and values (`gather`) or
trades its part of the tokens of all heads for all tokens of a part of the heads (`ulysses`: Jacobs et al., 2023, arXiv
2309.14509), or the keys travel (`kernels/ring.py`).

A causal mask hides more from early tokens than from late ones. Where hidden blocks are skipped, work is even only in
zig-zag order: a row is cut into 2P pieces, and device i holds pieces i and 2P - 1 - i.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from tpu_llm.arrays import Array, Float, Int
from tpu_llm.config import ConfigError
from tpu_llm.parallel import sharding

Rows = tuple[Int[Array, 'B _'], Int[Array, 'B _']]  # segments and positions
Attend = Callable[[Array, Array, Array, Rows, Rows], Array]  # query, key, value, the queries' rows, the keys' rows


def gather(
    attend: Attend,
    query: Float[Array, 'B T N H'],
    key: Float[Array, 'B S K H'],
    value: Float[Array, 'B S K U'],
    queries: Rows,
    keys: Rows,
) -> Float[Array, 'B T N U']:
    """Own queries, everyone's keys; called where `seq` is manual."""
    key, value, keys = _whole((key, value, keys))
    return attend(query, key, value, queries, keys)


def ulysses(
    attend: Attend,
    query: Float[Array, 'B T N H'],
    key: Float[Array, 'B S K H'],
    value: Float[Array, 'B S K U'],
    queries: Rows,
    keys: Rows,
) -> Float[Array, 'B T N U']:
    """Whole rows of a part of the heads; called where `seq` is manual.

    Key-value heads that are fewer than the devices go to all of those whose query heads need them.
    """
    peers, tensor, kv_heads = jax.lax.axis_size('seq'), jax.lax.axis_size('tensor'), key.shape[2]
    check_heads(query.shape[2] * tensor, peers, tensor)
    repeats = peers // math.gcd(peers, kv_heads)
    key, value = (jnp.repeat(x, repeats, axis=2) for x in (key, value))
    query, key, value = (jax.lax.all_to_all(x, 'seq', 2, 1, tiled=True) for x in (query, key, value))
    out = attend(query, key, value, *_whole((queries, keys)))
    return jax.lax.all_to_all(out, 'seq', 1, 2, tiled=True)


def _whole(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.lax.all_gather(x, 'seq', axis=1, tiled=True), tree)


# -------------------------------------------------------------------------------------------------- zig-zag order


def zigzag(x: Array) -> Array:
    """Tokens [B, T, …] from natural into zig-zag order; without a layout that splits rows, `x` itself.

    Raises ConfigError for rows that 2P pieces do not divide.
    """
    return _reordered(x, _to_zigzag)


def natural(x: Array) -> Array:
    """The inverse of `zigzag`."""
    return _reordered(x, _to_natural)


def pieces(peers: int) -> list[int]:
    """The pieces of a row as the devices hold them in zig-zag order, two each: 0, 2P - 1, 1, 2P - 2, …"""
    return [piece for device in range(peers) for piece in (device, 2 * peers - 1 - device)]


def splits_rows() -> bool:
    """Whether the layout in use splits rows."""
    layout = sharding.current()
    return layout is not None and layout.mesh.shape['seq'] > 1


def _reordered(x: Array, reorder: Callable[[Array, int], Array]) -> Array:
    layout = sharding.current()
    if layout is None or not splits_rows():
        return x
    peers = layout.mesh.shape['seq']
    check_length(x.shape[1], peers, zigzag=True)
    spec = PartitionSpec(*layout.spec('BT'), *[None] * (x.ndim - 2))
    return sharding.manual(lambda x: reorder(x, peers), layout, in_specs=spec, out_specs=spec)(x)


def _to_zigzag(x: Array, peers: int) -> Array:
    halves = zip(jnp.split(x, 2, axis=1), _homes(peers), strict=True)
    even, odd = (jax.lax.ppermute(half, 'seq', list(enumerate(homes))) for half, homes in halves)
    return _by_parity(even, odd)


def _to_natural(x: Array, peers: int) -> Array:
    first, second = jnp.split(x, 2, axis=1)
    even, odd = jnp.split(_by_parity(first, second), 2, axis=1)
    back = [[(home, device) for device, home in enumerate(homes)] for homes in _homes(peers)]
    return jnp.concatenate(
        [jax.lax.ppermute(half, 'seq', to) for half, to in zip((even, odd), back, strict=True)], axis=1
    )


def _homes(peers: int) -> tuple[list[int], list[int]]:
    """Where each device's even piece, the first of its two in natural order, is at home, and where its odd one."""
    held = pieces(peers)
    even, odd = ([held.index(2 * device + parity) // 2 for device in range(peers)] for parity in (0, 1))
    return even, odd


def _by_parity(even: Array, odd: Array) -> Array:
    """Device i holds piece i first: the even one if i is even."""
    first = jax.lax.axis_index('seq') % 2 == 0
    return jnp.where(first, jnp.concatenate([even, odd], axis=1), jnp.concatenate([odd, even], axis=1))


# ------------------------------------------------------------------------------------------------- what cannot hold


def check(
    scheme: str, mesh: Mapping[str, int], *, length: int, heads: int, zigzag: bool, by_place: Sequence[str]
) -> None:
    """Raises ConfigError where a mesh cannot split rows of `length` tokens as `scheme` does.

    `by_place` names what depends on a token's place in its row, which zig-zag order changes.
    """
    peers, tensor = mesh['seq'], mesh['tensor']
    if peers == 1:
        return
    check_length(length, peers, zigzag=zigzag)
    if scheme == 'ulysses':
        check_heads(heads, peers, tensor)
    if zigzag and by_place:
        raise ConfigError(
            f'{" and ".join(by_place)} would not be what it is on one device: sequence = {scheme!r} over seq = {peers} '
            "puts rows in zig-zag order; leave it out, or set sequence = 'ulysses'"
        )


def check_length(length: int, peers: int, *, zigzag: bool) -> None:
    parts = 2 * peers if zigzag else peers
    if length % parts:
        below = length // parts * parts
        why = f'2 x seq = {parts} pieces (two a device, in zig-zag order)' if zigzag else f'seq = {peers} pieces'
        fits = [p for p in range(1, length + 1) if p == 1 or length % (p * parts // peers) == 0]
        near = [max(p for p in fits if p < peers), *(p for p in fits if p > peers)][:2]
        raise ConfigError(
            f'rows of {length} tokens do not divide into {why}; the nearest that work are rows of '
            f'{f"{below} or " if below else ""}{below + parts} tokens, or seq = {" or ".join(map(str, near))}'
        )


def check_heads(heads: int, peers: int, tensor: int) -> None:
    if heads % (peers * tensor):
        fits = [p for p in range(1, heads // tensor + 1) if heads % (p * tensor) == 0]
        raise ConfigError(
            f"sequence = 'ulysses' gives every device whole heads, but heads = {heads} is not divisible by "
            f'seq x tensor = {peers} x {tensor}; with tensor = {tensor}, seq may be {", ".join(map(str, fits))}'
        )
