"""Generation: prefill the prompts, then decode with a cache, all in one compiled program."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from tpu_llm.arrays import Array, Int, Key
from tpu_llm.config import ConfigError
from tpu_llm.data.tokenizer import Tokenizer
from tpu_llm.infer.sampling import Greedy, Sampling
from tpu_llm.models.decoder import Decoder
from tpu_llm.models.graph import ModelGraph
from tpu_llm.nn.cache import Cache
from tpu_llm.nn.param import named_params
from tpu_llm.parallel import sharding
from tpu_llm.parallel.compile import Compiled
from tpu_llm.parallel.rules import BATCH
from tpu_llm.parallel.sharding import Layout

# Prompts are padded to a multiple of this, so that a few more characters need no new program.
_PROMPT_MULTIPLE = 32


def generate(
    model: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    sampling: Sampling = Greedy(),  # noqa: B008 (frozen)
    seed: int = 0,
) -> list[str]:
    """The continuation of each prompt, up to its end-of-text token or `max_new_tokens`; the prompt is not repeated.

    Prompts may be of unequal length. Draws depend on (seed, row of the prompt, position) alone.
    """
    weights = {path: leaf.get_value() for path, leaf in named_params(model)}
    generator = Generator(ModelGraph(model), tokenizer, max_new_tokens=max_new_tokens, sampling=sampling)
    return generator(weights, prompts, seed=seed)


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
        if max_new_tokens < 1:
            raise ConfigError(f'max_new_tokens is {max_new_tokens}; it must be at least 1')
        self.tokenizer = tokenizer
        self.layout = layout
        self.max_new_tokens = max_new_tokens
        self.max_length: int = graph.bind(graph.shapes()).max_length
        # Scanned weights are sliced again for every token; on a CPU that costs more than the matmuls.
        unstack = _platform(layout) == 'cpu'

        def run(weights: Mapping[str, Array], tokens: Array, segments: Array, key: Key[Array, '']) -> Array:
            with sharding.use(layout):
                model = graph.bind(weights)
                model = model.unstacked() if unstack else model
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
        """One continuation a prompt. Raises ValueError where there is no prompt or no place for it."""
        if not prompts:
            raise ValueError('there is no prompt to continue; give at least one')
        ids = [np.concatenate([[self.tokenizer.bos], self.tokenizer.encode(prompt)]) for prompt in prompts]
        length = max(map(len, ids)) + self.max_new_tokens
        if 0 < self.max_length < length:
            raise ConfigError(
                f'the longest prompt and max_new_tokens = {self.max_new_tokens} are {length} tokens together but the '
                f'model has {self.max_length} learned positions; shorten one of them'
            )
        tokens, segments = pad_left(ids, rows=self._rows(len(ids)), pad=self.tokenizer.pad)
        out = np.asarray(self._program(weights, tokens, segments, jax.random.key(seed)))
        return [self.tokenizer.decode(_until(row, self.tokenizer.eos)) for row in out[: len(prompts)]]

    def _rows(self, prompts: int) -> int:
        """Rows of the batch: each device of the batch axes gets equally many."""
        shape = self.layout.mesh.shape if self.layout else {}
        parts = int(np.prod([shape.get(axis, 1) for axis in BATCH]))
        return -(-prompts // parts) * parts


def pad_left(ids: Sequence[np.ndarray], *, rows: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and segments, int32[rows, T]: prompts end in the last column, and missing rows repeat the first."""
    longest = max(map(len, ids))
    length = -(-longest // _PROMPT_MULTIPLE) * _PROMPT_MULTIPLE
    tokens = np.full((rows, length), pad, np.int32)
    segments = np.zeros((rows, length), np.int32)
    for row in range(rows):
        prompt = ids[row] if row < len(ids) else ids[0]
        tokens[row, length - len(prompt) :] = prompt
        segments[row, length - len(prompt) :] = 1
    return tokens, segments


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class _Loop:
    step: Int[Array, '']
    logits: Array
    cache: Cache
    out: Int[Array, 'B T']
    done: Array


def decode(
    model: Decoder,
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
    batch, length = tokens.shape
    index = jnp.arange(length)[None, :]
    lengths = segments.sum(axis=1, keepdims=True)
    positions = jnp.maximum(index - (length - lengths), 0)
    cache = model.empty_cache(batch, length + max_new)
    hidden, cache = model.extend(tokens, cache, segments=segments, positions=positions)
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


def _until(row: np.ndarray, eos: int) -> list[int]:
    ends = np.flatnonzero(row == eos)
    return row[: ends[0] if len(ends) else len(row)].tolist()


def _platform(layout: Layout | None) -> str:
    return layout.mesh.devices.flat[0].platform if layout else jax.default_backend()
