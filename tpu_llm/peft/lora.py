"""Low-rank adapters: y = x W + scale (x A) B, and only A and B train (LoRA: Hu et al., 2021, arXiv 2106.09685).

B starts at zero, so a wrapped model says at first what the model says. The scale is alpha / R, or alpha / sqrt(R) where
it is to stay useful at high ranks (rsLoRA: Kalajdzievski, 2023, arXiv 2312.03732). DoRA (Liu et al., 2024,
arXiv 2402.09353) splits the adapted weight in direction and magnitude and learns the latter by itself.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from tpu_llm.arrays import Array, Float
from tpu_llm.config import ConfigError
from tpu_llm.nn.einsum import Einsum
from tpu_llm.nn.param import Constant, Normal, named_params
from tpu_llm.peft import rows
from tpu_llm.peft.merging import Mergeable, replaced, spread
from tpu_llm.peft.wrapping import (
    Kind,
    beside,
    check_targets,
    chosen,
    each_layer,
    is_stacked,
    matches,
    places,
    sizes,
    unwrapped,
)
from tpu_llm.quant.convert import quantize
from tpu_llm.quant.formats import Format, product


@dataclasses.dataclass(kw_only=True, slots=True)
class LoRA(Kind):
    """Which linear maps are adapted, and how."""

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ('query', 'value')  # names of maps, their last parts, or regular expressions of them
    rank_by: dict[str, int] = dataclasses.field(default_factory=dict)  # another rank, by target; the first that fits
    dropout: float = 0.0  # of the adapters' input
    rslora: bool = False
    dora: bool = False

    def validate(self) -> None:
        check_targets(self.targets)
        for target, rank in {'rank': self.rank, **self.rank_by}.items():
            if rank < 1:
                raise ConfigError(f'{target} = {rank} must be at least 1')
        if self.alpha <= 0:
            raise ConfigError(f'alpha = {self.alpha} must be more than 0')
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f'dropout is {self.dropout}; write a number from 0 to below 1')

    def wrap(self, model: nnx.Module) -> None:
        """Adapts the maps that `targets` name, in place. Raises ConfigError for a target that names none."""
        self.hold(model)
        for target in self.rank_by:
            chosen(model, [target])
        for place in chosen(model, self.targets):
            place.put(LoraEinsum(unwrapped(place), self, place.name))
        if self.dropout:
            rows.tell_blocks(model)

    def trains(self, path: str) -> bool:
        return path.rpartition('.')[2].startswith('lora_')

    def rank_of(self, name: str) -> int:
        target = matches(name, list(self.rank_by))
        return self.rank if target is None else self.rank_by[target]

    def scale_of(self, rank: int) -> float:
        return self.alpha / (rank**0.5 if self.rslora else rank)


@dataclasses.dataclass(kw_only=True, slots=True)
class QLoRA(LoRA):
    """The same around a model whose matrices and embeddings are held in 4 or 8 bits (arXiv 2305.14314)."""

    base: Format = 'nf4'

    def hold(self, model: nnx.Module) -> None:
        quantize(model, self.base)


class LoraEinsum(Mergeable):
    """An `Einsum` with A and B beside its kernel, which may be held in codes."""

    def __init__(self, of: Einsum, config: LoRA, name: str):
        has, rank = sizes(of), config.rank_of(name)
        letter = 'R' if 'R' not in of.spec else 'r'
        # As wide as the uniform distribution up to 1 / sqrt(fan-in) that the authors' code draws from.
        init = Normal((3 * math.prod(has.shape(has.summed))) ** -0.5)
        down, up = f'{has.shared}{has.summed}{letter}', f'{has.shared}{letter}{has.kept}'
        every = {**has.of, letter: rank}

        def shape(dims: str) -> tuple[int, ...]:
            return tuple(every[dim] for dim in dims)

        lead = ''.join(each for each in has.inputs if each not in has.summed)
        self.spec, self.kernel, self.bias = of.spec, of.kernel, of.bias
        self.down_spec = f'{has.inputs},{down}->{lead}{letter}'
        self.up_spec = f'{lead}{letter},{up}->{has.output}'
        self.delta_spec = f'{down},{up}->{of.spec.split("->")[0].split(",")[1]}'
        self.lora_down = beside(of, down, shape(down), init, summed=has.summed)
        self.lora_up = beside(of, up, shape(up), Constant(0.0), summed=letter)
        self.summed_dims = tuple(i for i, dim in enumerate(self.delta_spec.split('->')[1]) if dim in has.summed)
        kept = has.shared + has.kept
        # What the magnitude is more than that of the kernel: at 0 it needs no look at the kernel.
        self.lora_magnitude = beside(of, kept, has.shape(kept), Constant(0.0)) if config.dora else None
        self.scale = config.scale_of(rank)
        self.dropout = config.dropout
        self.name = name
        self.adapters = 0  # how many there are at once, if rows choose
        self.merged = False
        self.kept = kept
        self.factor: nnx.Variable | None = nnx.data(None)  # of a merged DoRA: what merging multiplied by

    def __call__(self, x: Float[Array, '...']) -> Float[Array, '...']:
        y = product(self.spec, x, self.kernel)
        if not self.merged:
            y = y + self._branch(rows.dropped(x, self.dropout, f'lora.{self.name}'))
            if self.lora_magnitude is not None:
                y = y * spread(self.turn().astype(y.dtype), self.kept, self.spec.split('->')[1])
        return self.add_bias(y)

    def _branch(self, x: Float[Array, '...']) -> Float[Array, '...']:
        down, up = self.lora_down[...].astype(x.dtype), self.lora_up[...].astype(x.dtype)
        if not self.adapters:
            return self.scale * jnp.einsum(self.up_spec, jnp.einsum(self.down_spec, x, down), up)
        index = rows.choice(x.shape[0], f'{self.name} has {self.adapters} adapters')
        down = down[index]
        up = jnp.where((index < 0).reshape(-1, *[1] * (up.ndim - 1)), 0, up[index])
        down_spec, up_spec = (spec.replace(',', ',B') for spec in (self.down_spec, self.up_spec))
        return self.scale * jnp.einsum(up_spec, jnp.einsum(down_spec, x, down), up)

    def weight(self) -> Float[Array, '...']:
        """W + scale A B, turned to its magnitude if it has one."""
        assert not self.adapters, f'{self.name}: several adapters have no one weight'
        kernel = self.kernel[...].astype(jnp.float32)
        if self.merged:
            return kernel
        return (kernel + self.delta()) * self._spread(self.turn())

    def delta(self) -> Float[Array, '...']:
        return self.scale * jnp.einsum(self.delta_spec, self.lora_down[...], self.lora_up[...])

    def turn(self) -> Float[Array, '...']:
        """What outputs are multiplied by: magnitude over norm of the adapted weight; 1 without DoRA.

        No gradient goes through that norm (DoRA, section 4.3).
        """
        if self.lora_magnitude is None:
            return jnp.ones(())
        adapted = _norm(self.kernel[...].astype(jnp.float32) + self.delta(), self.summed_dims)
        return (self.kernel_norm() + self.lora_magnitude[...]) / jax.lax.stop_gradient(adapted)

    def kernel_norm(self) -> Float[Array, '...']:
        """Of the base's kernel, for each output."""
        return _norm(self.kernel[...].astype(jnp.float32), self.summed_dims)

    def _spread(self, factor: Float[Array, '...']) -> Float[Array, '...']:
        return jnp.expand_dims(factor, self.summed_dims) if factor.ndim else factor

    def take_up(self) -> None:
        if self.lora_magnitude is not None:
            self.factor = nnx.data(self.lora_magnitude.replace(each_layer(self, LoraEinsum.turn)))
        self.kernel = replaced(self.kernel, each_layer(self, LoraEinsum.weight))

    def give_back(self) -> None:
        def before(one: LoraEinsum) -> Float[Array, '...']:
            kernel = one.kernel[...].astype(jnp.float32)
            return (kernel if one.factor is None else kernel / one._spread(one.factor[...])) - one.delta()

        self.kernel, self.factor = replaced(self.kernel, each_layer(self, before)), nnx.data(None)


def _norm(x: Float[Array, '...'], over: tuple[int, ...]) -> Float[Array, '...']:
    return jnp.sqrt(jnp.maximum(jnp.sum(x * x, axis=over), jnp.finfo(jnp.float32).tiny))


def hold_several(model: nnx.Module, adapters: Sequence[Mapping[str, Array]]) -> None:
    """Gives a wrapped model several adapters at once, in place, each by the paths of what it trained; every row of a
    batch then has its own (`rows.choose`).

    Raises ConfigError for DoRA, whose rows would each need a weight of their own.
    """
    for place in list(places(model, LoraEinsum)):
        each, axis = place.module, int(is_stacked(place.module))
        if each.lora_magnitude is not None:
            raise ConfigError(f'{place.path} has a magnitude (DoRA), and rows cannot choose one; merge the adapter')
        for name in ('lora_down', 'lora_up'):
            leaf: nnx.Param = getattr(each, name)
            dims = leaf.get_metadata('dims')
            values = jnp.stack([adapter[f'{place.path}.{name}'] for adapter in adapters], axis)
            setattr(each, name, leaf.replace(values, dims=f'{dims[:axis]}A{dims[axis:]}'))
        each.adapters = len(adapters)


def adapter(model: nnx.Module) -> dict[str, Array]:
    """What the adapters of a model hold, by path."""
    kept = LoRA()
    return {path: leaf.get_value() for path, leaf in named_params(model) if kept.trains(path)}
