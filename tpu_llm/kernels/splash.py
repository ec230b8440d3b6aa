"""Attention as the TPU kernel that JAX ships: splash attention (FlashAttention: Dao et al., 2022, arXiv 2205.14135).

Blocks that a causal mask or a window hides from all their queries are neither read nor computed, and keys and values
are never repeated for the query heads that share them.

The kernel knows a token by its place in the row, not by its position, so rows must be in natural order. Then a
segment's tokens lie side by side, their positions count on as their places do, and both give the same distances; those
between segments do not matter. Rows in zig-zag order are for `kernels/splash_part.py`, which calls the same kernel
piece by piece, and keys that are a cache for the other implementations.
"""

import functools
from typing import Any

import jax
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from tpu_llm.arrays import Array, Float
from tpu_llm.config import ConfigError
from tpu_llm.kernels import device
from tpu_llm.kernels.mask import Mask

LANES = 128  # rows are cut into multiples of it
BLOCK = 1024  # the longest side of a block of scores
BLOCKS = 256  # at most so many of them a row
KEYS = 2**16  # in a ring two indices of keys share 32 bits where there is a window


def attend(
    query: Float[Array, 'B T N H'],
    key: Float[Array, 'B S K H'],
    value: Float[Array, 'B S K U'],
    mask: Mask,
    scale: float,
    softcap: float,
) -> Float[Array, 'B T N U']:
    """Attention within whole rows in natural order; off TPU, the same kernel interpreted.

    Called where every mesh axis is manual: a compiler does not split a kernel. Raises ConfigError where it cannot hold.
    """
    if why := refusal(query, key, mask.window):
        raise ConfigError(f"attention = 'splash' {why}; set attention to 'auto'")
    length, heads = query.shape[1:3]
    block = block_size(query, mask.window)
    kernel = _kernel(length, heads, mask.causal, mask.window, softcap, block, not device.on_tpu())
    # Saved under these names as the kernel reads them: the backward pass would have to transpose them again.
    q = checkpoint_name((query * scale).astype(query.dtype).transpose(0, 2, 1, 3), 'query')
    k = checkpoint_name(key.transpose(0, 2, 1, 3), 'key')
    v = checkpoint_name(value.transpose(0, 2, 1, 3), 'value')
    segments = splash.SegmentIds(mask.query_segments, mask.key_segments)
    out: Any = jax.vmap(kernel)(q, k, v, segments)
    return out.transpose(0, 2, 1, 3)


def refusal(
    query: Float[Array, 'B T N H'], key: Float[Array, 'B S K H'], window: int, *, ring: bool = False
) -> str | None:
    """Why the kernel cannot join these queries to these keys, or None.

    In a ring they are one device's, and the keys may be another's: two pieces of a row each.
    """
    length, keys = query.shape[1], key.shape[1]
    if length != keys:
        return f'joins a row to itself, and not {length} queries to the {keys} keys of a cache'
    if ring and length % (2 * LANES):
        return f'needs pieces of a multiple of {LANES} tokens, two a device, and these have {length / 2:g}'
    if length % LANES:
        return f'needs rows of a multiple of {LANES} tokens, and these have {length}'
    if ring and window and length >= KEYS:
        return f'finds a window in less than {KEYS} tokens a device, and here are {length}'
    # Its table of blocks lies in 1 MiB of scalar memory.
    if length > BLOCKS * (block := block_size(query, window, ring=ring)):
        return (
            f'cuts a row into at most {BLOCKS} blocks, and one of {length} tokens would be {length // block} of {block}'
        )
    return None


def block_size(query: Float[Array, 'B T N H'], window: int, *, ring: bool = False) -> int:
    """The side of the blocks of scores on the device that is traced for.

    The kernel works on all of a block in which it sees anything: blocks of a quarter of a causal row execute 1.25 times
    what is needed, and smaller ones than 512 would lose as much between them. The largest that the compiler takes,
    forward and backward, are of 1024, for heads of 64 to 256 in bfloat16 or 128 in float32, on v5e, v5p, v6e and tpu7x;
    of 2048, the gradient of the queries does not fit. v4 has 16 MiB for a kernel: heads of over 256 bytes need 512.

    In a ring most blocks are seen whole, so that without a window only their number matters.
    """
    length, head_bytes = query.shape[1] // (2 if ring else 1), query.shape[3] * query.dtype.itemsize
    most = 512 if device.traced_for().device_kind == 'TPU v4' and head_bytes > 256 else BLOCK
    seen = min(window or length, length)
    wanted = most if ring and not window else max(seen // 4, 512)
    wanted = min(wanted, most, length)
    return max(size for size in range(LANES, wanted + 1, LANES) if length % size == 0)


@functools.lru_cache(maxsize=32)
def _kernel(
    length: int, heads: int, causal: bool, window: int, softcap: float, block: int, interpret: bool
) -> splash.SplashAttentionKernel:
    sizes = splash.BlockSizes(
        **dict.fromkeys(('block_q', 'block_kv', 'block_q_dkv', 'block_kv_dkv', 'block_q_dq', 'block_kv_dq'), block)
    )
    behind = window - 1 if window else length
    band = _Band(length, behind, 0 if causal else behind)
    with jax.ensure_compile_time_eval():
        return splash.make_splash_mha(
            masks.MultiHeadMask([band] * heads),
            block_sizes=sizes,
            head_shards=1,
            q_seq_shards=1,
            attn_logits_soft_cap=softcap or None,
            # A policy that saves what has this name spares the backward pass a second forward pass.
            residual_checkpoint_name='attended',
            interpret=interpret,
        )


class _Band(masks.Mask):
    """A query sees the keys from `behind` places before it to `ahead` after it.

    The library asks a mask about a block only whether any and whether all of its pairs are seen, which two corners
    tell. Its own masks look at every pair, which takes seconds for a row of 32,768.
    """

    def __init__(self, length: int, behind: int, ahead: int):
        self.length, self.behind, self.ahead = length, behind, ahead
        self.q_sequence = np.arange(length, dtype=np.int32)

    @property
    def shape(self) -> tuple[int, int]:
        return self.length, self.length

    def __getitem__(self, block: tuple[slice, slice]) -> np.ndarray:
        queries, keys = block
        nearest, farthest = queries.start - (keys.stop - 1), queries.stop - 1 - keys.start
        some = nearest <= self.behind and farthest >= -self.ahead
        whole = nearest >= -self.ahead and farthest <= self.behind
        return np.array([some, whole])

    def mask_function(self, queries: Array, keys: Array) -> Array:
        """Which pairs are seen, asked by the kernel of the blocks in which only some are."""
        distance = queries - keys
        seen = distance >= -self.ahead
        return seen if self.behind >= self.length else seen & (distance <= self.behind)
