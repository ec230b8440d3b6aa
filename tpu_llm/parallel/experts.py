"""Dispatch: tokens go to where their experts are, and the results come back.

Dropless, tokens are repeated, once for each of their choices, and sorted by expert. Over the mesh's `expert` axis each
device first sends every row to the device that holds its expert, an all-to-all of ragged sizes. With a fixed number of
places an expert, the all-to-all is even. `tensor` splits each expert's hidden width, and the parts are summed.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from tpu_llm.arrays import Array, Float, Int
from tpu_llm.parallel import sharding

Kernels = Mapping[str, Any]  # arrays whose dims start with E
Compute = Callable[[Float[Array, 'M D'], Float[Array, ' M'], Int[Array, ' E'], Kernels, int], Float[Array, 'M D']]
Seat = Callable[..., tuple[Int[Array, 'B E C'], Float[Array, 'B E C'], Float[Array, ' B']]]


def dropless(
    x: Float[Array, 'B T D'],
    experts: Int[Array, 'B T X'],
    weights: Float[Array, 'B T X'],
    kernels: Kernels,
    dims: Mapping[str, str],
    compute: Compute,
    room: float = 0.0,
) -> tuple[Float[Array, 'B T D'], Float[Array, ' B']]:
    """Sums weight * expert(x) over the experts of each token; an expert of E or more is nobody's.

    `compute(rows, weights, sizes, kernels, expected)` runs rows sorted by expert, `sizes[e]` of them each, through
    their experts and weighs them; `expected` is how many an even load is. The kernels' dims say how they lie on the
    mesh. Over `expert`, a device takes `room` times its even share of rows, with 0 all that may come; given back too is
    how many choices found no room, spread over the rows.
    """
    layout = sharding.current()
    if layout is None or layout.mesh.size == 1:
        return _local(x, experts, weights, kernels, compute), jnp.zeros(x.shape[0])
    shape = layout.mesh.shape
    rows = layout.spec('BT')
    whole = PartitionSpec(rows[0])
    specs = {name: _held(layout.spec(dims[name], layout.rules.params)) for name in kernels}

    def body(x: Array, experts: Array, weights: Array, kernels: Kernels) -> tuple[Array, Array]:
        missed = jnp.zeros(())
        if shape['expert'] > 1:
            y, missed = _exchanged(x, experts, weights, kernels, compute, room)
        else:
            y = _local(x, experts, weights, kernels, compute)
        y = jax.lax.psum(y, 'tensor') if shape['tensor'] > 1 else y
        return y, jnp.full(x.shape[0], jax.lax.psum(missed, 'seq') / x.shape[0])

    return sharding.manual(body, layout, in_specs=(rows, rows, rows, specs), out_specs=(rows, whole))(
        x, experts, weights, kernels
    )


def in_places(
    x: Float[Array, 'B T D'],
    seat: Seat,
    wishes: tuple[Array, ...],
    kernels: Kernels,
    dims: Mapping[str, str],
    compute: Callable[[Float[Array, 'B E C D'], Kernels], Float[Array, 'B E C D']],
) -> tuple[Float[Array, 'B T D'], Float[Array, ' B']]:
    """Sums weight * expert(x) over the places of a fixed number C that `seat` fills, row by row.

    `seat(*wishes)`, each of them [B, T, ...], gives the token in every place (T: none), its weight, and a number a row
    that is passed on. Over `expert` the places go to their experts and back by two all-to-alls.
    """
    layout = sharding.current()
    if layout is None or layout.mesh.size == 1:
        slots, weights, missed = seat(*wishes)
        return _give_back(compute(_take(x, slots), kernels), slots, weights, x), missed
    shape, rows = layout.mesh.shape, layout.spec('BT')
    whole = PartitionSpec(rows[0])  # seats are given over whole rows
    specs = {name: _held(layout.spec(dims[name], layout.rules.params)) for name in kernels}

    def body(x: Array, wishes: tuple[Array, ...], kernels: Kernels) -> tuple[Array, Array]:
        slots, weights, missed = seat(*wishes)
        if shape['seq'] > 1:  # each takes its part of every expert's places
            slots, weights = (_part(a, none) for a, none in ((slots, x.shape[1]), (weights, 0.0)))
        taken = _take(x, slots)
        if shape['expert'] > 1:
            taken = jax.lax.all_to_all(taken, 'expert', split_axis=1, concat_axis=0, tiled=True)
        out = compute(taken, kernels)
        if shape['expert'] > 1:
            out = jax.lax.all_to_all(out, 'expert', split_axis=0, concat_axis=1, tiled=True)
        y = _give_back(out, slots, weights, x)
        if shape['tensor'] > 1:
            y = jax.lax.psum(y, 'tensor')
        return jax.lax.psum_scatter(y, 'seq', scatter_dimension=1, tiled=True) if shape['seq'] > 1 else y, missed

    return sharding.manual(body, layout, in_specs=(whole, whole, specs), out_specs=(rows, whole))(x, wishes, kernels)


def _take(x: Float[Array, 'B T D'], slots: Int[Array, 'B E C']) -> Float[Array, 'B E C D']:
    return jax.vmap(lambda x, slots: x.at[slots].get(mode='fill', fill_value=0))(x, slots)


def _give_back(
    out: Float[Array, 'B E C D'], slots: Int[Array, 'B E C'], weights: Float[Array, 'B E C'], x: Float[Array, 'B T D']
) -> Float[Array, 'B T D']:
    """Adds every place's result to its token, in float32."""
    weighted = out.astype(jnp.float32) * weights[..., None]
    add = jax.vmap(lambda slots, rows: jnp.zeros(x.shape[1:], jnp.float32).at[slots].add(rows, mode='drop'))
    return add(slots, weighted).astype(x.dtype)


def _part(places: Array, none: float) -> Array:
    """This device's share of each expert's places, along `seq`; `none` fills up what does not divide."""
    parts, me = jax.lax.axis_size('seq'), jax.lax.axis_index('seq')
    each = -(-places.shape[-1] // parts)
    padded = jnp.pad(places, ((0, 0), (0, 0), (0, each * parts - places.shape[-1])), constant_values=none)
    return jax.lax.dynamic_slice_in_dim(padded, me * each, each, axis=-1)


def _held(spec: PartitionSpec) -> PartitionSpec:
    """Where a kernel is while it is used: gathered over every axis but the two that split the experts' work."""
    return PartitionSpec(*(axes if axes in ('expert', 'tensor') else None for axes in spec))


def _local(x: Array, experts: Array, weights: Array, kernels: Kernels, compute: Compute) -> Float[Array, 'B T D']:
    chosen, experts, weights = experts.shape[-1], _by_rank(experts), _by_rank(weights)
    order, inverse = _sorting(experts)
    rows: Any = spread(x.reshape(-1, x.shape[-1]), order, inverse, chosen)
    sizes = _count(experts, _held_experts(kernels))
    out = compute(rows, permute(weights, order, inverse), sizes, kernels, experts.shape[0])
    sums: Any = collect(out, order, inverse, chosen)
    return sums.reshape(x.shape)


def _exchanged(
    x: Array, experts: Array, weights: Array, kernels: Kernels, compute: Compute, room: float
) -> tuple[Float[Array, 'B T D'], Float[Array, '']]:
    chosen, experts, weights = experts.shape[-1], _by_rank(experts), _by_rank(weights)
    peers, me, held = jax.lax.axis_size('expert'), jax.lax.axis_index('expert'), _held_experts(kernels)
    order, inverse = _sorting(experts)
    own = _count(experts, peers * held)
    counts = jax.lax.all_gather(own, 'expert').reshape(peers, peers, held)  # from a device to each expert of another
    size = peers * experts.shape[0]  # in the worst case every row of every peer comes here
    if room:
        size = min(size, math.ceil(room * experts.shape[0]))
        counts = _seated(counts, size)
    sent = counts.sum(axis=-1)
    starts = jax.lax.all_gather(jnp.cumsum(own) - own, 'expert').reshape(peers, peers, held)[..., 0]
    lands = jnp.cumsum(sent, axis=0) - sent
    chosen_rows: Any = spread(x.reshape(-1, x.shape[-1]), order, inverse, chosen)
    rows = exchange(chosen_rows, sent, starts, lands, size)
    shares = exchange(permute(weights, order, inverse)[:, None], sent, starts, lands, size)[:, 0]
    labels = jnp.tile(jnp.arange(held), peers)
    mine = jnp.concatenate([counts[:, me].reshape(-1), jnp.array([size])])
    labels = jnp.repeat(jnp.append(labels, held), mine, total_repeat_length=size)
    there, back = _sorting(labels)
    rows, shares, sizes = permute(rows, there, back), permute(shares, there, back), counts[:, me].sum(axis=0)
    out = compute(rows, shares, sizes, kernels, experts.shape[0])
    returned = exchange(permute(out, back, there), sent.T, lands.T, starts.T, experts.shape[0])
    sums: Any = collect(returned, order, inverse, chosen)
    return sums.reshape(x.shape), (own.sum() - counts[me].sum()).astype(jnp.float32)


def _seated(counts: Int[Array, 'P P E'], size: int) -> Int[Array, 'P P E']:
    """What of these finds room where every device takes `size` rows: its own first, then the next device's, and so on
    round, so that no device is everyone's last.
    """
    peers = jnp.arange(counts.shape[0])
    sender = (peers[:, None] + peers[None]) % counts.shape[0]  # [receiver, turn]
    queue = counts[sender, peers[:, None]].reshape(counts.shape[0], -1)
    before = jnp.cumsum(queue, axis=1) - queue
    seated = jnp.clip(size - before, 0, queue).reshape(counts.shape)
    return jnp.zeros_like(counts).at[sender, peers[:, None]].set(seated)


def _by_rank(choices: Array) -> Array:
    """[B, T, X] to [M]: all first choices, then all second ones, …

    Side by side, a token's few rows would fill a tile of a TPU's memory in part only.
    """
    return choices.reshape(-1, choices.shape[-1]).T.reshape(-1)


def exchange(
    rows: Float[Array, 'M D'],
    sent: Int[Array, 'P P'],
    starts: Int[Array, 'P P'],
    lands: Int[Array, 'P P'],
    size: int,
) -> Float[Array, 'size D']:
    """An all-to-all over `expert`: `sent[p, q]` rows go from p, where they begin at `starts`, to `lands` at q.

    A receiver's rows lie in the order of the senders. Places that nobody fills are zeros. On TPU XLA's ragged
    all-to-all; elsewhere, where that does not exist, everything is gathered and the right rows are picked.
    """
    layout = sharding.current()
    assert layout is not None
    me = jax.lax.axis_index('expert')
    if layout.platform == 'tpu':
        out = jnp.zeros((size, rows.shape[1]), rows.dtype)
        return jax.lax.ragged_all_to_all(rows, out, starts[me], sent[me], lands[me], sent[:, me], axis_name='expert')
    place = jnp.arange(size)
    ends = lands[:, me] + sent[:, me]
    sender = jnp.minimum(jnp.searchsorted(ends, place, side='right'), sent.shape[0] - 1)
    index = place - lands[sender, me]
    filled = (index >= 0) & (index < sent[sender, me])
    everyone = jax.lax.all_gather(rows, 'expert')
    return jnp.where(filled[:, None], everyone[sender, starts[sender, me] + index], 0)


def _held_experts(kernels: Kernels) -> int:
    return next(iter(kernels.values())).shape[0]


def _count(experts: Int[Array, ' M'], total: int) -> Int[Array, ' E']:
    return jnp.zeros(total, jnp.int32).at[experts].add(1, mode='drop')


def _sorting(keys: Int[Array, ' M']) -> tuple[Int[Array, ' M'], Int[Array, ' M']]:
    """The stable order that sorts the keys, and its inverse."""
    order = jnp.argsort(keys, stable=True)
    return order, jnp.zeros_like(order).at[order].set(jnp.arange(order.shape[0], dtype=order.dtype))


@jax.custom_vjp
def permute(rows: Array, order: Int[Array, ' M'], inverse: Int[Array, ' M']) -> Array:
    """rows[order]. Knowing the inverse, the backward pass is a gather too, not a scatter."""
    return _at(rows, order)


def _permute_forward(rows: Array, order: Array, inverse: Array) -> tuple[Array, tuple[Array, Array]]:
    return permute(rows, order, inverse), (order, inverse)


def _permute_backward(saved: tuple[Array, Array], d_rows: Array) -> tuple[Array, None, None]:
    order, inverse = saved
    return permute(d_rows, inverse, order), None, None


permute.defvjp(_permute_forward, _permute_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def spread(
    tokens: Float[Array, 'A D'], order: Int[Array, ' M'], inverse: Int[Array, ' M'], choices: int
) -> Float[Array, 'M D']:
    """The token of every choice, in `order`; M = A * choices, and choice m is of token m mod A. See `collect`."""
    return _at(tokens, order % (order.shape[0] // choices))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def collect(
    rows: Float[Array, 'M D'], order: Int[Array, ' M'], inverse: Int[Array, ' M'], choices: int
) -> Float[Array, 'A D']:
    """For every token the sum of its choices' rows, in float32. It is `spread`'s gradient, and `spread` its own."""
    # A TPU is many times faster at adding arrays than at a sum over an outer dim.
    summands = [_at(rows, places).astype(jnp.float32) for places in inverse.reshape(choices, -1)]
    return functools.reduce(jnp.add, summands).astype(rows.dtype)


def _spread_forward(tokens: Array, order: Array, inverse: Array, choices: int) -> tuple[Array, tuple[Array, Array]]:
    return spread(tokens, order, inverse, choices), (order, inverse)


def _spread_backward(choices: int, saved: tuple[Array, Array], d_rows: Array) -> tuple[Array, None, None]:
    return collect(d_rows, *saved, choices), None, None


def _collect_forward(rows: Array, order: Array, inverse: Array, choices: int) -> tuple[Array, tuple[Array, Array]]:
    return collect(rows, order, inverse, choices), (order, inverse)


def _collect_backward(choices: int, saved: tuple[Array, Array], d_sums: Array) -> tuple[Array, None, None]:
    return spread(d_sums, *saved, choices), None, None


spread.defvjp(_spread_forward, _spread_backward)
collect.defvjp(_collect_forward, _collect_backward)


def _at(rows: Array, places: Int[Array, ' M']) -> Array:
    return rows.at[places].get(mode='promise_in_bounds')
