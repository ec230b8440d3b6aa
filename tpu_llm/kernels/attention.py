"""Attention by name: the implementations on one device, and the ways to run them on rows that are split."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from tpu_llm.arrays import Array, Float, Key
from tpu_llm.config import ConfigError
from tpu_llm.kernels import device, reference, ring, splash_part
from tpu_llm.kernels import splash as kernel
from tpu_llm.kernels.blockwise import Options
from tpu_llm.kernels.mask import Mask
from tpu_llm.parallel import sequence as split
from tpu_llm.parallel import sharding

LONG = 2048  # from so many queries and keys on, whole scores (16 MiB a row and head) cost more than they save


@dataclasses.dataclass(frozen=True, slots=True)
class Dropped:
    """Dropout on the attention weights."""

    rate: float
    keys: Key[Array, ' B']  # one a row


def attention(
    query: Float[Array, 'B T N H'],
    key: Float[Array, 'B S K H'],
    value: Float[Array, 'B S K U'],
    mask: Mask,
    *,
    impl: str = 'auto',
    sequence: str | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    dropped: Dropped | None = None,
) -> Float[Array, 'B T N U']:
    """softmax(query · key * scale) · value over what `mask` allows; N is a multiple of K (GQA, Ainslie et al., 2023).
    Values may be narrower than keys: U <= H.

    scale defaults to 1/sqrt(H); softcap c > 0 turns scores s into c * tanh(s / c). The softmax is in float32, the
    result in the query's dtype. Where the layout in use splits rows, `sequence` names the way of `SEQUENCES` by which
    queries meet the keys of other devices; None where keys are not split (a cache). For a remat policy, query, key,
    value and what was attended have these names.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    layout = sharding.current()
    way = sequence if split.splits_rows() else None
    if impl == 'auto':
        impl = choose(query, key, mask, way, dropped is not None)
    if mask.prefix is not None:
        check_prefix(impl, way)
    if mask.biased:
        check_impl(impl, 0.0, mask.biased)
        check_sequence(way or 'gather', 'auto', mask.biased)
    if impl != 'splash' or way == 'ring':  # whole rows' kernel names them in the order in which it reads them
        query, key, value = (checkpoint_name(x, n) for x, n in ((query, 'query'), (key, 'key'), (value, 'value')))
    if layout is None or (way is None and impl != 'splash'):
        return IMPLS[impl](query, key, value, mask, scale, softcap, dropped)
    if way == 'gather' and impl != 'blockwise':
        if impl == 'splash':
            raise ConfigError(
                f"attention = 'splash' needs whole rows, and seq = {layout.mesh.shape['seq']} splits them; "
                "set sequence to 'ulysses', or attention to 'auto'"
            )
        # The compiler splits plain XLA by itself, down to the noise of dropout.
        key, value = sharding.constrain(key, 'BSKH'), sharding.constrain(value, 'BSKH')
        return IMPLS[impl](query, key, value, mask, scale, softcap, dropped)
    if dropped is not None:
        assert way is not None, 'splash attention has no dropout'
        raise ConfigError(
            f'dropout.attention = {dropped.rate} with sequence = {sequence!r} over seq = {layout.mesh.shape["seq"]} '
            "would not drop what one device drops; set it to 0, or sequence to 'gather'"
        )
    # Here, and not inside, sizes that the mesh does not divide are an error that says so.
    query, key, value = (sharding.constrain(x, dims) for x, dims in ((query, 'BTNH'), (key, 'BTKH'), (value, 'BTKH')))
    q, k, rows = layout.spec('BTNH'), layout.spec('BTKH'), layout.spec('BT')
    run = functools.partial(SEQUENCES[way] if way else _whole, impl=impl, scale=scale, softcap=softcap)
    return sharding.manual(run, layout, in_specs=(q, k, k, rows), out_specs=q)(query, key, value, mask)


def choose(
    query: Float[Array, 'B T N H'], key: Float[Array, 'B S K H'], mask: Mask, way: str | None, dropped: bool
) -> str:
    """What 'auto' stands for: the kernel on TPUs where it can hold; else whole scores, unless rows are long."""
    if dropped or mask.biased or mask.prefix is not None:
        return 'xla'
    in_ring = way == 'ring'
    layout = sharding.current()
    if in_ring and layout is not None:  # what one device has of them
        query, key = (x[:, : x.shape[1] // layout.mesh.shape['seq']] for x in (query, key))
    if way != 'gather' and device.on_tpu() and kernel.refusal(query, key, mask.window, ring=in_ring) is None:
        return 'splash'
    return 'blockwise' if in_ring or query.shape[1] * key.shape[1] >= LONG**2 else 'xla'


def xla(
    query: Float[Array, 'B T N H'],
    key: Float[Array, 'B S K H'],
    value: Float[Array, 'B S K U'],
    mask: Mask,
    scale: float,
    softcap: float,
    dropped: Dropped | None,
) -> Float[Array, 'B T N U']:
    """Plain XLA: keys and values are never repeated, and the softmax divides the output instead of the weights."""
    batch, length, heads, width = query.shape
    kv_heads = key.shape[2]
    # Heads outermost: the products then run over contiguous [T, H] planes.
    q = (query * scale).reshape(batch, length, kv_heads, heads // kv_heads, width).transpose(0, 2, 3, 1, 4)
    k, v = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)
    scores = jnp.einsum('BKGTH,BKSH->BKGTS', q, k, preferred_element_type=jnp.float32)
    if softcap:
        scores = softcap * jnp.tanh(scores / softcap)
    if mask.biased:
        scores = scores + mask.bias().reshape(-1, kv_heads, heads // kv_heads, *scores.shape[3:])
    scores = jnp.where(mask.allowed()[:, None, None], scores, jnp.finfo(jnp.float32).min)
    # The maximum only guards against overflow: its gradient is zero.
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    total = weights.sum(axis=-1, keepdims=True)
    if dropped is not None:
        kept = jax.vmap(lambda key: jax.random.bernoulli(key, 1.0 - dropped.rate, weights.shape[1:]))(dropped.keys)
        weights = jnp.where(kept, weights / (1.0 - dropped.rate), 0.0)
    out = jnp.einsum('BKGTS,BKSU->BKGTU', weights.astype(query.dtype), v, preferred_element_type=jnp.float32)
    out = checkpoint_name((out / total).astype(query.dtype), 'attended')
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, -1)


def plain(
    query: Float[Array, 'B T N H'],
    key: Float[Array, 'B S K H'],
    value: Float[Array, 'B S K U'],
    mask: Mask,
    scale: float,
    softcap: float,
    dropped: Dropped | None,
) -> Float[Array, 'B T N U']:
    """The oracle, as an implementation one may choose while debugging."""
    assert dropped is None, 'the reference has no dropout'
    bias = mask.bias() if mask.biased else None
    return reference.attention(query, key, value, mask.allowed(), scale, softcap, bias)


def blockwise(
    query: Float[Array, 'B T N H'],
    key: Float[Array, 'B S K H'],
    value: Float[Array, 'B S K U'],
    mask: Mask,
    scale: float,
    softcap: float,
    dropped: Dropped | None,
) -> Float[Array, 'B T N U']:
    """Never more than a block of scores, hidden blocks skipped: for rows too long for the others."""
    assert dropped is None, 'blockwise attention has no dropout'
    return ring.attend(query, key, value, mask, ring.PARTS['blockwise'], Options(scale=scale, softcap=softcap))


def splash(
    query: Float[Array, 'B T N H'],
    key: Float[Array, 'B S K H'],
    value: Float[Array, 'B S K U'],
    mask: Mask,
    scale: float,
    softcap: float,
    dropped: Dropped | None,
) -> Float[Array, 'B T N U']:
    """JAX's kernel for TPUs, of whole rows in natural order."""
    assert dropped is None, 'splash attention has no dropout'
    return kernel.attend(query, key, value, mask, scale, softcap)


IMPLS: dict[str, Callable[..., Array]] = {'xla': xla, 'blockwise': blockwise, 'splash': splash, 'reference': plain}


BIASED = ('xla', 'reference')  # those whose scores may depend on distance


def check_impl(impl: str, dropout: float, biased: str = '') -> None:
    """Raises ConfigError unless there is such an attention and it drops and adds to scores what it should.

    `biased` is the scheme of positions that adds to scores, if one does.
    """
    if impl not in ('auto', *IMPLS):
        raise ConfigError(f'attention = {impl!r}; there are auto, {", ".join(IMPLS)}')
    if dropout and impl not in ('auto', 'xla'):
        raise ConfigError(
            f'attention = {impl!r} drops nothing, but dropout.attention is {dropout}; set it to 0 or choose another '
            'attention'
        )
    if biased and impl not in ('auto', *BIASED):
        raise ConfigError(
            f'attention = {impl!r} adds nothing to scores, but position = {biased!r} asks for it; set attention to '
            f'{" or ".join(map(repr, ("auto", *BIASED)))}'
        )


def check_prefix(impl: str, way: str | None) -> None:
    """Raises ConfigError unless the implementation can let a prefix see all of itself."""
    if impl not in BIASED:
        raise ConfigError(
            f'attention = {impl!r} cannot let a prefix see all of itself; set attention to '
            f'{" or ".join(map(repr, ("auto", *BIASED)))}'
        )
    if way not in (None, 'gather'):
        raise ConfigError(f"sequence = {way!r} cannot let a prefix see all of itself; set sequence to 'gather'")


# ------------------------------------------------------------------------------------------------- rows that are split


def _whole(query: Array, key: Array, value: Array, mask: Mask, *, impl: str, scale: float, softcap: float) -> Array:
    return IMPLS[impl](query, key, value, mask, scale, softcap, None)


def _gather(query: Array, key: Array, value: Array, mask: Mask, *, impl: str, scale: float, softcap: float) -> Array:
    return split.gather(_local(mask, impl, scale, softcap), query, key, value, *_sides(mask))


def _ulysses(query: Array, key: Array, value: Array, mask: Mask, *, impl: str, scale: float, softcap: float) -> Array:
    return split.ulysses(_local(mask, impl, scale, softcap), query, key, value, *_sides(mask))


def _ring(query: Array, key: Array, value: Array, mask: Mask, *, impl: str, scale: float, softcap: float) -> Array:
    options = Options(scale=scale, softcap=softcap)
    if impl == 'splash':
        if why := kernel.refusal(query, key, mask.window, ring=True):
            raise ConfigError(f"attention = 'splash' {why}; set attention to 'auto'")
        options = dataclasses.replace(options, block=kernel.block_size(query, mask.window, ring=True))
        mask = splash_part.by_place(mask)
    return ring.attend(query, key, value, mask, ring.PARTS[impl], options, jax.lax.axis_size('seq'))


def _sides(mask: Mask) -> tuple[split.Rows, split.Rows]:
    return (mask.query_segments, mask.query_positions), (mask.key_segments, mask.key_positions)


def _local(mask: Mask, impl: str, scale: float, softcap: float) -> split.Attend:
    """One device's attention, of queries and keys whose segments and positions are given with them."""

    def attend(query: Array, key: Array, value: Array, queries: split.Rows, keys: split.Rows) -> Array:
        here = Mask(
            query_segments=queries[0],
            query_positions=queries[1],
            key_segments=keys[0],
            key_positions=keys[1],
            causal=mask.causal,
            window=mask.window,
        )
        return IMPLS[impl](query, key, value, here, scale, softcap, None)

    return attend


# The ways, called where `seq` is manual.
SEQUENCES: dict[str, Callable[..., Array]] = {'gather': _gather, 'ulysses': _ulysses, 'ring': _ring}


def check_sequence(sequence: str, impl: str, biased: str = '') -> None:
    """Raises ConfigError unless there is such a way, and the implementation and scores that are biased can go it."""
    if sequence not in SEQUENCES:
        raise ConfigError(f'sequence = {sequence!r}; there are {", ".join(SEQUENCES)}')
    if sequence == 'ring' and impl not in ('auto', *ring.PARTS):
        raise ConfigError(
            f"sequence = 'ring' joins attention to parts of a row, which attention = {impl!r} cannot; set attention to "
            f'{" or ".join(map(repr, ("auto", *ring.PARTS)))}'
        )
    if biased and sequence != 'gather':
        raise ConfigError(
            f'sequence = {sequence!r} adds nothing to scores, but position = {biased!r} asks for it; set sequence to '
            "'gather'"
        )


def in_zigzag(sequence: str, impl: str) -> bool:
    """Whether split rows are in zig-zag order: where hidden blocks are skipped and devices do not have whole rows."""
    return sequence == 'ring' or (sequence == 'gather' and impl == 'blockwise')
