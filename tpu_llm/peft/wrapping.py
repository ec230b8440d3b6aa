"""Finding linear maps by name, putting wrappers in their place, and declaring parameters beside theirs."""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tpu_llm.arrays import Array
from tpu_llm.config import ConfigError
from tpu_llm.nn.einsum import Einsum
from tpu_llm.nn.param import Init, draw, named_params, padding_size, param
from tpu_llm.quant.convert import QuantizedEinsum

_GROUP = re.compile(r'^(.*?)stack\.(?:prefix|period|suffix)\.\d+\.')


class Kind:
    """A way to fine-tune few parameters; its config is a dataclass."""

    __slots__ = ()

    def hold(self, model: nnx.Module) -> None:
        """Changes, in place, how the base is held: what `wrap` does first, and all that a frozen base is made by."""

    def wrap(self, model: nnx.Module) -> None:
        """Changes `model` in place. What is added has shapes only; what is there may have values or not."""
        raise NotImplementedError

    def trains(self, path: str) -> bool:
        """Whether a run changes the parameter at a path."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """A module, and where its model keeps it."""

    parent: nnx.Module
    attribute: str
    path: str  # 'stack.period.0.attention.query'
    module: Any

    @property
    def name(self) -> str:
        """'attention.query', whichever layer of whichever stack."""
        return unlayered(self.path)

    def put(self, module: nnx.Module) -> None:
        setattr(self.parent, self.attribute, module)


def unlayered(path: str) -> str:
    """A path without where in its stack a layer is kept."""
    return _GROUP.sub(r'\1', path)


def places(model: nnx.Module, kind: type[nnx.Module]) -> Iterator[Place]:
    """Modules of a type in a model, each where it stands."""
    for above, parent in list(nnx.iter_modules(model)):
        for attribute, child in list(vars(parent).items()):
            if isinstance(child, kind):
                yield Place(parent, attribute, '.'.join(map(str, (*above, attribute))), child)


def matches(name: str, targets: Sequence[str]) -> str | None:
    """The first target that a name is, or that its last parts are; targets are regular expressions."""
    return next((each for each in targets if re.fullmatch(rf'(?:.*\.)?(?:{each})', name)), None)


def chosen(model: nnx.Module, targets: Sequence[str]) -> list[Place]:
    """The linear maps that targets name. Raises ConfigError for a target that names none."""
    maps = list(places(model, Einsum))
    for target in targets:
        if not any(matches(place.name, [target]) for place in maps):
            there = ', '.join(dict.fromkeys(place.name for place in maps))
            raise ConfigError(f'targets: no linear map is {target!r}; there are {there}')
    return [place for place in maps if matches(place.name, targets)]


def unwrapped(place: Place) -> Einsum:
    """The map there. Raises ConfigError where something is around it already, which a second wrapper would lose."""
    if type(place.module) not in (Einsum, QuantizedEinsum):
        raise ConfigError(f'{place.path} has an adapter already; merge it, or take it out with `bare`')
    return place.module


def check_targets(targets: Sequence[str], field: str = 'targets') -> None:
    """Raises ConfigError for what is no regular expression, or where there is none."""
    if not targets:
        raise ConfigError(f"{field} is empty; name linear maps, as in ('query', 'value')")
    for target in targets:
        try:
            re.compile(target)
        except re.error as error:
            raise ConfigError(f'{field}: {target!r} is no regular expression: {error}') from None


@functools.cache
def mixed(around: type[nnx.Module], kind: type[nnx.Module]) -> type[nnx.Module]:
    """A class of modules that does what `around` says before what `kind` does: a wrapper that moves no parameter."""
    metaclass: Any = type(kind)
    return metaclass(f'{around.__name__}{kind.__name__}', (around, kind), {'__module__': around.__module__})


# ------------------------------------------------------------------------------------------------- parameters


@dataclasses.dataclass(frozen=True, slots=True)
class Sizes:
    """The letters of a linear map: what its kernel shares with its input, sums over, and gives."""

    inputs: str
    output: str
    shared: str  # in input, kernel and output: experts
    summed: str
    kept: str
    of: Mapping[str, int]

    def shape(self, dims: str) -> tuple[int, ...]:
        return tuple(self.of[letter] for letter in dims)


def sizes(einsum: Einsum) -> Sizes:
    inputs, output = einsum.spec.split('->')
    inputs, dims = inputs.split(',')
    kernel = einsum.kernel.shape
    return Sizes(
        inputs=inputs,
        output=output,
        shared=''.join(d for d in dims if d in inputs and d in output),
        summed=''.join(d for d in dims if d not in output),
        kept=''.join(d for d in dims if d in output and d not in inputs),
        of=dict(zip(dims, kernel[-len(dims) :], strict=True)),
    )


def beside(einsum: nnx.Module, dims: str, shape: tuple[int, ...], init: Init, *, summed: str = '') -> nnx.Variable:
    """A declared parameter that is stacked as those of a module are."""
    _, leaf = next(named_params(einsum))
    layers, stacked = leaf.get_metadata('layers'), leaf.get_metadata('dims').startswith('L')
    made = param(dims, shape, init, summed=summed, added=True)
    if stacked:
        value = jax.ShapeDtypeStruct((len(layers), *shape), jnp.float32)
        return made.replace(value, layers=layers, dims=f'L{dims}')
    return made.replace(made.get_value(), layers=layers)


def is_stacked(module: nnx.Module) -> bool:
    """Whether it stands for the module of several layers at once."""
    _, leaf = next(named_params(module))
    return leaf.get_metadata('dims').startswith('L') and leaf.ndim == len(leaf.get_metadata('dims'))


def each_layer(module: Any, made: Callable[[Any], Any]) -> Any:
    """What a function makes of a module, or of every layer of a stacked one, stacked."""
    if not is_stacked(module):
        return made(module)
    graph, state = nnx.split(module)
    return jax.vmap(lambda state: made(nnx.merge(graph, state)))(state)


def draw_added(model: nnx.Module, seed: int) -> None:
    """Draws, in place, what of a model with weights has none yet: what was wrapped around it."""
    missing = {path: leaf for path, leaf in named_params(model) if isinstance(leaf.get_value(), jax.ShapeDtypeStruct)}
    put(model, draw(missing, seed))


def put(model: nnx.Module, values: Mapping[str, Array]) -> None:
    """Parameters at these paths get these values, in place."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    changed = [
        (path, leaf.replace(values[name])) for path, leaf in flat if (name := '.'.join(map(str, path))) in values
    ]
    nnx.update(model, nnx.from_flat_state(changed))


def count_trained(model: nnx.Module, kind: Kind) -> int:
    """How many numbers a run of that kind changes."""
    return sum(leaf.size - padding_size(leaf) for path, leaf in named_params(model) if kind.trains(path))
