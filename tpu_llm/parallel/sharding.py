"""From dims to shardings: look a tensor up in a rule table, and mark activations while tracing."""

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Iterator, Sequence

import jax
from jax.sharding import NamedSharding, PartitionSpec

from tpu_llm.arrays import Array
from tpu_llm.config import ConfigError
from tpu_llm.parallel.rules import Axes, Rules, Table


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """A mesh and the rules by which tensors lie on it."""

    mesh: jax.sharding.Mesh
    rules: Rules

    def named(self, table: Table, dims: str, shape: Sequence[int], name: str = 'tensor') -> NamedSharding:
        """The sharding of a tensor. Raises ConfigError where the mesh cannot hold it."""
        spec = partition(table, dims)
        check_fits(spec, dims, shape, self.mesh, name)
        return NamedSharding(self.mesh, spec)

    @property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())


def partition(table: Table, dims: str) -> PartitionSpec:
    """The longest match of `dims` in `table`: the whole tensor if it has a key, else letter by letter."""
    whole = dims if len(dims) > 1 else f' {dims}'
    if dims and whole in table:
        entry = table[whole]
        assert isinstance(entry, tuple), f'rule {whole!r}: a whole tensor has one entry a dim, not {entry!r}'
        return PartitionSpec(*entry)
    if len(dims) > 1 and dims[0] == 'L':
        return PartitionSpec(table.get('L'), *partition(table, dims[1:]))
    return PartitionSpec(*(table.get(letter) for letter in dims))


def check_fits(spec: PartitionSpec, dims: str, shape: Sequence[int], mesh: jax.sharding.Mesh, name: str) -> None:
    """Raises ConfigError if a mesh axis serves two dims, or a dim is not divided by its axes."""
    assert len(dims) == len(shape), f'{name}: dims {dims!r} for shape {tuple(shape)}'
    seen: dict[str, str] = {}
    for letter, size, axes in zip(dims, shape, spec, strict=True):
        names = _names(axes)
        for axis in names:
            if axis in seen:
                raise ConfigError(
                    f'{name} ({dims}): mesh axis {axis!r} would split both {seen[axis]} and {letter}; '
                    'change one of the two in the rule table'
                )
            seen[axis] = letter
        parts = math.prod(mesh.shape[axis] for axis in names)
        if size % parts:
            raise ConfigError(
                f'{name} ({dims}): {letter} = {size} is not divisible by {" x ".join(names)} = {parts}; '
                f'make {letter} a multiple of {parts} or the mesh axis a divisor of {size}'
            )


def _names(axes: Axes) -> tuple[str, ...]:
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)


# ------------------------------------------------------------------------------------- while a step is traced

_current: contextvars.ContextVar[Layout | None] = contextvars.ContextVar('layout', default=None)


@contextlib.contextmanager
def use(layout: Layout | None) -> Iterator[None]:
    """Within it, `constrain` places activations by `layout`."""
    token = _current.set(layout)
    try:
        yield
    finally:
        _current.reset(token)


def current() -> Layout | None:
    return _current.get()


def constrain(x: Array, dims: str, table: Table | None = None) -> Array:
    """Marks where an activation lies (`constrain(x, 'BTD')`); without a layout in use, `x` itself.

    Axes that are manual where this is traced (inside a `shard_map`) are dropped: there the code says what is where.
    """
    layout = _current.get()
    if layout is None or layout.mesh.size == 1:
        return x
    spec = partition(layout.rules.activations if table is None else table, dims)
    traced = jax.sharding.get_abstract_mesh()
    spec = PartitionSpec(*(_keep(axes, set(traced.manual_axes)) for axes in spec))
    check_fits(spec, dims, x.shape, layout.mesh, 'an activation')
    # Inside a shard_map the mesh is the one that knows which axes are manual.
    mesh = traced if traced.manual_axes else layout.mesh
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def _keep(axes: Axes, manual: set[str]) -> Axes:
    kept = tuple(axis for axis in _names(axes) if axis not in manual)
    return kept if len(kept) > 1 else kept[0] if kept else None
