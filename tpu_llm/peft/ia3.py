"""IA3: one learned number for every key, value and hidden unit, and nothing else (Liu et al., 2022, arXiv 2205.05638).

All of them start at 1, where a wrapped model says what the model says.
"""

import dataclasses

from flax import nnx

from tpu_llm.arrays import Array, Float
from tpu_llm.nn.einsum import Einsum
from tpu_llm.nn.param import Constant
from tpu_llm.peft.merging import Mergeable, replaced, spread
from tpu_llm.peft.wrapping import Kind, beside, check_targets, chosen, each_layer, matches, sizes, unwrapped
from tpu_llm.quant.formats import product


@dataclasses.dataclass(kw_only=True, slots=True)
class IA3(Kind):
    """Which linear maps are scaled: what they give, or, of those in `inputs`, what they take."""

    targets: tuple[str, ...] = ('key', 'value', 'down')
    inputs: tuple[str, ...] = ('down',)

    def validate(self) -> None:
        check_targets(self.targets)
        check_targets(self.inputs, 'inputs')

    def wrap(self, model: nnx.Module) -> None:
        """Scales the maps that `targets` name, in place. Raises ConfigError for a target that names none."""
        for place in chosen(model, self.targets):
            place.put(ScaledEinsum(unwrapped(place), takes=matches(place.name, self.inputs) is not None))

    def trains(self, path: str) -> bool:
        return path.endswith('.ia3_scale')


class ScaledEinsum(Mergeable):
    """An `Einsum` whose input, or whose output with its bias, is multiplied by a vector."""

    def __init__(self, of: Einsum, *, takes: bool):
        has = sizes(of)
        self.spec, self.kernel, self.bias = of.spec, of.kernel, of.bias
        self.takes = takes
        self.scaled = has.shared + (has.summed if takes else has.kept)
        self.ia3_scale = beside(of, self.scaled, has.shape(self.scaled), Constant(1.0))
        self.merged = False

    def __call__(self, x: Float[Array, '...']) -> Float[Array, '...']:
        inputs, output = self.spec.split(',')[0], self.spec.split('->')[1]
        if not self.merged and self.takes:
            x = x * spread(self.ia3_scale[...].astype(x.dtype), self.scaled, inputs)
        y = self.add_bias(product(self.spec, x, self.kernel))
        if not self.merged and not self.takes:
            y = y * spread(self.ia3_scale[...].astype(y.dtype), self.scaled, output)
        return y

    def weight(self) -> Float[Array, '...']:
        return self.kernel[...] if self.merged else self.kernel[...] * self._along()

    def take_up(self) -> None:
        self.kernel = replaced(self.kernel, each_layer(self, ScaledEinsum.weight))
        if self.bias is not None and not self.takes:
            self.bias = replaced(self.bias, self.bias[...] * self.ia3_scale[...])

    def give_back(self) -> None:
        self.kernel = replaced(self.kernel, each_layer(self, lambda one: one.kernel[...] / one._along()))
        if self.bias is not None and not self.takes:
            self.bias = replaced(self.bias, self.bias[...] / self.ia3_scale[...])

    def _along(self) -> Float[Array, '...']:
        """The scale, so that it multiplies the kernel."""
        return spread(self.ia3_scale[...], self.scaled, self.spec.split('->')[0].split(',')[1])
