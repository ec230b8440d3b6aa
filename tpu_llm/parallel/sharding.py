"""From dims to shardings: look a tensor up in a rule table, and mark activations while tracing."""

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

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
        dims = shared(dims, shape)
        spec = partition(table, dims)
        check_fits(spec, dims, shape, self.mesh, name)
        return NamedSharding(self.mesh, spec)

    def spec(self, dims: str, table: Table | None = None) -> PartitionSpec:
        """Where a tensor of these dims lies; by default an activation."""
        return partition(self.rules.activations if table is None else table, dims)

    @property
    def decoding(self) -> 'Layout':
        """The layout while tokens are drawn."""
        return dataclasses.replace(self, rules=dataclasses.replace(self.rules, activations=self.rules.decoding))

    @property
    def platform(self) -> str:
        return self.mesh.devices.flat[0].platform

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


def shared(dims: str, shape: Sequence[int]) -> str:
    """A single key-value head is everyone's: `DKH` of K = 1 is `D1H`, and no rule splits it."""
    return dims.replace('K', '1') if 'K' in dims and shape[dims.index('K')] == 1 else dims


# The config's names for the dims of a model's parameters; of experts, F is moe.expert_width.
_FIELDS = {'D': 'width', 'N': 'heads', 'K': 'kv_heads', 'H': 'head_dim', 'F': 'mlp_width', 'E': 'moe.experts'}


def check_fits(spec: PartitionSpec, dims: str, shape: Sequence[int], mesh: jax.sharding.Mesh, name: str) -> None:
    """Raises ConfigError if a mesh axis serves two dims, or a dim is not divided by its axes."""
    assert len(dims) == len(shape), f'{name}: dims {dims!r} for shape {tuple(shape)}'
    seen: dict[str, str] = {}
    for letter, size, axes in zip(dims, shape, spec, strict=True):
        names = axis_names(axes)
        for axis in names:
            if axis in seen:
                raise ConfigError(
                    f'{name} ({dims}): mesh axis {axis!r} would split both {seen[axis]} and {letter}; '
                    'change one of the two in the rule table'
                )
            seen[axis] = letter
        parts = math.prod(mesh.shape[axis] for axis in names)
        if size % parts:
            field = 'moe.expert_width' if letter == 'F' and 'E' in dims else _FIELDS.get(letter)
            which = f'config.model.{field}' if field else letter
            raise ConfigError(
                f'{name} ({dims}): {letter} = {size} is not divisible by {" x ".join(names)} = {parts}; '
                f'make {which} a multiple of {parts} or the mesh axis a divisor of {size}'
            )


def axis_names(axes: Axes) -> tuple[str, ...]:
    """The mesh axes that split one dim."""
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
    traced = jax.sharding.get_abstract_mesh()
    dims = shared(dims, x.shape)
    spec = PartitionSpec(*(_keep(axes, set(traced.manual_axes)) for axes in layout.spec(dims, table)))
    check_fits(spec, dims, x.shape, layout.mesh, 'an activation')
    # Inside a shard_map the mesh is the one that knows which axes are manual.
    mesh = traced if traced.manual_axes else layout.mesh
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def manual(
    body: Callable[..., Any], layout: Layout, *, in_specs: Any, out_specs: Any, axes: Sequence[str] = ()
) -> Callable[..., Any]:
    """`jax.shard_map` of `body` over `axes`, by default all; what is manual already is dropped from the specs."""
    traced = jax.sharding.get_abstract_mesh()
    taken = set(traced.manual_axes)

    def free(spec: PartitionSpec) -> PartitionSpec:
        return PartitionSpec(*(_keep(axes, taken) for axes in spec))

    in_specs, out_specs = jax.tree.map(free, (in_specs, out_specs), is_leaf=lambda s: isinstance(s, PartitionSpec))
    return jax.shard_map(
        body,
        mesh=traced if taken else layout.mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=frozenset(axes or layout.mesh.axis_names) - taken,
        check_vma=False,
    )


def _keep(axes: Axes, manual: set[str]) -> Axes:
    kept = tuple(axis for axis in axis_names(axes) if axis not in manual)
    return kept if len(kept) > 1 else kept[0] if kept else None
