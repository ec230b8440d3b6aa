"""Splash attention to some of the keys: the TPU kernel as a part of a ring, with the contract of `blockwise`.

JAX's kernel takes what it works on as data: a table of blocks, and a number for each query by which a block's mask is
computed. So one compiled kernel serves every hop: table and numbers are computed from where the keys lie.

Positions are places in the row here (`by_place`), which give a segment's tokens the same distances. A device's keys lie
in the order of their row, in two pieces without gaps, so those that a query sees lie side by side, whatever pieces they
are of: from one index to another.

A visit's results are rounded to the dtype of its inputs before they are merged and summed, which is done in float32.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

from tpu_llm.arrays import Array, Bool, Float, Int
from tpu_llm.kernels import blockwise, device
from tpu_llm.kernels.blockwise import UNSEEN, Options
from tpu_llm.kernels.mask import Mask
from tpu_llm.kernels.splash import KEYS
from tpu_llm.parallel import sequence


def by_place(mask: Mask) -> Mask:
    """The mask of a device's own tokens in zig-zag order, their places for positions; called where `seq` is manual."""
    peers, piece = jax.lax.axis_size('seq'), mask.query_positions.shape[1] // 2
    held = jnp.asarray(sequence.pieces(peers)).reshape(peers, 2)[jax.lax.axis_index('seq')]
    places = (held[:, None] * piece + jnp.arange(piece)[None]).reshape(1, -1)
    places = jnp.broadcast_to(places, mask.query_positions.shape)
    return dataclasses.replace(mask, query_positions=places, key_positions=places)


def forward(
    query: Float[Array, 'B N T H'],
    key: Float[Array, 'B K S H'],
    value: Float[Array, 'B K S H'],
    mask: Mask,
    options: Options,
) -> tuple[Float[Array, 'B N T H'], Float[Array, 'B N T']]:
    """The attended values, and the log of the sum of exp(score) in float32: UNSEEN where nothing is seen.

    Queries are scaled already. What is attended where nothing is seen is not a number, or any.
    """
    kernel = splash.SplashAttentionKernel(
        _tables(mask, options, queries_stay=True),
        None,
        None,
        block_sizes=splash.BlockSizes(block_q=options.block, block_kv=options.block),
        save_residuals=True,
        residual_checkpoint_name=None,
        **_kind(mask, options),
    )
    out, (log_sum,) = jax.vmap(kernel)(query, key, value, _segments(mask))
    # A query that sees no key of its blocks has about the score of what is masked, and one without a block has -inf.
    return out, jnp.where(log_sum > splash.DEFAULT_MASK_VALUE / 2, log_sum, UNSEEN)


def backward(
    query: Float[Array, 'B N T H'],
    key: Float[Array, 'B K S H'],
    value: Float[Array, 'B K S H'],
    mask: Mask,
    log_sum: Float[Array, 'B N T'],
    delta: Float[Array, 'B N T'],
    d_out: Float[Array, 'B N T H'],
    options: Options,
) -> tuple[Float[Array, 'B N T H'], Float[Array, 'B K S H'], Float[Array, 'B K S H']]:
    """What these keys add to the gradient of the queries, and the gradients of keys and values.

    `log_sum` and `delta`, the sum of out * d_out over H, are those over all the keys that the queries see. The library
    has no public name for a backward pass whose log-sums are given.
    """
    block = options.block
    layout = splash.QKVLayout.HEAD_DIM_MINOR
    shared = _kind(mask, options) | {'q_layout': layout, 'k_layout': layout, 'v_layout': layout}
    per_key, per_query = _tables(mask, options, queries_stay=False), _tables(mask, options, queries_stay=True)

    def row(*inputs: Any) -> tuple[Array, Array, Array]:
        q, k, v, segments, *rest = inputs
        args = q, k, v, segments, None, *rest
        sizes = {'bq': block, 'bkv': block}
        _, d_key, d_value = splash._splash_attention_bwd_dkv(
            *args, mask_info=per_key, bkv_compute=block, use_fused_bwd_kernel=False, **sizes, **shared
        )
        d_query = splash._splash_attention_bwd_dq(*args, mask_info=per_query, **sizes, **shared)
        return d_query, d_key, d_value

    return jax.vmap(row)(query, key, value, _segments(mask), log_sum, d_out, delta)


def _segments(mask: Mask) -> splash.SegmentIds:
    return splash.SegmentIds(mask.query_segments, mask.key_segments)


def _kind(mask: Mask, options: Options) -> dict[str, Any]:
    """What all three kernels are told."""
    return {
        'is_mqa': False,
        'mask_value': splash.DEFAULT_MASK_VALUE,
        'mask_function': _between if mask.window else _up_to if mask.causal else None,
        'attn_logits_soft_cap': options.softcap or None,
        'interpret': not device.on_tpu(),
    }


# ------------------------------------------------------------------------------------------------ what is seen


def _tables(mask: Mask, options: Options, *, queries_stay: bool) -> MaskInfo:
    """Which blocks to work on, which to fetch meanwhile, and each query's number."""
    seen = blockwise.visible(mask, options)
    following = _following(seen) if queries_stay else _following(seen.T).T
    numbers: Any = _numbers(mask)
    return MaskInfo(
        data_next=following[None],
        mask_next=None,
        block_mask=seen[None].astype(jnp.int32),
        partial_mask_blocks=None,
        q_sequence=numbers,
    )


def _following(seen: Bool[Array, 'rows columns']) -> Int[Array, 'rows columns']:
    """The column of each block or, of one that is skipped, of the next that is not: nothing else is fetched."""
    places = jnp.arange(seen.size)
    places = jax.lax.cummin(jnp.where(seen.reshape(-1), places, seen.size), reverse=True)
    return (jnp.where(places < seen.size, places, places[0]) % seen.shape[1]).reshape(seen.shape)


def _numbers(mask: Mask) -> Int[Array, ' T'] | None:
    """Where the keys that a query sees end and, with a window, where they begin."""
    if not (mask.causal or mask.window):
        return None
    own, piece = mask.query_positions[0], mask.key_positions.shape[1] // 2
    firsts = mask.key_positions[0, ::piece]

    def before(places: Array) -> Array:
        """How many keys lie before these places."""
        return jnp.clip(places[:, None] - firsts[None], 0, piece).sum(axis=1)

    ends = before(own + (1 if mask.causal else mask.window))
    # The sign bit counts among the 32: what overflows is right again when shifted back.
    return before(own - mask.window + 1) * KEYS + ends if mask.window else ends


def _up_to(numbers: Array, keys: Array) -> Array:
    """Of indices of keys, asked by the kernel block by block."""
    return keys < numbers


def _between(numbers: Array, keys: Array) -> Array:
    return (keys >= jax.lax.shift_right_logical(numbers, 16)) & (keys < (numbers & (KEYS - 1)))
