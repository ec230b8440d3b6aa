"""Adapters that a kernel can take up: merged, a model costs what it did without them; unmerged, it is as before."""

from typing import Any

from flax import nnx

from tpu_llm.arrays import Array, Float
from tpu_llm.config import ConfigError
from tpu_llm.nn.einsum import Einsum
from tpu_llm.peft.wrapping import places
from tpu_llm.quant.convert import plain
from tpu_llm.quant.formats import Matrix


class Mergeable(Einsum):
    """A wrapped map; `kernel` is the base's, a parameter or codes."""

    kernel: Any
    merged: bool

    def take_up(self) -> None:
        """Changes the kernel to what adapter and kernel are together, in place."""
        raise NotImplementedError

    def give_back(self) -> None:
        """And back."""
        raise NotImplementedError


def spread(factor: Float[Array, '...'], dims: str, over: str) -> Float[Array, '...']:
    """A number for each of some dims, so that it multiplies what has the dims `over`."""
    sizes = iter(factor.shape)
    return factor.reshape([next(sizes) if letter in dims else 1 for letter in over])


def adapted(model: nnx.Module) -> list[Mergeable]:
    return [place.module for place in places(model, Mergeable)]


def merge(model: nnx.Module) -> None:
    """Puts adapters into the kernels, in place; a kernel held in codes becomes float32. What is merged stays so.

    Raises ConfigError for a model that has none.
    """
    for each in _some(model):
        if not each.merged:
            each.take_up()
            each.merged = True


def unmerge(model: nnx.Module) -> None:
    """Takes them out again. Raises ConfigError for a model that has none."""
    for each in _some(model):
        if each.merged:
            each.give_back()
            each.merged = False


def bare(model: nnx.Module) -> None:
    """Takes the wrappers away, in place: what is left is the model, with what was merged."""
    for place in list(places(model, Mergeable)):
        place.put(plain(place.module, _parameter(place.module.kernel)))


def _some(model: nnx.Module) -> list[Mergeable]:
    found = adapted(model)
    if not found:
        raise ConfigError('the model has no adapter that its kernels could take up; LoRA and IA3 have')
    return found


def replaced(held: nnx.Variable | Matrix, value: Float[Array, '...']) -> nnx.Variable:
    """The parameter with another value, in its dtype."""
    leaf = _parameter(held)
    return leaf.replace(value.astype(leaf.dtype))


def _parameter(held: Any) -> Any:
    return held.parameter() if isinstance(held, Matrix) else held
