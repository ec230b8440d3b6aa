"""Mamba: a state space whose step, input and output are chosen by the token (Gu and Dao, 2023, arXiv 2312.00752).

Each of P channels has a state of M numbers, h ← exp(Δ·A)·h + Δ·B·x and y = C·h + D·x, with the step Δ [P] and the
vectors B and C [M] made from the token. What the paper calls A, B, C, D and Δ is here -exp(log_decay), write, read,
skip and step.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from tpu_llm.arrays import Array, Bool, Float, Int
from tpu_llm.config import machine
from tpu_llm.nn.cache import StateCache, placed
from tpu_llm.nn.context import Context
from tpu_llm.nn.einsum import Einsum, project
from tpu_llm.nn.norm import RMSNorm
from tpu_llm.nn.param import Constant, Init, param
from tpu_llm.nn.ssm import Conv, LogCount, Steps, check_sizes, chunked, look_back
from tpu_llm.parallel.sharding import constrain


@dataclasses.dataclass(kw_only=True, slots=True)
class Mamba:
    """Sizes of a layer."""

    state: int = 16  # M, of a channel
    conv: int = 4  # W, tokens that the convolution sees
    expand: int = 2  # channels P, of the width
    rank: int = 0  # R, what the steps are made from; 0: a 16th of the width, rounded up
    norms: bool = False  # of what step, write and read are made as (Jamba)
    chunk: int = machine(32)  # tokens that are scanned at once

    def validate(self) -> None:
        check_sizes(self, ('state', 'conv', 'expand', 'chunk'))
        if self.rank < 0:
            check_sizes(self, ('rank',))

    def sizes(self, width: int) -> dict[str, int]:
        """Of the letters of its parameters."""
        rank = self.rank or -(-width // 16)
        return {'D': width, 'P': self.expand * width, 'M': self.state, 'R': rank, 'W': self.conv}

    def maps(self, width: int) -> int:
        """Entries of the matrices that a token meets."""
        s = self.sizes(width)
        return s['P'] * (3 * width + 2 * s['R'] + 2 * s['M'])

    def cached(self, width: int) -> tuple[int, tuple[tuple[int, ...], ...], tuple[int, ...]]:
        """What is kept of a row: of how many tokens the inputs of convolutions, their shapes, and that of the state."""
        channels = self.sizes(width)['P']
        return self.conv - 1, ((channels,),), (channels, self.state)


class MambaLayer(nnx.Module):
    """The mixer of a block."""

    def __init__(self, config: Mamba, width: int, *, eps: float, out_init: Init):
        sizes = config.sizes(width)
        channels, state, rank = sizes['P'], sizes['M'], sizes['R']
        self.input = Einsum('BTD,DP->BTP', sizes)
        self.gate = Einsum('BTD,DP->BTP', sizes)
        self.conv = Conv('P', (channels,), config.conv)
        self.step_down = Einsum('BTP,PR->BTR', sizes)
        self.write = Einsum('BTP,PM->BTM', sizes)
        self.read = Einsum('BTP,PM->BTM', sizes)
        self.step_norm = self.write_norm = self.read_norm = None
        if config.norms:
            self.step_norm = nnx.data(RMSNorm(rank, eps=eps, dim='R'))
            self.write_norm = nnx.data(RMSNorm(state, eps=eps, dim='M'))
            self.read_norm = nnx.data(RMSNorm(state, eps=eps, dim='M'))
        self.step = Einsum('BTR,RP->BTP', sizes)
        self.step_bias = param('P', (channels,), Steps())
        self.log_decay = param('PM', (channels, state), LogCount())
        self.skip = param('P', (channels,), Constant(1.0))
        self.out = Einsum('BTP,PD->BTD', sizes, init=out_init)
        self.width, self.chunk = config.conv, config.chunk

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
        inputs, gate = project(x, (self.input, self.gate))
        inputs, gate = constrain(inputs, 'BTP'), constrain(gate, 'BTP')
        seen = constrain(self.conv(past.taps(inputs, cache and cache.inputs[0])), 'BTP')
        step, write, read = self.step_down(seen), self.write(seen), self.read(seen)
        if self.step_norm is not None and self.write_norm is not None and self.read_norm is not None:
            step, write, read = self.step_norm(step), self.write_norm(write), self.read_norm(read)
        step = jax.nn.softplus(self.step(step).astype(jnp.float32) + self.step_bias[...][None, None])
        step = constrain(jnp.where(past.real[..., None], step, 0.0), 'BTP')
        seen, write, read = (each.astype(jnp.float32) for each in (seen, write, read))
        decay = -jnp.exp(self.log_decay[...])
        start = jnp.zeros((x.shape[0], *decay.shape), jnp.float32) if cache is None else cache.state
        y, state = selective_scan(seen, step, decay, write, read, past.carries, start, self.chunk)
        y = y + seen * self.skip[...][None, None]
        y = y.astype(x.dtype) * jax.nn.silu(gate)
        if cache is not None:
            cache = StateCache(
                inputs=(placed(past.keep(inputs, cache.inputs[0]), 'BWP'),),
                segments=past.keep(context.segments, cache.segments),
                state=placed(state, 'BPM'),
            )
        return self.out(constrain(y, 'BTP')), cache


def selective_scan(
    x: Float[Array, 'B T P'],
    step: Float[Array, 'B T P'],
    decay: Float[Array, 'P M'],
    write: Float[Array, 'B T M'],
    read: Float[Array, 'B T M'],
    carries: Bool[Array, 'B T'],
    state: Float[Array, 'B P M'],
    chunk: int,
) -> tuple[Float[Array, 'B T P'], Float[Array, 'B P M']]:
    """y_t = read_t · h_t and the last h, of h_t = exp(step_t · decay) · h_{t-1} + step_t · x_t · write_t, float32.

    Without `carries` h_{t-1} counts as 0. Within a chunk the T steps take log T passes, since two of them are one
    of the same kind; T x P x M numbers are there for one chunk only.
    """

    def body(state: Array, rows: tuple[Array, ...]) -> tuple[Array, Array]:
        x, step, write, read, carries = rows
        kept = jnp.exp(step[..., None] * decay[None, None]) * carries[..., None, None]
        added = (step * x)[..., None] * write[:, :, None, :]
        added = added.at[:, 0].add(kept[:, 0] * state)
        _, states = jax.lax.associative_scan(_after, (kept, added), axis=1)
        return states[:, -1], jnp.einsum('BTPM,BTM->BTP', states, read)

    state, y = chunked(body, state, (x, step, write, read), carries, chunk)
    return y, state


def _after(first: tuple[Array, Array], second: tuple[Array, Array]) -> tuple[Array, Array]:
    """Two steps as one."""
    return first[0] * second[0], second[0] * first[1] + second[1]
