"""Mamba-2: heads of a state space with one decay each, so that most of it is matmuls (Dao and Gu, 2024, 2405.21060).

Each of P heads has a state of H x M numbers, h ← exp(Δ·A)·h + Δ·x Bᵀ and y = h C + D·x, where Δ and A are one number a
head and the vectors B and C [M] are shared by the heads of a group, of which there are O. Within a chunk of a row
that is attention without a softmax, C Bᵀ weighed by how much is left from then to now; between chunks goes the state.
The names are those of `nn/mamba.py`.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from tpu_llm.arrays import Array, Bool, Float, Int
from tpu_llm.config import ConfigError, machine
from tpu_llm.nn.cache import StateCache, placed
from tpu_llm.nn.context import Context
from tpu_llm.nn.einsum import Einsum, project
from tpu_llm.nn.param import Constant, Init, param
from tpu_llm.nn.ssm import Conv, LogEven, Steps, check_sizes, chunked, look_back
from tpu_llm.parallel.sharding import constrain


@dataclasses.dataclass(kw_only=True, slots=True)
class Mamba2:
    """Sizes of a layer."""

    state: int = 128  # M, for each number of a head
    conv: int = 4  # W, tokens that the convolution sees
    expand: int = 2  # numbers of all heads, of the width
    head_dim: int = 64  # H
    groups: int = 1  # O, heads of one group write and read alike
    chunk: int = machine(128)  # tokens that are multiplied at once

    def validate(self) -> None:
        check_sizes(self, ('state', 'conv', 'expand', 'head_dim', 'groups', 'chunk'))

    def sizes(self, width: int) -> dict[str, int]:
        """Of the letters of its parameters. Raises ConfigError where heads or groups do not come out even."""
        heads, rest = divmod(self.expand * width, self.head_dim)
        if rest or heads % self.groups:
            raise ConfigError(
                f'ssm.head_dim = {self.head_dim} and groups = {self.groups} do not divide expand x width = '
                f'{self.expand * width} into heads and those into groups; make them divisors'
            )
        return {'D': width, 'P': heads, 'H': self.head_dim, 'O': self.groups, 'M': self.state, 'W': self.conv}

    def maps(self, width: int) -> int:
        """Entries of the matrices that a token meets."""
        s = self.sizes(width)
        return width * (3 * s['P'] * s['H'] + 2 * s['O'] * s['M'] + s['P'])

    def cached(self, width: int) -> tuple[int, tuple[tuple[int, ...], ...], tuple[int, ...]]:
        """What is kept of a row: of how many tokens the inputs of convolutions, their shapes, and that of the state."""
        heads, groups = (self.sizes(width)['P'], self.head_dim), (self.groups, self.state)
        return self.conv - 1, (heads, groups, groups), (*heads, self.state)


class Mamba2Layer(nnx.Module):
    """The mixer of a block."""

    def __init__(self, config: Mamba2, width: int, *, eps: float, out_init: Init):
        sizes = config.sizes(width)
        heads, groups = (sizes['P'], sizes['H']), (sizes['O'], sizes['M'])
        self.gate = Einsum('BTD,DPH->BTPH', sizes)
        self.input = Einsum('BTD,DPH->BTPH', sizes)
        self.write = Einsum('BTD,DOM->BTOM', sizes)
        self.read = Einsum('BTD,DOM->BTOM', sizes)
        self.step = Einsum('BTD,DP->BTP', sizes)
        self.input_conv = Conv('PH', heads, config.conv)
        self.write_conv = Conv('OM', groups, config.conv)
        self.read_conv = Conv('OM', groups, config.conv)
        self.step_bias = param('P', heads[:1], Steps())
        self.log_decay = param('P', heads[:1], LogEven())
        self.skip = param('P', heads[:1], Constant(1.0))
        self.scale = param('PH', heads, Constant(1.0))
        self.out = Einsum('BTPH,PHD->BTD', sizes, init=out_init)
        self.width, self.chunk, self.groups, self.eps = config.conv, config.chunk, config.groups, eps

    @jax.named_scope('ssm')
    def __call__(
        self,
        x: Float[Array, 'B T D'],
        context: Context,
        layer: Int[Array, ''] | int = 0,
        cache: StateCache | None = None,
    ) -> tuple[Float[Array, 'B T D'], StateCache | None]:
        del layer
        past = look_back(context.segments, self.width, cache)
        gate, *made, step = project(x, (self.gate, self.input, self.write, self.read, self.step))
        made[0], gate = constrain(made[0], 'BTPH'), constrain(gate, 'BTPH')
        held = cache.inputs if cache else [None] * 3
        convs = (self.input_conv, self.write_conv, self.read_conv)
        seen, write, read = (
            conv(past.taps(each, before)).astype(jnp.float32)
            for conv, each, before in zip(convs, made, held, strict=True)
        )
        step = jax.nn.softplus(step.astype(jnp.float32) + self.step_bias[...][None, None])
        step = constrain(jnp.where(past.real[..., None], step, 0.0), 'BTP')
        seen = constrain(seen, 'BTPH')
        decay = -jnp.exp(self.log_decay[...])
        start = jnp.zeros((x.shape[0], *seen.shape[2:], write.shape[-1]), jnp.float32) if cache is None else cache.state
        y, state = chunk_scan(seen, step, decay, write, read, past.carries, start, self.chunk)
        y = y + seen * self.skip[...][None, None, :, None]
        if cache is not None:
            kept = (past.keep(each, before) for each, before in zip(made, cache.inputs, strict=True))
            cache = StateCache(
                inputs=tuple(placed(each, dims) for each, dims in zip(kept, ('BWPH', 'BWOM', 'BWOM'), strict=True)),
                segments=past.keep(context.segments, cache.segments),
                state=placed(state, 'BPHM'),
            )
        return self.out(constrain(self._norm(y, gate).astype(x.dtype), 'BTPH')), cache

    def _norm(self, y: Float[Array, 'B T P H'], gate: Float[Array, 'B T P H']) -> Float[Array, 'B T P H']:
        """An RMSNorm of each group of heads, behind the gate."""
        y = y * jax.nn.silu(gate.astype(jnp.float32))
        grouped = y.reshape(*y.shape[:2], self.groups, -1)
        grouped = grouped * jax.lax.rsqrt(jnp.mean(grouped * grouped, axis=-1, keepdims=True) + self.eps)
        return grouped.reshape(y.shape) * self.scale[...][None, None]


def chunk_scan(
    x: Float[Array, 'B T P H'],
    step: Float[Array, 'B T P'],
    decay: Float[Array, ' P'],
    write: Float[Array, 'B T O M'],
    read: Float[Array, 'B T O M'],
    carries: Bool[Array, 'B T'],
    state: Float[Array, 'B P H M'],
    chunk: int,
) -> tuple[Float[Array, 'B T P H'], Float[Array, 'B P H M']]:
    """y_t = h_t read_t and the last h, of h_t = exp(step_t · decay) · h_{t-1} + step_t · x_t write_tᵀ, float32.

    Without `carries` h_{t-1} counts as 0. G stands for the heads of a group, P = O x G.
    """
    groups = write.shape[2]

    def by_group(x: Array) -> Array:
        return x.reshape(*x.shape[:2], groups, -1, *x.shape[3:])

    def body(state: Array, rows: tuple[Array, ...]) -> tuple[Array, Array]:
        x, logs, write, read, carries = rows
        logs = jnp.cumsum(logs, axis=1)
        document = jnp.cumsum(~carries, axis=1)  # how many have begun in this chunk
        steps = jnp.arange(x.shape[1])
        visible = (document[:, :, None] == document[:, None, :]) & (steps[:, None] >= steps[None, :])[None]
        left = logs[:, :, None] - logs[:, None, :]  # [B, T, S, O, G]
        left = jnp.exp(jnp.where(visible[..., None, None], left, -jnp.inf))
        scores = jnp.einsum('BTOM,BSOM->BTSO', read, write)
        y = jnp.einsum('BTSOG,BSOGH->BTOGH', scores[..., None] * left, x)
        entered = jnp.exp(logs) * (document == 0)[..., None, None]
        y = y + jnp.einsum('BTOM,BOGHM->BTOGH', read, state) * entered[..., None]
        state = state * entered[:, -1][..., None, None]
        return state + jnp.einsum('BSOGH,BSOM->BOGHM', x * left[:, -1][..., None], write), y

    rows = (by_group(x * step[..., None]), by_group(step * decay[None, None]), write, read)
    grouped = state.reshape(state.shape[0], groups, -1, *state.shape[2:])
    last, y = chunked(body, grouped, rows, carries, chunk)
    return y.reshape(x.shape), last.reshape(state.shape)
