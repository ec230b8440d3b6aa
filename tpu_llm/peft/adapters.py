"""Bottleneck adapters: h + up(act(down(h))) behind attention and MLP (Houlsby et al., 2019, arXiv 1902.00751).

`targets=('mlp.down',)` is the placement of Pfeiffer et al. (2020, arXiv 2005.00247): behind the MLP alone. Where
Houlsby et al. start near the identity, `up` is zero here, which is at it.
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx

from tpu_llm.arrays import Array, Float
from tpu_llm.config import ConfigError
from tpu_llm.nn.einsum import Einsum, add_trailing
from tpu_llm.nn.mlp import ACTIVATIONS, MLPKind
from tpu_llm.nn.param import Constant, Normal
from tpu_llm.peft.wrapping import Kind, beside, check_targets, chosen, sizes, unwrapped
from tpu_llm.quant.formats import product


@dataclasses.dataclass(kw_only=True, slots=True)
class Adapters(Kind):
    """A bottleneck behind each of the maps back to the stream that `targets` name."""

    rank: int = 16
    activation: MLPKind = 'gelu'
    targets: tuple[str, ...] = ('attention.out', 'mlp.down')

    def validate(self) -> None:
        check_targets(self.targets)
        if self.rank < 1:
            raise ConfigError(f'rank = {self.rank} must be at least 1')

    def wrap(self, model: nnx.Module) -> None:
        """Raises ConfigError for a target that names no map, or one whose output is not the stream."""
        for place in chosen(model, self.targets):
            place.put(AdaptedEinsum(unwrapped(place), self, place.name))

    def trains(self, path: str) -> bool:
        return path.rpartition('.')[2].startswith('adapter_')


class AdaptedEinsum(Einsum):
    """An `Einsum` with a bottleneck behind it."""

    def __init__(self, of: Einsum, config: Adapters, name: str):
        if not of.spec.endswith('->BTD'):
            raise ConfigError(f'targets: {name} ({of.spec}) does not give back to the stream; name attention.out')
        width, rank = sizes(of).of['D'], config.rank
        self.spec, self.kernel, self.bias = of.spec, of.kernel, of.bias
        self.adapter_down = beside(of, 'DR', (width, rank), Normal(width**-0.5), summed='D')
        self.adapter_down_bias = beside(of, 'R', (rank,), Constant(0.0))
        self.adapter_up = beside(of, 'RD', (rank, width), Constant(0.0), summed='R')
        self.adapter_up_bias = beside(of, 'D', (width,), Constant(0.0))
        self.activation: MLPKind = config.activation

    def __call__(self, x: Float[Array, '...']) -> Float[Array, 'B T D']:
        y = self.add_bias(product(self.spec, x, self.kernel))
        inner = jnp.einsum('BTD,DR->BTR', y, self.adapter_down[...].astype(y.dtype))
        inner = ACTIVATIONS[self.activation](add_trailing(inner, self.adapter_down_bias[...]))
        outer = jnp.einsum('BTR,RD->BTD', inner, self.adapter_up[...].astype(y.dtype))
        return y + add_trailing(outer, self.adapter_up_bias[...])
