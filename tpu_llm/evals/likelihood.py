"""How likely continuations are behind their contexts: sums of log p, and whether they are what a model would say.

What requests have in common is read once. The options of a question have one context: it goes into a cache, which each
of them continues. Where many contexts begin alike (the shots of a task), the beginning is read once for all of them.
Logits are computed of the continuations' tokens alone.
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tpu_llm import config
from tpu_llm.arrays import Array, Bool, Float, Int
from tpu_llm.config import ConfigError
from tpu_llm.data.tokenizer import Tokenizer
from tpu_llm.evals.continuations import Encoder, Pair, shorten, windows
from tpu_llm.kernels.cross_entropy import Options
from tpu_llm.kernels.token_log_probs import judged_log_probs
from tpu_llm.models.decoder import Decoder
from tpu_llm.models.graph import ModelGraph
from tpu_llm.nn.cache import Cache, LayerCache
from tpu_llm.nn.param import named_params
from tpu_llm.parallel import sharding
from tpu_llm.parallel.rules import BATCH
from tpu_llm.parallel.sharding import Layout

Weights = Mapping[str, Array]
Heard = Callable[[int, int], None]
Key = tuple[bytes, bytes]

_SHORT = 256  # tokens: of longer contexts fewer are read at once, since each has a cache
_OPTIONS = 4  # as many continuations as contexts, times this, are scored at once
_COMMON, _MANY = 32, 4  # tokens that as many contexts must begin with to have them read apart
_AHEAD = 2  # batches are dispatched while one is computed: the device does not wait, and few are held


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Likelihood:
    """Of one continuation."""

    log_prob: float  # nats, summed over its tokens
    tokens: int
    bytes: int  # of its text in UTF-8
    greedy: bool  # whether no token is less likely than another one would have been in its place


@dataclasses.dataclass(frozen=True, slots=True)
class _Context:
    """A context, without what it shares with others, and what is to be scored behind it."""

    ids: np.ndarray
    continuations: list[tuple[Key, np.ndarray]]


class Likelihoods:
    """Scores continuations under one model; holds the programs, so batches of equal shape compile once.

    `rows` contexts are read at once, fewer where they are long. A context that, with its continuation, is longer than
    `max_length` tokens (0: what the model is made for) loses its beginning; `cut` counts these. A context begins with
    the tokenizer's begin mark where that asks for it (`add_bos`), and where it is empty it is that mark alone. With
    `special`, marks that are written in a text are marks. `heard` is told how many of how many tokens are read.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        *,
        rows: int = 16,
        max_length: int = 0,
        special: bool = False,
        layout: Layout | None = None,
        heard: Heard = lambda done, of: None,
    ):
        """Raises ConfigError for a model that cannot be asked so, and for a tokenizer that is not its own."""
        _check(model, tokenizer, rows)
        own = config.load(json.loads(model.described)).max_length
        if max_length < 0 or 0 < model.max_length < max_length:
            raise ConfigError(f'max_length is {max_length}; the model has {model.max_length} learned positions')
        self.max_length: int = max_length or own or 2048
        self.tokenizer, self.cut = tokenizer, 0
        self.encoder = Encoder(tokenizer, special)
        self.weights: Weights = {path: leaf.get_value() for path, leaf in named_params(model)}
        self._heard, self._shares = heard, 'ssm' not in model.mixers  # a state takes no padding after its beginning
        self._parts = math.prod(layout.mesh.shape[axis] for axis in BATCH) if layout else 1
        self._rows = rows
        self._read, self._score = _programs(model, layout)

    def __call__(self, requests: Sequence[tuple[str, str]], weights: Weights | None = None) -> list[Likelihood]:
        """Of each (context, continuation). `weights`: others than the model's, by path, as a hook in training has them.

        Tokens are those of the joined text; the spaces that a context ends with belong to its continuation. Raises
        ValueError for a continuation that adds no token, or more than there is room for.
        """
        pairs = self.encoder.pairs(requests)
        found = self.of_ids(pairs, weights)
        return [
            dataclasses.replace(each, bytes=len(continuation.encode()))
            for each, (_, continuation) in zip(found, requests, strict=True)
        ]

    def rolling(self, texts: Sequence[str], weights: Weights | None = None) -> list[Likelihood]:
        """Of whole texts behind the begin mark, each token once, in windows of `max_length` with as much context as
        there is room for.
        """
        return self.of_texts([self.encoder.ids(text) for text in texts], texts, weights)

    def of_texts(
        self, ids: Sequence[np.ndarray], texts: Sequence[str], weights: Weights | None = None
    ) -> list[Likelihood]:
        """`rolling` of texts whose ids are given."""
        begin = self.tokenizer.bos
        parts = [windows(each, begin, self.max_length) for each in ids]
        found = iter(self.of_ids([pair for pairs in parts for pair in pairs], weights))
        made = []
        for pairs, text in zip(parts, texts, strict=True):
            own = list(itertools.islice(found, len(pairs)))
            made.append(
                Likelihood(
                    log_prob=math.fsum(each.log_prob for each in own),
                    tokens=sum(each.tokens for each in own),
                    bytes=len(text.encode()),
                    greedy=all(each.greedy for each in own),
                )
            )
        return made

    def of_ids(self, pairs: Sequence[Pair], weights: Weights | None = None) -> list[Likelihood]:
        """Of (context, continuation) in ids, neither of them empty; the bytes are those of the continuation's ids."""
        fitting = []
        for pair in pairs:
            fitting.append(shorten(pair, self.max_length))
            self.cut += len(fitting[-1].context) < len(pair.context)
        keys = [(pair.context.tobytes(), pair.continuation.tobytes()) for pair in fitting]
        contexts: dict[bytes, dict[Key, np.ndarray]] = {}
        for key, pair in zip(keys, fitting, strict=True):
            contexts.setdefault(key[0], {})[key] = pair.continuation
        asked = [
            _Context(np.frombuffer(context, np.int32), list(continuations.items()))
            for context, continuations in contexts.items()
        ]
        found = self._found(asked, self.weights if weights is None else weights)
        made = []
        for key, pair in zip(keys, fitting, strict=True):
            log_probs, likeliest = found[key]
            size = len(self.tokenizer.decode_bytes(pair.continuation.tolist()))
            total = float(log_probs.astype(np.float64).sum())
            made.append(
                Likelihood(log_prob=total, tokens=len(pair.continuation), bytes=size, greedy=bool(likeliest.all()))
            )
        return made

    def _found(self, contexts: list[_Context], weights: Weights) -> dict[Key, tuple[np.ndarray, np.ndarray]]:
        """log p and whether it is the likeliest, of each token of each continuation."""
        found, waiting = {}, []
        done, of = 0, sum(len(context.ids) for context in contexts)
        for beginning, group in _alike(contexts) if self._shares else [(0, contexts)]:
            before = self._beginning(group[0].ids[:beginning], weights) if beginning else None
            for batch in _batches(group, beginning, self._rows):
                waiting.append(self._dispatch(batch, beginning, before, len(group), weights))
                if len(waiting) > _AHEAD:
                    found |= _collected(waiting.pop(0))
                done += sum(len(context.ids) for context in batch)
                self._heard(done, of)
        for each in waiting:
            found |= _collected(each)
        return found

    def _beginning(self, ids: np.ndarray, weights: Weights) -> Cache:
        tokens, lengths = _left([ids] * self._parts, self._parts, _padded(len(ids)))
        return self._read(weights, None, tokens, lengths)[1]

    def _dispatch(
        self, batch: Sequence[_Context], beginning: int, before: Cache | None, count: int, weights: Weights
    ) -> list[tuple[list[Key], list[int], Any]]:
        """Scores of all continuations of a batch of contexts, on their way."""
        ids = [context.ids[beginning:] for context in batch]
        length = _padded(max(map(len, ids)))
        rows = min(_at_once(self._rows, beginning + length), 1 << (count - 1).bit_length())
        rows = -(-rows // self._parts) * self._parts
        last, cache = self._read(weights, before, *_left(ids, rows, length))
        asked = [(row, key, ids) for row, context in enumerate(batch) for key, ids in context.continuations]
        asked.sort(key=lambda each: len(each[2]))
        dispatched = []
        for at in range(0, len(asked), _OPTIONS * rows):
            part = asked[at : at + _OPTIONS * rows]
            owners = np.zeros(rows if len(part) <= rows else _OPTIONS * rows, np.int32)
            owners[: len(part)] = [row for row, _, _ in part]
            tokens, lengths = _right([ids for _, _, ids in part], len(owners))
            scores = self._score(weights, last, cache if tokens.shape[1] > 1 else None, owners, tokens, lengths)
            dispatched.append(([key for _, key, _ in part], [len(ids) for _, _, ids in part], scores))
        return dispatched


def _check(model: Any, tokenizer: Tokenizer, rows: int) -> None:
    if not isinstance(model, Decoder):
        raise ConfigError(f'continuations are scored by decoders, and the model is of type {type(model).__name__}')
    moe = config.load(json.loads(model.described)).moe
    if moe is not None and moe.router.choice == 'expert_choice':
        raise ConfigError(
            "router.choice = 'expert_choice' looks at whole rows, so a token's log-prob would depend on what follows; "
            'score another model'
        )
    if tokenizer.vocab_size > model.vocab_size:
        raise ConfigError(
            f'the tokenizer has ids up to {tokenizer.vocab_size - 1} but model.vocab_size is {model.vocab_size}; '
            'use the tokenizer that the model was trained with'
        )
    if rows < 1:
        raise ConfigError(f'rows is {rows}; it is at least 1')


# ------------------------------------------------------------------------------------------------- on the device


def _programs(model: Decoder, layout: Layout | None) -> tuple[Callable[..., Any], Callable[..., Any]]:
    graph, stacked = ModelGraph(model), model.stack.cache_shapes()
    options = Options(vocab_size=model.vocab_size, softcap=model.logit_softcap)

    def read(
        weights: Weights, before: Cache | None, tokens: Int[Array, 'B T'], lengths: Int[Array, ' B']
    ) -> tuple[Float[Array, 'B D'], Cache]:
        """The last hidden state of each row behind the one row of `before`, and the cache; padding is on the left."""
        with sharding.use(layout and layout.decoding):
            model, (rows, length) = graph.bind(weights), tokens.shape
            segments = (jnp.arange(length)[None] >= length - lengths[:, None]).astype(jnp.int32)
            cache = model.empty_cache(rows, length)
            if before is not None:
                cache = _continued(before, jnp.zeros(rows, jnp.int32), length, stacked)
            positions = _starts(cache)[:, None] + jnp.maximum(jnp.cumsum(segments, axis=1) - 1, 0)
            hidden, cache = model.extend(tokens, cache, segments=segments, positions=positions)
            return hidden[:, -1], cache

    def score(
        weights: Weights,
        last: Float[Array, 'B D'],
        cache: Cache | None,
        owners: Int[Array, ' C'],
        tokens: Int[Array, 'C T'],
        lengths: Int[Array, ' C'],
    ) -> tuple[Float[Array, 'C T'], Bool[Array, 'C T']]:
        """Of each token behind the context in row `owners` and the tokens before it."""
        with sharding.use(layout and layout.decoding):
            model, further = graph.bind(weights), tokens.shape[1] - 1
            hidden = last[owners][:, None]
            if cache is not None:
                cache = _continued(cache, owners, further, stacked)
                segments = (jnp.arange(further)[None] < lengths[:, None] - 1).astype(jnp.int32)
                positions = _starts(cache)[:, None] + jnp.arange(further)[None]
                more, _ = model.extend(tokens[:, :-1], cache, segments=segments, positions=positions)
                hidden = jnp.concatenate([hidden, more], axis=1)
            kernel, bias = model.unembedding(), model.logit_bias()
            return judged_log_probs(hidden, kernel, tokens, options, model.dtype, bias)

    replicated = layout.replicated if layout else None
    return jax.jit(read), jax.jit(score, out_shardings=replicated)


def _starts(cache: Cache) -> Int[Array, ' B']:
    """How many tokens each row holds, which is the position of its next."""
    return (cache.segments > 0).sum(axis=1)


def _continued(cache: Cache, owners: Int[Array, ' B'], slots: int, stacked: Sequence[int]) -> Cache:
    """The rows `owners` of a cache, with room for so many more tokens."""

    def longer(x: Array, axis: int) -> Array:
        return jnp.pad(x, [(0, slots if axis % x.ndim == at else 0) for at in range(x.ndim)])

    layers = []
    for layer, many in zip(cache.layers, stacked, strict=True):
        taken = jax.tree.map(lambda x, axis=bool(many): jnp.take(x, owners, axis=int(axis)), layer)
        if isinstance(taken, LayerCache):
            taken = LayerCache(keys=longer(taken.keys, -2), values=longer(taken.values, -2))
        layers.append(taken)
    return dataclasses.replace(
        cache, layers=layers, segments=longer(cache.segments[owners], 1), positions=longer(cache.positions[owners], 1)
    )


# ------------------------------------------------------------------------------------------------- batches


def _alike(contexts: Sequence[_Context]) -> Iterator[tuple[int, list[_Context]]]:
    """Contexts in groups, and how many tokens all of a group begin with; 0 for the group of all others.

    In the order of their ids neighbours have most in common. A group grows while the tokens that it saves become more;
    one of few contexts is none. A token of its own is left to each context.
    """
    ordered = sorted(contexts, key=lambda context: context.ids.tolist())
    others, group, common = [], ordered[:1], len(ordered[0].ids) - 1 if ordered else 0
    for context in ordered[1:]:
        shared = min(common, _shared(group[-1].ids, context.ids), len(context.ids) - 1)
        if shared >= _COMMON and shared * len(group) >= common * (len(group) - 1):
            group, common = [*group, context], shared
            continue
        if len(group) >= _MANY and common >= _COMMON:
            yield common, group
        else:
            others += group
        group, common = [context], len(context.ids) - 1
    if len(group) >= _MANY and common >= _COMMON:
        yield common, group
    else:
        others += group
    if others:
        yield 0, others


def _shared(a: np.ndarray, b: np.ndarray) -> int:
    """How many ids both begin with."""
    size = min(len(a), len(b))
    different = np.flatnonzero(a[:size] != b[:size])
    return int(different[0]) if len(different) else size


def _batches(contexts: Sequence[_Context], beginning: int, rows: int) -> Iterator[list[_Context]]:
    """The longest first: if they do not fit, that is known at once."""
    left = sorted(contexts, key=lambda context: -len(context.ids))
    while left:
        count = _at_once(rows, beginning + _padded(len(left[0].ids) - beginning))
        yield left[:count]
        left = left[count:]


def _at_once(rows: int, length: int) -> int:
    return max(1, min(rows, rows * _SHORT // length))


def _padded(length: int) -> int:
    """What a length is padded to, so that few programs serve all, each at most a fifth longer than needed: multiples of
    8 to 64, of 16 to 128, of 32 to 256 …
    """
    step = max(8, (1 << (length - 1).bit_length()) // 8)
    return -(-length // step) * step


def _left(ids: Sequence[np.ndarray], rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens padded on the left, and how many are real; missing rows are of one token."""
    tokens, lengths = np.zeros((rows, length), np.int32), np.ones(rows, np.int32)
    for row, each in enumerate(ids):
        tokens[row, length - len(each) :], lengths[row] = each, len(each)
    return tokens, lengths


def _right(ids: Sequence[np.ndarray], rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens padded on the right, to one or to one more than 2, 4, 8, 16, 24, 32 …, and how many are real."""
    most = max(map(len, ids)) - 1
    length = 1 + (1 << (most - 1).bit_length() if 0 < most < 8 else most and _padded(most))
    tokens, lengths = np.zeros((rows, length), np.int32), np.ones(rows, np.int32)
    for row, each in enumerate(ids):
        tokens[row, : len(each)], lengths[row] = each, len(each)
    return tokens, lengths


def _collected(dispatched: list[tuple[list[Key], list[int], Any]]) -> dict[Key, tuple[np.ndarray, np.ndarray]]:
    found = {}
    for keys, lengths, scores in dispatched:
        log_probs, likeliest = map(np.asarray, scores)
        for row, (key, length) in enumerate(zip(keys, lengths, strict=True)):
            found[key] = log_probs[row, :length], likeliest[row, :length]
    return found
