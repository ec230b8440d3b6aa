"""Generation: prefill the prompts, then decode with a cache, all in one compiled program."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tpu_llm.arrays import Array, Float, Int, Key
from tpu_llm.config import ConfigError
from tpu_llm.data.tokenizer import Tokenizer
from tpu_llm.infer.sampling import Greedy, Sampling
from tpu_llm.models.decoder import Decoder
from tpu_llm.models.encoder_decoder import EncoderDecoder
from tpu_llm.models.graph import ModelGraph
from tpu_llm.nn.cache import Cache
from tpu_llm.nn.joined import join
from tpu_llm.nn.param import named_params
from tpu_llm.parallel import sharding
from tpu_llm.parallel.compile import Compiled
from tpu_llm.parallel.rules import BATCH
from tpu_llm.parallel.sharding import Layout

Model = Decoder | EncoderDecoder

_SHORTEST = 32  # prompts are padded to it, and longer ones to `bucket`
_KEPT = 8  # generators of `generate`, which hold programs and no weights


def generate(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    sampling: Sampling = Greedy(),  # noqa: B008 (frozen)
    seed: int = 0,
) -> list[str]:
    """The continuation of each prompt, up to its end-of-text token or `max_new_tokens`; the prompt is not repeated. For
    an encoder-decoder prompts are sources, and what comes back are their targets.

    Prompts may be of unequal length. Draws depend on (seed, row of the prompt, position) alone. What was compiled is
    kept: calls of as many prompts, of lengths in one bucket, compile once.
    """
    model = for_decoding(model) if jax.default_backend() == 'cpu' else model
    weights = {path: leaf.get_value() for path, leaf in named_params(model)}
    generator = _generator(ModelGraph(model), tokenizer, max_new_tokens, sampling)
    return generator(weights, prompts, seed=seed)


_generators: dict[Any, 'Generator'] = {}


def _generator(graph: ModelGraph, tokenizer: Tokenizer, max_new_tokens: int, sampling: Sampling) -> 'Generator':
    """The one of an earlier call for the same, if there was one lately."""
    shapes = graph.shapes()
    sizes = tuple((name, x.shape, x.dtype) for name, x in shapes.items())
    key = (graph.graph, sizes, tokenizer, max_new_tokens, sampling)
    kept = _generators.pop(key, None) or Generator(
        ModelGraph(graph.bind(shapes)), tokenizer, max_new_tokens=max_new_tokens, sampling=sampling
    )
    _generators[key] = kept  # the newest is last
    if len(_generators) > _KEPT:
        del _generators[next(iter(_generators))]
    return kept


def for_decoding(model: Model) -> Model:
    """The same model for a CPU, which is bound by reading weights: its layers one by one, since scanned weights are
    sliced again for every token, and maps of one input joined. A model that is so already is shared, not copied.
    """
    graph, state = nnx.split(model.unstacked())
    model = nnx.merge(graph, state)  # modules of its own, which `join` may change
    join(model)
    return model


class Generator:
    """Generation for one model and one way of sampling; holds the programs, so calls of equal shape compile once."""

    def __init__(
        self,
        graph: ModelGraph,
        tokenizer: Tokenizer,
        *,
        max_new_tokens: int,
        sampling: Sampling,
        layout: Layout | None = None,
    ):
        check_new_tokens(max_new_tokens)
        self.tokenizer = tokenizer
        self.layout = layout
        self.max_new_tokens = max_new_tokens
        model = graph.bind(graph.shapes())
        self.max_length: int = model.max_length
        self.from_sources = isinstance(model, EncoderDecoder)
        if tokenizer.vocab_size > model.vocab_size:
            raise ConfigError(
                f'the tokenizer has ids up to {tokenizer.vocab_size - 1} but model.vocab_size is {model.vocab_size}; '
                'use the tokenizer that the model was trained with'
            )
        on_cpu = _platform(layout) == 'cpu'

        def run(weights: Mapping[str, Array], tokens: Array, segments: Array, key: Key[Array, '']) -> Array:
            with sharding.use(layout and layout.decoding):
                model = graph.bind(weights)
                model = for_decoding(model) if on_cpu else model
                return decode(
                    model,
                    tokens,
                    segments,
                    key,
                    max_new=max_new_tokens,
                    sampling=sampling,
                    eos=tokenizer.eos,
                    vocab_size=tokenizer.vocab_size,
                )

        self._program = Compiled('generate', run, out_shardings=layout.replicated if layout else None)

    def __call__(self, weights: Mapping[str, Array], prompts: Sequence[str], *, seed: int = 0) -> list[str]:
        """One continuation a prompt. Raises ValueError where there is no list of prompts or no place for one."""
        if isinstance(prompts, str):
            raise ValueError('prompts is one string; write a list of them: [prompt]')
        if not prompts:
            raise ValueError('there is no prompt to continue; give at least one')
        ids = [self._framed(self.tokenizer.encode(prompt)) for prompt in prompts]
        self._check_length(max(map(len, ids)))
        most = self.max_length if self.from_sources else 0
        tokens, segments = pad_left(ids, rows=self._rows(len(ids)), pad=self.tokenizer.pad, most=most)
        out = np.asarray(self._program(weights, tokens, segments, jax.random.key(seed)))
        return [self.tokenizer.decode(_until(row, self.tokenizer.eos)) for row in out[: len(prompts)]]

    def _framed(self, ids: np.ndarray) -> np.ndarray:
        """A prompt is the beginning of a document; a source is one."""
        bos, eos = [self.tokenizer.bos], [self.tokenizer.eos]
        if not self.from_sources:
            return np.concatenate([bos, ids])
        return np.concatenate([bos if self.tokenizer.add_bos else [], ids, eos]).astype(np.int32)

    def _check_length(self, longest: int) -> None:
        new = self.max_new_tokens
        length = max(longest, new) if self.from_sources else longest + new
        if 0 < self.max_length < length:
            joined = 'at most' if self.from_sources else 'together'
            raise ConfigError(
                f'the longest prompt and max_new_tokens = {new} are {length} tokens {joined} but the model has '
                f'{self.max_length} learned positions; shorten one of them'
            )

    def _rows(self, prompts: int) -> int:
        """Rows of the batch: each device of the batch axes gets equally many."""
        shape = self.layout.mesh.shape if self.layout else {}
        parts = int(np.prod([shape.get(axis, 1) for axis in BATCH]))
        return -(-prompts // parts) * parts


def check_new_tokens(max_new_tokens: int) -> None:
    if max_new_tokens < 1:
        raise ConfigError(f'max_new_tokens is {max_new_tokens}; it must be at least 1')


def pad_left(
    ids: Sequence[np.ndarray], *, rows: int, pad: int, most: int = 0, length: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and segments, int32[rows, T]: prompts end in the last column, and missing rows repeat the first.

    T is `length` where that is given, else as `bucket` has it, and at most `most`, where that is not 0.
    """
    length = length or bucket(max(map(len, ids)))
    length = min(length, most) if most else length
    tokens = np.full((rows, length), pad, np.int32)
    segments = np.zeros((rows, length), np.int32)
    for row in range(rows):
        prompt = ids[row] if row < len(ids) else ids[0]
        tokens[row, length - len(prompt) :] = prompt
        segments[row, length - len(prompt) :] = 1
    return tokens, segments


def bucket(length: int) -> int:
    """What a prompt of so many tokens is padded to, so that few programs serve all: 32, 48, 64, 96, 128, 192 …"""
    power = max(_SHORTEST, 1 << (length - 1).bit_length())
    return power * 3 // 4 if power > _SHORTEST and length <= power * 3 // 4 else power


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class _Loop:
    step: Int[Array, '']
    logits: Array
    cache: Cache
    out: Int[Array, 'B T']
    done: Array


def decode(
    model: Model,
    tokens: Int[Array, 'B T'],
    segments: Int[Array, 'B T'],
    key: Key[Array, ''],
    *,
    max_new: int,
    sampling: Sampling,
    eos: int,
    vocab_size: int,
) -> Int[Array, 'B {max_new}']:
    """Up to `max_new` new tokens a row, after its first `eos` only `eos`. Prompts are padded on the left.

    No token from `vocab_size` on is drawn: a model may have more than its tokenizer.
    """
    check_new_tokens(max_new)
    batch = tokens.shape[0]
    hidden, cache, lengths = begin(model, tokens, segments, max_new)
    rows = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(batch))

    def one(loop: _Loop) -> _Loop:
        keys = jax.vmap(lambda row: jax.random.fold_in(row, loop.step))(rows)
        token = jnp.where(loop.done, eos, sampling(loop.logits[:, :vocab_size], keys)).astype(jnp.int32)
        out = jax.lax.dynamic_update_slice(loop.out, token[:, None], (0, loop.step))
        hidden, cache = model.extend(
            token[:, None], loop.cache, segments=jnp.ones_like(token)[:, None], positions=lengths + loop.step
        )
        return _Loop(loop.step + 1, model.logits(hidden)[:, 0], cache, out, loop.done | (token == eos))

    start = _Loop(
        step=jnp.zeros((), jnp.int32),
        logits=model.logits(hidden[:, -1:])[:, 0],
        cache=cache,
        out=jnp.full((batch, max_new), eos, jnp.int32),
        done=jnp.zeros((batch,), bool),
    )
    return jax.lax.while_loop(lambda loop: (loop.step < max_new) & ~loop.done.all(), one, start).out


def begin(
    model: Model, tokens: Int[Array, 'B T'], segments: Int[Array, 'B T'], max_new: int
) -> tuple[Float[Array, 'B _ D'], Cache, Int[Array, 'B 1']]:
    """Hidden states up to the first new token, the cache with them in it, and that token's position."""
    batch, length = tokens.shape
    if isinstance(model, EncoderDecoder):
        cache = model.start_cache(model.encode(tokens, segments=segments), 1 + max_new, segments=segments)
        one = jnp.ones((batch, 1), jnp.int32)
        hidden, cache = model.extend(one * model.start_token, cache, segments=one, positions=0 * one)
        return hidden, cache, one
    lengths = segments.sum(axis=1, keepdims=True)
    positions = jnp.maximum(jnp.arange(length)[None, :] - (length - lengths), 0)
    cache = model.empty_cache(batch, length + max_new)
    hidden, cache = model.extend(tokens, cache, segments=segments, positions=positions)
    return hidden, cache, lengths


def _until(row: np.ndarray, eos: int) -> list[int]:
    ends = np.flatnonzero(row == eos)
    return row[: ends[0] if len(ends) else len(row)].tolist()


def _platform(layout: Layout | None) -> str:
    return layout.mesh.devices.flat[0].platform if layout else jax.default_backend()
