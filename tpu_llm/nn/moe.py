"""Experts in place of a block's MLP: a router, E expert MLPs of which each token visits X, and shared ones.

Three ways to bring tokens and experts together:
- dropless: rows sorted by expert are multiplied group by group, so every choice is served (MegaBlocks: Gale et al.,
  2022, arXiv 2211.15841);
- capacity: each row of the batch gives every expert C places, first choices first; a choice that finds none is dropped,
  and the token passes by on the residual stream (GShard: Lepikhin et al., 2020, arXiv 2006.16668);
- expert's choice: each expert takes the C tokens of a row that want it most (Zhou et al., 2022, arXiv 2202.09368).
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from tpu_llm.arrays import Array, Float, Int
from tpu_llm.config import ConfigError, machine
from tpu_llm.kernels.grouped_matmul import IMPLS, grouped_matmul
from tpu_llm.nn.context import Context, Routing
from tpu_llm.nn.einsum import Einsum
from tpu_llm.nn.mlp import ACTIVATIONS, GATED, MLP, MLPKind
from tpu_llm.nn.param import Init
from tpu_llm.nn.router import Router, RouterLayer
from tpu_llm.parallel import experts as parallel_experts


@dataclasses.dataclass(kw_only=True, slots=True)
class MoE:
    """The experts of a decoder."""

    experts: int
    chosen: int  # experts a token goes to
    expert_width: int  # hidden width of one expert
    shared: int = 0  # experts that every token goes to besides, as one MLP of shared * expert_width
    shared_gate: bool = False  # how much of theirs a token takes, a sigmoid decides (Qwen2-MoE)
    mlp: MLPKind | None = None  # of the experts; None: the decoder's
    router: Router = dataclasses.field(default_factory=Router)
    capacity: float = 0.0  # places an expert has over what an even load needs; 0: dropless
    first_dense: int = 0  # so many layers have a plain MLP first
    every: int = 1  # after them, one layer in so many has experts (the last of each group)
    # Rows that a device of the mesh's `expert` axis has room for, over its even share; 0: for all that may come.
    room: float = machine(0.0)
    grouped: str = machine('auto')  # of kernels.grouped_matmul, when dropless

    def validate(self) -> None:
        for name in ('experts', 'chosen', 'expert_width', 'every'):
            if getattr(self, name) < 1:
                raise ConfigError(f'moe.{name} is {getattr(self, name)}; it must be at least 1')
        for name in ('shared', 'first_dense', 'capacity', 'room'):
            if getattr(self, name) < 0:
                raise ConfigError(f'moe.{name} is {getattr(self, name)}; it must not be negative')
        if self.shared_gate and not self.shared:
            raise ConfigError('moe.shared_gate = True gates shared experts, and moe.shared = 0; set one of them')
        if self.chosen > self.experts:
            raise ConfigError(f'moe.chosen = {self.chosen} is more than the {self.experts} experts there are')
        if self.router.choice == 'expert_choice' and not self.capacity:
            raise ConfigError("router.choice = 'expert_choice' needs moe.capacity: how many tokens an expert takes")
        if 0 < self.room < 1:
            raise ConfigError(
                f'moe.room = {self.room} is less than an even load fills; write 1 or more, or 0 for no limit'
            )
        if self.room and self.capacity:
            raise ConfigError(
                f'moe.room = {self.room} bounds dropless experts, and moe.capacity = {self.capacity} gives each its '
                'places; leave one of them 0'
            )
        if self.grouped not in IMPLS:
            raise ConfigError(f'moe.grouped = {self.grouped!r}; there are {", ".join(IMPLS)}')
        self.router.check(self.experts, self.chosen)

    def at(self, layer: int) -> bool:
        """Whether that layer has experts."""
        return layer >= self.first_dense and (layer - self.first_dense) % self.every == self.every - 1


class Experts(nnx.Module):
    """E gated (or plain) MLPs without biases, their kernels stacked in E."""

    def __init__(self, kind: MLPKind, width: int, hidden: int, experts: int, *, out_init: Init):
        self.kind: MLPKind = kind
        sizes = {'D': width, 'F': hidden, 'E': experts}
        self.gate = Einsum('BECD,EDF->BECF', sizes) if kind in GATED else None
        self.up = Einsum('BECD,EDF->BECF', sizes)
        self.down = Einsum('BECF,EFD->BECD', sizes, init=out_init)

    def dropless(
        self,
        x: Float[Array, 'B T D'],
        experts: Int[Array, 'B T X'],
        weights: Float[Array, 'B T X'],
        impl: str,
        room: float,
    ) -> tuple[Float[Array, 'B T D'], Float[Array, ' B']]:
        """The weighted sum over each token's experts, however many of them chose the same one; and choices without
        room, spread over the rows.
        """

        def compute(
            rows: Array, weights: Array, sizes: Array, kernels: parallel_experts.Kernels, expected: int
        ) -> Array:
            def apply(rows: Array, name: str) -> Array:
                transposed = name == 'down'
                return grouped_matmul(rows, kernels[name], sizes, impl=impl, transposed=transposed, expected=expected)

            return self._mlp(apply, rows, weights)

        # Split over D like the others: a TPU kernel takes matrices as they lie, and gathering columns transposes.
        kernels, dims = self._kernels(x.dtype)
        kernels['down'], dims['down'] = kernels['down'].swapaxes(1, 2), 'EDF'
        return parallel_experts.dropless(x, experts, weights, kernels, dims, compute, room)

    def in_places(
        self, x: Float[Array, 'B T D'], seat: parallel_experts.Seat, wishes: tuple[Array, ...]
    ) -> tuple[Float[Array, 'B T D'], Float[Array, ' B']]:
        """The weighted sum over the places `seat(*wishes)` gives to tokens, and what it gave beside them."""

        def compute(taken: Array, kernels: parallel_experts.Kernels) -> Array:
            specs = {'gate': self.up.spec, 'up': self.up.spec, 'down': self.down.spec}
            return self._mlp(lambda rows, name: jnp.einsum(specs[name], rows, kernels[name]), taken)

        return parallel_experts.in_places(x, seat, wishes, *self._kernels(x.dtype), compute)

    def _mlp(self, apply: Callable[[Array, str], Array], rows: Array, weights: Array | None = None) -> Array:
        """Rows may be weighed: before `down`, whose result the backward pass then does without."""
        act, up = ACTIVATIONS[self.kind], checkpoint_name(apply(rows, 'up'), 'up')
        hidden = act(up) if self.gate is None else act(checkpoint_name(apply(rows, 'gate'), 'gate')) * up
        if weights is not None:
            hidden = (hidden * weights[:, None]).astype(rows.dtype)
        return apply(hidden, 'down')

    def _kernels(self, dtype: jnp.dtype) -> tuple[dict[str, Array], dict[str, str]]:
        """The kernels by name, and their dims."""
        maps = {'gate': self.gate, 'up': self.up, 'down': self.down}
        there = {name: each for name, each in maps.items() if each is not None}
        dims = {name: each.spec.split('->')[0].split(',')[1] for name, each in there.items()}
        return {name: each.weight().astype(dtype) for name, each in there.items()}, dims


class MoELayer(nnx.Module):
    """y = sum over the chosen experts of weight * expert(x), plus the shared experts, gated or whole."""

    def __init__(self, config: MoE, kind: MLPKind, width: int, *, out_init: Callable[[int], Init]):
        self.router = RouterLayer(config.router, width, config.experts, config.chosen)
        hidden, shared = config.expert_width, config.shared * config.expert_width
        self.experts = Experts(kind, width, hidden, config.experts, out_init=out_init(hidden))
        self.shared = MLP(kind, width, shared, bias=False, out_init=out_init(shared)) if shared else None
        gated = config.shared_gate
        self.shared_gate = nnx.data(Einsum('BTD,DY->BTY', {'D': width, 'Y': 1})) if gated else None
        self.capacity = config.capacity
        self.room = config.room
        self.impl = config.grouped

    @jax.named_scope('experts')
    def __call__(
        self, x: Float[Array, 'B T D'], context: Context, layer: Int[Array, ''] | int
    ) -> tuple[Float[Array, 'B T D'], Routing]:
        if self.router.choice == 'expert_choice':
            y, routing = self._experts_choose(x, context, layer)
        else:
            y, routing = self._tokens_choose(x, context, layer)
        return y if self.shared is None else y + self._shared(self.shared, x), routing

    def _shared(self, experts: MLP, x: Array) -> Float[Array, 'B T D']:
        return experts(x) if self.shared_gate is None else jax.nn.sigmoid(self.shared_gate(x)) * experts(x)

    def _tokens_choose(
        self, x: Array, context: Context, layer: Int[Array, ''] | int
    ) -> tuple[Float[Array, 'B T D'], Routing]:
        choice, real = self.router(x, context, layer), context.real
        # Padding is nobody's.
        experts = jnp.where(real[..., None], choice.experts, self.router.experts)
        if self.capacity:
            seat = functools.partial(seat_choices, experts=self.router.experts, places=self._places(x.shape[1]))
            y, missed = self.experts.in_places(x, seat, (experts, choice.weights))
        else:
            y, missed = self.experts.dropless(x, experts, choice.weights, self.impl, self.room)
        dropped = missed.sum() / jnp.maximum(real.sum() * self.router.chosen, 1)
        return y, self.router.routing(choice, real, dropped)

    def _experts_choose(
        self, x: Array, context: Context, layer: Int[Array, ''] | int
    ) -> tuple[Float[Array, 'B T D'], Routing]:
        if context.cache is not None:
            raise ValueError("router.choice = 'expert_choice' looks at whole rows and cannot decode token by token")
        real, logits = context.real, self.router.logits(x, context, layer)
        probabilities = jax.nn.softmax(logits)
        seat = functools.partial(seat_favourites, places=min(self._places(x.shape[1]), x.shape[1]))
        y, missed = self.experts.in_places(x, seat, (jnp.where(real[..., None], probabilities, 0.0),))
        # Every expert has its places full, so the load is even by construction.
        even = jnp.full_like(probabilities, 1 / self.router.experts)
        dropped = missed.sum() / jnp.maximum(real.sum(), 1)
        return y, self.router.statistics(even, logits, probabilities, real, dropped)

    def _places(self, length: int) -> int:
        """C: the places an expert has for one row."""
        return max(1, math.ceil(self.capacity * length * self.router.chosen / self.router.experts))


Seated = tuple[Int[Array, 'B E C'], Float[Array, 'B E C'], Float[Array, ' B']]


def seat_choices(chosen: Int[Array, 'B T X'], weights: Float[Array, 'B T X'], *, experts: int, places: int) -> Seated:
    """Seats tokens with the experts they chose: which token has each place (T: none), its weight, and how many
    choices of a row found none. All first choices are seated before any second one, in the order of the row.
    """

    def row(chosen: Int[Array, 'T X'], weights: Float[Array, 'T X']) -> tuple[Array, Array, Array]:
        length, ranks = chosen.shape
        flat = chosen.T.reshape(-1)
        wanted = jax.nn.one_hot(flat, experts, dtype=jnp.int32)
        seat = ((jnp.cumsum(wanted, axis=0) - 1) * wanted).sum(axis=-1)
        seated = (flat < experts) & (seat < places)
        place = jnp.where(seated, flat * places + seat, experts * places)
        tokens = jnp.tile(jnp.arange(length), ranks)
        slots = jnp.full(experts * places, length).at[place].set(tokens, mode='drop')
        shares = jnp.zeros(experts * places).at[place].set(weights.T.reshape(-1), mode='drop')
        missed = wanted.sum() - seated.sum()
        return slots.reshape(experts, places), shares.reshape(experts, places), missed.astype(jnp.float32)

    return jax.vmap(row)(chosen, weights)


def seat_favourites(wanted: Float[Array, 'B T E'], *, places: int) -> Seated:
    """Seats with each expert the tokens it wants most; counts the real tokens (wanted at all) that nobody took."""

    def row(wanted: Float[Array, 'T E']) -> tuple[Array, Array, Array]:
        weights, slots = jax.lax.top_k(wanted.T, places)
        slots = jnp.where(weights > 0, slots, wanted.shape[0])
        taken = jnp.zeros(wanted.shape[0], bool).at[slots.reshape(-1)].set(True, mode='drop')
        missed = ((wanted.sum(axis=-1) > 0) & ~taken).sum()
        return slots, weights, missed.astype(jnp.float32)

    return jax.vmap(row)(wanted)
