"""Tensors of another library, by name: one table of rows, read forwards to load a model and backwards to save it.

A row names a tensor of theirs (`{i}` a layer, `{e}` an expert) and what of ours is in it, with the layout
(`checkpoint/layout.py`). Ours go by canonical names, `layers.3.attention.query.kernel`, whatever the stack's grouping.
Loading goes row by row and layer by layer straight into this host's shards: beside them it holds one tensor of theirs.
"""

import collections
import dataclasses
import difflib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tpu_llm.arrays import Array
from tpu_llm.checkpoint import layout
from tpu_llm.checkpoint.files import CheckpointError
from tpu_llm.checkpoint.layout import Part
from tpu_llm.nn.param import named_params

_GROUP = re.compile(r'\b(?:prefix|period|suffix)\.\d+\.')


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """`Row('h.{i}.attn.c_attn.weight', {'attention.query.kernel': 'D(+NH)', …})`; with {i}, ours are of that layer.

    A row is for tensors with its letters: one may take a map from D and another the same map from Q, whichever it is.
    """

    theirs: str
    ours: Mapping[str, str]
    added: float = 0.0  # what theirs is more than ours
    within: str = ''  # which of the model's stacks {i} counts the layers of: 'encoder.', 'decoder.'
    optional: bool = False  # a file may lack it; it is 0 then
    again: bool = False  # ours are those of another row: it holds the same once more, or is not there


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor of ours lies: in which parameter, and at which index of its leading dims (layer, expert)."""

    path: str
    index: tuple[int, ...]
    part: Part


@dataclasses.dataclass(frozen=True, slots=True)
class Bound:
    """One tensor of theirs and all of ours that it holds."""

    name: str
    places: tuple[Place, ...]
    added: float = 0.0
    optional: bool = False
    again: bool = False

    @property
    def parts(self) -> list[Part]:
        return [place.part for place in self.places]

    @property
    def shape(self) -> tuple[int, ...]:
        return layout.shape(self.parts)


def bind(rows: Sequence[Row], model: nnx.Module, *, sizes: Mapping[str, int], rotary: int) -> list[list[Bound]]:
    """For each row that this model has, its tensors. `sizes` are those of letters that a parameter's own dims lack.

    Every parameter of the model is covered by exactly one row, or an AssertionError names those that are not.
    """
    canonical = _canonical(model)
    bound, covered = [], set()
    for row in rows:
        group = []
        for name, names in _expand(row, canonical):
            places = []
            for (ours, theirs), inside in zip(row.ours.items(), names, strict=True):
                del ours
                path, index, dims, shape = inside
                every = {**sizes, **dict(zip(dims, shape, strict=True))}
                places.append(Place(path, index, Part(theirs, dims, every, rotary)))
                covered.add(path)
            group.append(Bound(name, tuple(places), row.added, row.optional, row.again))
        if group:
            bound.append(group)
    left = {path for path, _ in named_params(model)} - covered
    assert not left, f'no row names {sorted(left)}'
    return bound


def covers(rows: Sequence[Row], model: nnx.Module) -> bool:
    """Whether every parameter of the model has a row."""
    canonical = _canonical(model)
    try:
        found = {inside[0] for row in rows for _, names in _expand(row, canonical) for inside in names}
    except PartOfRow:
        return False
    return found >= {path for path, _ in named_params(model)}


class PartOfRow(AssertionError):
    """A model has some of what one tensor of theirs holds, not all of it."""


_Found = tuple[str, tuple[int, ...], str, tuple[int, ...]]  # path, index, dims and shape there


def _canonical(model: nnx.Module) -> dict[str, _Found]:
    """Every tensor of ours by canonical name, one a layer."""
    found: dict[str, _Found] = {}
    for path, leaf in named_params(model):
        dims, layers, padding = (leaf.get_metadata(key) for key in ('dims', 'layers', 'padding'))
        shape = tuple(size - padding * (letter == 'V') for letter, size in zip(dims, leaf.shape, strict=True))
        if not layers:
            found[path] = (path, (), dims, shape)
            continue
        before, _, after = path.partition('stack.')
        name = _GROUP.sub('', after, count=1)
        stacked = dims.startswith('L')
        for at, layer in enumerate(layers):
            where = (path, (at,), dims[1:], shape[1:]) if stacked else (path, (), dims, shape)
            if layer >= 0:
                found[f'{before}layers.{layer}.{name}'] = where
    return found


def _expand(row: Row, canonical: Mapping[str, _Found]) -> Iterator[tuple[str, list[_Found]]]:
    """The row for every layer and expert that the model has."""
    stack, layers = f'{row.within}layers.', {0}
    if '{i}' in row.theirs:
        layers = {int(name.removeprefix(stack).split('.')[0]) for name in canonical if name.startswith(stack)}
    for i in sorted(layers):
        lead = f'{stack}{i}.' if '{i}' in row.theirs else ''
        found = [canonical.get(lead + name) for name in row.ours]
        if not any(found):
            continue
        if not all(found):
            raise PartOfRow(f'layer {i} has a part of {list(row.ours)}')
        each = '{e}' in row.theirs
        if not all(layout.fits(theirs, f[2][each:]) for theirs, f in zip(row.ours.values(), found, strict=True) if f):
            continue
        if not each:
            yield row.theirs.format(i=i), [f for f in found if f]
            continue
        experts = found[0][3][0] if found[0] else 0
        for e in range(experts):
            yield row.theirs.format(i=i, e=e), [(f[0], (*f[1], e), f[2][1:], f[3][1:]) for f in found if f]


def check(bound: Sequence[Sequence[Bound]], theirs: Mapping[str, tuple[int, ...]], ignored: str, where: str) -> None:
    """Raises CheckpointError that lists all tensors that are missing, have no place here or another shape.

    `ignored` is a regular expression of names that hold nothing learned.
    """
    wanted = {each.name: each for each in itertools.chain.from_iterable(bound)}
    extra = [name for name in theirs if name not in wanted and not re.fullmatch(ignored, name)]
    missing = [name for name, each in wanted.items() if name not in theirs and not (each.optional or each.again)]
    misshapen = [
        f'{name} is {list(theirs[name])}, not {list(each.shape)}'
        for name, each in wanted.items()
        if name in theirs and tuple(theirs[name]) != each.shape
    ]
    problems = []
    if missing:
        problems.append(f'{len(missing)} missing: {_listed(missing, extra)}')
    if extra:
        problems.append(f'{len(extra)} without a place: {_listed(extra, missing)}')
    if misshapen:
        problems.append(f'{len(misshapen)} of another shape: {_listed(misshapen, ())}')
    if problems:
        raise CheckpointError(f'{where}: the tensors do not fit the config; ' + '; '.join(problems))


def _listed(names: Iterable[str], others: Iterable[str]) -> str:
    """Names that differ in their numbers only as one, each with the nearest of the others."""
    patterns: dict[str, list[str]] = collections.defaultdict(list)
    for name in names:
        patterns[re.sub(r'\.\d+(?=\.)', '.*', name)].append(name)
    near = {re.sub(r'\.\d+(?=\.)', '.*', name) for name in others}
    said = []
    for pattern, alike in patterns.items():
        close = difflib.get_close_matches(pattern, near, n=1, cutoff=0.7)
        count = f' ({len(alike)} of them)' if len(alike) > 1 else ''
        said.append((pattern if len(alike) > 1 else alike[0]) + count + (f', nearest {close[0]}' if close else ''))
    return ', '.join(said)


def load(
    bound: Sequence[Sequence[Bound]],
    like: Mapping[str, jax.ShapeDtypeStruct],
    read: Callable[[str], np.ndarray],
    done: Callable[[str], None] = lambda name: None,
) -> dict[str, Array]:
    """Our arrays by path; `like` gives shape, dtype and sharding. Values are cast to that dtype.

    `done` hears the name of every tensor that has been read.
    """
    weights: dict[str, Array] = {}
    for group in bound:
        shards: dict[str, list[_Shard]] = {}
        for each in group:
            array = read(each.name)
            parts = layout.split(array - np.float32(each.added) if each.added else array, each.parts)
            for place, part in zip(each.places, parts, strict=True):
                if place.path not in shards:
                    shards[place.path] = _shards(like[place.path])
                for shard in shards[place.path]:
                    shard.write(place.index, part)
            done(each.name)
        for path, pieces in shards.items():
            if path not in weights:
                weights[path] = _whole(like[path], pieces)
            elif not _same(weights[path], pieces):
                raise CheckpointError(f'{group[0].name} is not what the model shares with it; only equal ones can be')
    return weights


@dataclasses.dataclass(frozen=True, slots=True)
class _Shard:
    """What some devices of this host hold of a parameter, in the host's memory."""

    devices: Sequence[Any]  # of jax
    index: tuple[slice, ...]
    data: np.ndarray

    def write(self, at: tuple[int, ...], part: np.ndarray) -> None:
        """Copies what of the part (at this index of the leading dims) belongs here."""
        target = self.data
        for place, here in zip(at, self.index, strict=False):
            if not here.start <= place < here.stop:
                return
            target = target[place - here.start]
        piece = part[self.index[len(at) :]]
        target[tuple(map(slice, piece.shape))] = piece  # a padded vocabulary is longer than theirs


def _shards(like: jax.ShapeDtypeStruct) -> list[_Shard]:
    """Zeros, for each different piece that this host's devices hold."""
    assert like.sharding is not None
    by_index: dict[tuple[tuple[int, int], ...], list[Any]] = collections.defaultdict(list)
    for device, index in like.sharding.addressable_devices_indices_map(like.shape).items():
        cut = tuple(piece.indices(size)[:2] for piece, size in zip(index or (), like.shape, strict=True))
        by_index[cut].append(device)
    return [
        _Shard(devices, tuple(slice(*cut) for cut in index), _aligned([b - a for a, b in index], like.dtype))
        for index, devices in by_index.items()
    ]


def _aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """Zeros, at an address from which a CPU's device takes it over without a copy."""
    size = int(np.prod(shape)) * jnp.dtype(dtype).itemsize
    raw = np.zeros(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def _same(array: Array, shards: Sequence[_Shard]) -> bool:
    """Whether an array's pieces on this host are those."""
    there = {shard.device: np.asarray(shard.data) for shard in array.addressable_shards}
    return all(np.array_equal(shard.data, there[device]) for shard in shards for device in shard.devices)


def _whole(like: jax.ShapeDtypeStruct, shards: Sequence[_Shard]) -> Array:
    pieces = [jax.device_put(shard.data, device) for shard in shards for device in shard.devices]
    return jax.make_array_from_single_device_arrays(like.shape, like.sharding, pieces)


def theirs(each: Bound, weights: Mapping[str, Array]) -> np.ndarray:
    """A tensor of theirs, put together from ours."""
    ours = [np.asarray(weights[place.path][place.index]) for place in each.places]
    real = [x[tuple(map(slice, place.part.shape))] for x, place in zip(ours, each.places, strict=True)]
    array = layout.join(real, each.parts)
    return array.astype(np.float32) + np.float32(each.added) if each.added else array
