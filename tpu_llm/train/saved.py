"""The state as a checkpoint stores it: leaves by name, without the padding of the vocabulary.

Padding depends on the mesh (`nn/embed.py`); what is saved must not, so that a run continues on another one.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from tpu_llm.arrays import Array
from tpu_llm.models.graph import ModelGraph
from tpu_llm.train.state import TrainState, parameter_of

Tree = dict[str, dict[str, Any]]
Key = tuple[str, str]  # part ('params' or 'rest') and name


@dataclasses.dataclass(frozen=True, slots=True)
class _Padded:
    """A leaf with a padded vocabulary, as it is in memory, and as it is saved."""

    axis: int
    padding: int
    full: jax.ShapeDtypeStruct

    @property
    def saved(self) -> jax.ShapeDtypeStruct:
        shape = tuple(size - self.padding * (i == self.axis) for i, size in enumerate(self.full.shape))
        sharding = self.full.sharding
        assert isinstance(sharding, NamedSharding)
        spec = list(sharding.spec)
        if shape[self.axis] % (sharding.mesh.shape[spec[self.axis]] if spec[self.axis] else 1):
            spec[self.axis] = None  # what does not divide is whole on every shard while it is saved
        return jax.ShapeDtypeStruct(shape, self.full.dtype, sharding=NamedSharding(sharding.mesh, PartitionSpec(*spec)))

    def strip(self, x: Array) -> Array:
        return jax.lax.slice_in_dim(x, 0, x.shape[self.axis] - self.padding, axis=self.axis)

    def pad(self, x: Array) -> Array:
        return jnp.pad(x, [(0, self.padding * (i == self.axis)) for i in range(x.ndim)])


class Saved:
    """Turns states of one model on one mesh into trees `{'params': {path: …}, 'rest': {name: …}}` and back."""

    def __init__(self, graph: ModelGraph, like: TrainState):
        """`like` is the abstract state, with shardings."""
        self._like = like
        self._padded = _find_padded(graph, like)
        self._strip = self._program(_Padded.strip, {key: each.saved for key, each in self._padded.items()})

    def shapes(self) -> Tree:
        """ShapeDtypeStructs of a saved tree."""
        return _replace(_named(self._like), {key: each.saved for key, each in self._padded.items()})

    def tree(self, state: TrainState) -> Tree:
        named = _named(state)
        return _replace(named, self._strip({key: named[key[0]][key[1]] for key in self._padded}))

    def state(self, tree: Tree) -> TrainState:
        """The inverse of `tree`."""
        tree = self.padded(tree)
        empty = dataclasses.replace(self._like, params={})
        leaves = [tree['rest'][name] for name in _named(self._like)['rest']]
        rest = jax.tree.unflatten(jax.tree.structure(empty), leaves)
        return dataclasses.replace(rest, params=tree['params'])

    def padded(self, tree: Tree) -> Tree:
        """A saved tree, or part of one, with the padding of this mesh."""
        there = {key: each for key, each in self._padded.items() if key[1] in tree.get(key[0], {})}
        fill = self._program(_Padded.pad, {key: each.full for key, each in there.items()})
        return _replace(tree, fill({key: tree[key[0]][key[1]] for key in there}))

    def _program(
        self, change: Callable[[_Padded, Array], Array], results: dict[Key, jax.ShapeDtypeStruct]
    ) -> Callable[[dict[Key, Array]], dict[Key, Array]]:
        """`change` on every given leaf, straight onto the shards of `results`."""
        shardings = {key: result.sharding for key, result in results.items()}
        return jax.jit(
            lambda leaves: {key: change(self._padded[key], x) for key, x in leaves.items()}, out_shardings=shardings
        )


def _named(state: TrainState) -> Tree:
    leaves = jax.tree_util.tree_leaves_with_path(dataclasses.replace(state, params={}))
    rest = {jax.tree_util.keystr(path, simple=True, separator='.'): leaf for path, leaf in leaves}
    return {'params': state.params, 'rest': rest}


def _find_padded(graph: ModelGraph, like: TrainState) -> dict[Key, _Padded]:
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(like):
        name = parameter_of(path, leaf, graph)
        if name is None or not graph.leaves[name].get_metadata('padding'):
            continue
        meta = graph.leaves[name].get_metadata()
        whole = jax.tree_util.keystr(path, simple=True, separator='.')
        key = ('params', name) if path[0].name == 'params' else ('rest', whole)
        found[key] = _Padded(meta['dims'].index('V'), meta['padding'], leaf)
    return found


def _replace(tree: Tree, leaves: dict[Key, Any]) -> Tree:
    return {
        part: {name: leaves.get((part, name), leaf) for name, leaf in entries.items()} for part, entries in tree.items()
    }
