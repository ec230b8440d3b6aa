"""A further model on the run's mesh, which reads texts and says something of each: rewards, judgements."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tpu_llm.arrays import Array, Float
from tpu_llm.checkpoint import pretrained
from tpu_llm.config import ConfigError
from tpu_llm.data.tokenizer import Tokenizer
from tpu_llm.infer.generate import bucket
from tpu_llm.models.graph import ModelGraph
from tpu_llm.nn.position import from_segments
from tpu_llm.parallel import hosts, sharding
from tpu_llm.parallel.compile import Compiled
from tpu_llm.parallel.sharding import Layout
from tpu_llm.train import weights
from tpu_llm.train.session import Session
from tpu_llm.train.setup import batch_sharding, make_graph

Say = Callable[[Any, Array], Array]  # (model, its hidden states [B, 1, D] at the last id of each text) → [B, …]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Beside:
    """A model that a run holds beside its own."""

    graph: ModelGraph
    weights: Any  # by path
    tokenizer: Tokenizer
    layout: Layout
    rows: int  # that a batch on this mesh has


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a further model is put."""

    layout: Layout
    rows: int  # of a batch, which divide over the mesh
    seed: int
    graph: Callable[[Any], ModelGraph]  # of a model's config, on this mesh
    reference: Beside | None  # the model that is meant where no path is given

    @classmethod
    def of(cls, session: Session) -> 'Place':
        """Beside the model of a run."""
        run, layout, reference = session.run, session.layout, None
        rows = run.data.global_batch // run.accumulate
        if session.graphs.reference is not None:
            frozen = session.frozen
            held = frozen.base if frozen.other is None else frozen.other
            graph, tokenizer = session.graphs.reference, session.tokenizer
            reference = Beside(graph=graph, weights=held, tokenizer=tokenizer, layout=layout, rows=rows)

        def make(model: Any) -> ModelGraph:
            return make_graph(dataclasses.replace(run, model=model, peft=None), layout)

        return cls(layout=layout, rows=rows, seed=run.seed, graph=make, reference=reference)


Surroundings = Session | Place  # what rewards are opened in


def open_beside(path: str, surroundings: Surroundings, dtype: str = 'float32') -> Beside:
    """The model at `path`, as `origin.weights` has it, its weights read onto shards, held and used in `dtype`.

    '' is the reference, which is there already. Raises ConfigError where there is no such model.
    """
    place = surroundings if isinstance(surroundings, Place) else Place.of(surroundings)
    if not path:
        if place.reference is None:
            raise ConfigError('the run has no reference to judge with; give the path of a model, or set reference')
        return place.reference
    source = pretrained.open_source(path)
    tokenizer = source.tokenizer()
    model = dataclasses.replace(source.config, dtype=dtype)
    graph = place.graph(model)
    added = [name for name, leaf in graph.leaves.items() if leaf.get_metadata('added')]
    assert all(f'params.{name}' in source.tensors for name in added), 'what is not there would be drawn'
    read = weights.of_model(path, model, graph, place.layout, tokenizer.fingerprint, place.seed, 'path')
    held = jax.tree.map(lambda x: x.astype(dtype), read)
    return Beside(graph=graph, weights=held, tokenizer=tokenizer, layout=place.layout, rows=place.rows)


class Reader:
    """What a model says of texts, as many as there are, a batch at a time; one program for each bucket of lengths."""

    def __init__(self, name: str, beside: Beside, say: Say):
        self._beside = beside
        layout = beside.layout
        self._max_length: int = beside.graph.bind(beside.graph.shapes()).max_length

        def read(weights: Mapping[str, Array], tokens: Array, lengths: Array) -> Float[Array, 'B ...']:
            with sharding.use(layout):
                model = beside.graph.bind(weights)
                segments = (jnp.arange(tokens.shape[1])[None, :] < lengths[:, None]).astype(jnp.int32)
                hidden = model.hidden(tokens, segments=segments, positions=from_segments(segments))
                last = jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)
                return say(model, last)

        self._program = Compiled(name, read, out_shardings=layout.replicated)

    def __call__(self, texts: Sequence[np.ndarray]) -> np.ndarray:
        """float64[n, …]. Raises ValueError for a text that is empty, or longer than the model's learned positions."""
        lengths = np.asarray([len(text) for text in texts])
        if not lengths.all():
            raise ValueError('a text to be read is empty')
        if 0 < self._max_length < lengths.max():
            raise ValueError(
                f'a text of {lengths.max()} tokens is longer than the {self._max_length} learned positions'
            )
        rows, told = self._beside.rows, []
        order = np.argsort(lengths, kind='stable')  # those of one bucket together
        for at in range(0, len(texts), rows):
            chosen = order[at : at + rows]
            told.append(self._batch([texts[index] for index in chosen])[: len(chosen)])
        return np.concatenate(told)[np.argsort(order, kind='stable')]

    def _batch(self, texts: Sequence[np.ndarray]) -> np.ndarray:
        length = bucket(max(map(len, texts)))
        length = min(length, self._max_length) if self._max_length else length
        tokens = np.full((self._beside.rows, length), self._beside.tokenizer.pad, np.int32)
        lengths = np.ones(self._beside.rows, np.int32)  # missing rows are one token long
        for row, text in enumerate(texts):
            tokens[row, : len(text)], lengths[row] = text, len(text)
        told = self._program(self._beside.weights, self._global(tokens), self._global(lengths))
        return np.asarray(told, np.float64)

    def _global(self, whole: np.ndarray) -> Array:
        place = batch_sharding(self._beside.layout, whole.shape)
        own = hosts.local_rows(place, len(whole))
        return hosts.assemble(whole[own], own, len(whole), place)
