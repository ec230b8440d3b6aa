"""The state as a checkpoint stores it: leaves by name, layers in their order, without any padding.

How the vocabulary is padded (`nn/embed.py`) and how stages order and pad the layers (`parallel/pipeline.py`) depends on
the mesh; what is saved must not, so that a run continues on another one.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from tpu_llm.arrays import Array
from tpu_llm.models.graph import ModelGraph
from tpu_llm.train.state import TrainState, parameter_of

Tree = dict[str, dict[str, Any]]
Key = tuple[str, str]  # part ('params' or 'rest') and name


@dataclasses.dataclass(frozen=True, slots=True)
class _Mapped:
    """A leaf that is not saved as it is in memory: which entries of one axis are saved, and in which order."""

    axis: int
    kept: tuple[int, ...]  # saved entry i is entry kept[i] in memory
    full: jax.ShapeDtypeStruct

    @property
    def saved(self) -> jax.ShapeDtypeStruct:
        shape = tuple(len(self.kept) if i == self.axis else size for i, size in enumerate(self.full.shape))
        sharding = self.full.sharding
        assert isinstance(sharding, NamedSharding)
        spec = list(sharding.spec)
        if shape[self.axis] % (sharding.mesh.shape[spec[self.axis]] if spec[self.axis] else 1):
            spec[self.axis] = None  # what does not divide is whole on every shard while it is saved
        return jax.ShapeDtypeStruct(shape, self.full.dtype, sharding=NamedSharding(sharding.mesh, PartitionSpec(*spec)))

    def save(self, x: Array) -> Array:
        if self.kept == tuple(range(len(self.kept))):
            return jax.lax.slice_in_dim(x, 0, len(self.kept), axis=self.axis)
        return jnp.take(x, np.array(self.kept), axis=self.axis)

    def load(self, x: Array) -> Array:
        """The inverse; what is not saved is zero."""
        size = self.full.shape[self.axis]
        place = np.full(size, len(self.kept))
        place[list(self.kept)] = np.arange(len(self.kept))
        if self.kept == tuple(range(len(self.kept))):
            return jnp.pad(x, [(0, (size - len(self.kept)) * (i == self.axis)) for i in range(x.ndim)])
        return jnp.take(x, place, axis=self.axis, mode='fill', fill_value=0)


class Saved:
    """Turns states of one model on one mesh into trees `{'params': {path: …}, 'rest': {name: …}}` and back."""

    def __init__(self, graph: ModelGraph, like: TrainState):
        """`like` is the abstract state, with shardings."""
        self._like = like
        self._mapped = _find_mapped(graph, like)
        self._save = self._program(_Mapped.save, {key: each.saved for key, each in self._mapped.items()})

    def shapes(self) -> Tree:
        """ShapeDtypeStructs of a saved tree."""
        return _replace(_named(self._like), {key: each.saved for key, each in self._mapped.items()})

    def tree(self, state: TrainState) -> Tree:
        named = _named(state)
        return _replace(named, self._save({key: named[key[0]][key[1]] for key in self._mapped}))

    def state(self, tree: Tree) -> TrainState:
        """The inverse of `tree`."""
        tree = self.padded(tree)
        empty = dataclasses.replace(self._like, params={})
        leaves = [tree['rest'][name] for name in _named(self._like)['rest']]
        rest = jax.tree.unflatten(jax.tree.structure(empty), leaves)
        return dataclasses.replace(rest, params=tree['params'])

    def padded(self, tree: Tree) -> Tree:
        """A saved tree, or part of one, in the order and with the padding of this mesh."""
        there = {key: each for key, each in self._mapped.items() if key[1] in tree.get(key[0], {})}
        fill = self._program(_Mapped.load, {key: each.full for key, each in there.items()})
        return _replace(tree, fill({key: tree[key[0]][key[1]] for key in there}))

    def _program(
        self, change: Callable[[_Mapped, Array], Array], results: dict[Key, jax.ShapeDtypeStruct]
    ) -> Callable[[dict[Key, Array]], dict[Key, Array]]:
        """`change` on every given leaf, straight onto the shards of `results`."""
        shardings = {key: result.sharding for key, result in results.items()}
        return jax.jit(
            lambda leaves: {key: change(self._mapped[key], x) for key, x in leaves.items()}, out_shardings=shardings
        )


def _named(state: TrainState) -> Tree:
    leaves = jax.tree_util.tree_leaves_with_path(dataclasses.replace(state, params={}))
    rest = {jax.tree_util.keystr(path, simple=True, separator='.'): leaf for path, leaf in leaves}
    return {'params': state.params, 'rest': rest}


def _find_mapped(graph: ModelGraph, like: TrainState) -> dict[Key, _Mapped]:
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(like):
        name = parameter_of(path, leaf, graph)
        kept = name and _kept(graph.leaves[name].get_metadata(), leaf.shape)
        if not kept:
            continue
        whole = jax.tree_util.keystr(path, simple=True, separator='.')
        key = ('params', name) if path[0].name == 'params' else ('rest', whole)
        found[key] = _Mapped(*kept, leaf)
    return found


def _kept(meta: dict[str, Any], shape: tuple[int, ...]) -> tuple[int, tuple[int, ...]] | None:
    """The axis of a parameter (or of a moment of it) that is mapped, and its entries that are saved."""
    dims, layers = meta['dims'], meta['layers']
    if dims.startswith('L'):
        kept = sorted((i for i, layer in enumerate(layers) if layer >= 0), key=layers.__getitem__)
        return (0, tuple(kept)) if kept != list(range(shape[0])) else None
    axis = dims.find('V')
    if not meta['padding'] or shape[axis] == 1:  # a moment averaged over the vocabulary
        return None
    return axis, tuple(range(shape[axis] - meta['padding']))


def _replace(tree: Tree, leaves: dict[Key, Any]) -> Tree:
    return {
        part: {name: leaves.get((part, name), leaf) for name, leaf in entries.items()} for part, entries in tree.items()
    }
