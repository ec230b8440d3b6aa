"""Text that grows token by token, for a conversation: what was said stays in the cache, only what is new is read.

Two programs do it: one reads a piece of a prompt, one writes a token and gives the next. The cache starts small and
doubles when it is full, at the price of compiling both again.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tpu_llm.config import ConfigError
from tpu_llm.infer.generate import for_decoding
from tpu_llm.infer.sampling import Sampling
from tpu_llm.models.graph import ModelGraph
from tpu_llm.nn.cache import Cache, LayerCache
from tpu_llm.nn.param import named_params

_PIECE = 64  # tokens of a prompt that are read at once; the last piece is padded on the left
_SLOTS = 512  # of the cache at first


class Writer:
    """One text and the model that writes it. Not shared between threads."""

    def __init__(self, model: Any, *, sampling: Sampling, vocab_size: int, seed: int = 0):
        """No token from `vocab_size` on is drawn: a model may have more than its tokenizer."""
        model = for_decoding(model) if jax.default_backend() == 'cpu' else model
        graph = ModelGraph(model)
        self._model = model
        self._weights = {path: leaf.get_value() for path, leaf in named_params(model)}
        self._key = jax.random.key(seed)
        self.ids: list[int] = []  # what was read and written so far

        def extend(weights: Any, cache: Cache, tokens: Any, segments: Any, length: Any) -> tuple[Any, Cache]:
            bound = graph.bind(weights)
            positions = jnp.maximum(length + jnp.cumsum(segments, axis=1) - 1, 0)
            hidden, cache = bound.extend(tokens, cache, segments=segments, positions=positions)
            return bound.logits(hidden[:, -1:])[:, 0, :vocab_size], cache

        def draw(logits: Any, key: Any, count: Any) -> Any:
            return sampling(logits, jax.random.fold_in(key, count)[None]).astype(jnp.int32)

        self._extend = jax.jit(extend, donate_argnums=1)
        self._draw = jax.jit(draw)
        self._cache = model.empty_cache(1, _SLOTS)
        self._used = 0  # slots, padding included
        self._logits: Any = None

    def read(self, ids: Sequence[int]) -> None:
        """Tokens that follow what is there. Raises ConfigError for more than the model has learned positions."""
        self._check_room(len(ids))
        for start in range(0, len(ids), _PIECE):
            piece = list(ids[start : start + _PIECE])
            tokens, segments = np.zeros((2, 1, _PIECE), np.int32)
            tokens[0, _PIECE - len(piece) :] = piece
            segments[0, _PIECE - len(piece) :] = 1
            self._step(tokens, segments)
            self.ids += piece

    def write(self, limit: int, stops: frozenset[int]) -> Iterator[int]:
        """Up to `limit` new tokens, until one of `stops`, which is not given out."""
        if self._logits is None:
            raise ConfigError('there is no prompt to continue; read one first')
        one = np.ones((1, 1), np.int32)
        for _ in range(limit):
            self._check_room(1)
            token = self._draw(self._logits, self._key, len(self.ids))
            # The device goes on to the next token while this one is shown.
            self._step(token[:, None], one)
            self.ids.append(int(token[0]))
            if self.ids[-1] in stops:
                return
            yield self.ids[-1]

    def _step(self, tokens: Any, segments: np.ndarray) -> None:
        if self._used + tokens.shape[1] > self._cache.segments.shape[1]:
            self._cache = _doubled(self._cache)
        self._used += tokens.shape[1]
        self._logits, self._cache = self._extend(self._weights, self._cache, tokens, segments, np.int32(len(self.ids)))

    def _check_room(self, tokens: int) -> None:
        most, length = self._model.max_length, len(self.ids) + tokens
        if 0 < most < length:
            raise ConfigError(f'the text is {length} tokens long but the model has {most} learned positions')


def _doubled(cache: Cache) -> Cache:
    """The same with twice the slots."""

    def grow(x: Any, axis: int) -> Any:
        return jnp.concatenate([x, jnp.zeros_like(x)], axis)

    layers = [
        LayerCache(keys=grow(c.keys, c.keys.ndim - 2), values=grow(c.values, c.values.ndim - 2))
        if isinstance(c, LayerCache)
        else c  # a state is of one size
        for c in cache.layers
    ]
    return dataclasses.replace(
        cache, layers=layers, segments=grow(cache.segments, 1), positions=grow(cache.positions, 1)
    )
