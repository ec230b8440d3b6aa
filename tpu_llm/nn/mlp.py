"""The feed-forward half of a block."""

from collections.abc import Callable
from typing import Literal

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from tpu_llm.arrays import Array, Float
from tpu_llm.nn.einsum import Einsum, project
from tpu_llm.nn.param import Init
from tpu_llm.parallel.sharding import constrain

MLPKind = Literal['swiglu', 'geglu', 'geglu_exact', 'reglu', 'gelu', 'gelu_exact', 'relu']

GATED: tuple[MLPKind, ...] = ('swiglu', 'geglu', 'geglu_exact', 'reglu')


def _gelu_tanh(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=True)


def _gelu_erf(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=False)


ACTIVATIONS: dict[MLPKind, Callable[[Array], Array]] = {
    'swiglu': jax.nn.silu,
    'geglu': _gelu_tanh,
    'geglu_exact': _gelu_erf,
    'reglu': jax.nn.relu,
    'gelu': _gelu_tanh,
    'gelu_exact': _gelu_erf,
    'relu': jax.nn.relu,
}


class MLP(nnx.Module):
    """down(act(up(x))), or with a gate down(act(gate(x)) * up(x)) (GLU variants: Shazeer, 2020, arXiv 2002.05202)."""

    def __init__(self, kind: MLPKind, width: int, hidden: int, *, bias: bool, out_init: Init):
        self.kind: MLPKind = kind
        sizes = {'D': width, 'F': hidden}
        self.gate = Einsum('BTD,DF->BTF', sizes, bias=bias) if kind in GATED else None
        self.up = Einsum('BTD,DF->BTF', sizes, bias=bias)
        self.down = Einsum('BTF,FD->BTD', sizes, bias=bias, init=out_init)

    @jax.named_scope('mlp')
    def __call__(self, x: Float[Array, 'B T D']) -> Float[Array, 'B T D']:
        act = ACTIVATIONS[self.kind]
        if self.gate is None:
            hidden = act(checkpoint_name(constrain(self.up(x), 'BTF'), 'up'))
        else:
            gate, up = project(x, (self.gate, self.up))
            gate = checkpoint_name(constrain(gate, 'BTF'), 'gate')
            up = checkpoint_name(constrain(up, 'BTF'), 'up')
            hidden = act(gate) * up
        return self.down(hidden)
