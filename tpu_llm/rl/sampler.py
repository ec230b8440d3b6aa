"""The policy at work: prompts in, responses and the log-probs of their tokens out, by one program on the run's mesh."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tpu_llm.arrays import Array, Float, Int, Key
from tpu_llm.data.documents import Document
from tpu_llm.data.tokenizer import Tokenizer
from tpu_llm.infer.generate import begin, for_decoding, pad_left
from tpu_llm.models.graph import ModelGraph
from tpu_llm.nn.cache import Cache
from tpu_llm.parallel import sharding
from tpu_llm.parallel.compile import Compiled
from tpu_llm.parallel.sharding import Layout
from tpu_llm.rl.rewards import Sample


@dataclasses.dataclass(frozen=True, slots=True)
class Written:
    """Responses of B rows, on the host; columns behind a response's end are padding."""

    tokens: Int[np.ndarray, 'B T']
    log_probs: Float[np.ndarray, 'B T']  # of those tokens, under softmax(logits / temperature)
    lengths: Int[np.ndarray, ' B']  # tokens, the mark that ended it included
    finished: np.ndarray  # bool[B]: whether it ended itself

    def sample(
        self, row: int, prompt: Document, asked: np.ndarray, tokenizer: Tokenizer, where: Callable[[], str] = str
    ) -> Sample:
        """The response to a prompt, asked by these ids; `where` is as a sample has it."""
        ids = self.tokens[row, : self.lengths[row]]
        said = ids[:-1] if self.finished[row] else ids
        return Sample(
            prompt=prompt.text or '',
            response=tokenizer.decode(said.tolist()),
            record=prompt.record or {},
            finished=bool(self.finished[row]),
            ids=np.concatenate([asked, ids]),
            tokens=len(ids),
            where=where,
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class _Loop:
    step: Int[Array, '']
    logits: Float[Array, 'B V']
    cache: Cache
    tokens: Int[Array, 'B T']
    log_probs: Float[Array, 'B T']
    lengths: Int[Array, ' B']
    done: Array


class Sampler:
    """Draws from softmax(logits / temperature), uncut, so that the log-probs are those of what was drawn from; at
    temperature 0 the likeliest tokens, with their log-probs at 1.

    Prompts are padded to `prompt_length`: one program serves a whole run. Draws depend on (seed, row, position).
    """

    def __init__(
        self,
        graph: ModelGraph,
        layout: Layout,
        *,
        prompt_length: int,
        max_new_tokens: int,
        temperature: float,
        stops: Sequence[int],
        pad: int,
        vocab_size: int,
    ):
        self._prompt_length, self._pad = prompt_length, pad
        on_cpu = layout.platform == 'cpu'
        ends = np.asarray(sorted(set(stops)), np.int32)

        def run(weights: Mapping[str, Array], tokens: Array, segments: Array, key: Key[Array, '']) -> Any:
            with sharding.use(layout.decoding):
                model = graph.bind(weights)
                model = for_decoding(model) if on_cpu else model
                hidden, cache, before = begin(model, tokens, segments, max_new_tokens)
                rows = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(tokens.shape[0]))

                def one(loop: _Loop) -> _Loop:
                    keys = jax.vmap(lambda row: jax.random.fold_in(row, loop.step))(rows)
                    log_probs = jax.nn.log_softmax(loop.logits[:, :vocab_size] / (temperature or 1.0))
                    drawn = jax.vmap(jax.random.categorical)(keys, log_probs) if temperature else log_probs.argmax(1)
                    token = jnp.where(loop.done, pad, drawn)
                    chosen = jnp.take_along_axis(log_probs, token[:, None], axis=1)
                    token = token.astype(jnp.int32)[:, None]
                    hidden, cache = model.extend(
                        token, loop.cache, segments=jnp.ones_like(token), positions=before + loop.step
                    )
                    at = (0, loop.step)
                    return _Loop(
                        step=loop.step + 1,
                        logits=model.logits(hidden)[:, 0],
                        cache=cache,
                        tokens=jax.lax.dynamic_update_slice(loop.tokens, token, at),
                        log_probs=jax.lax.dynamic_update_slice(loop.log_probs, chosen, at),
                        lengths=loop.lengths + ~loop.done,
                        done=loop.done | jnp.isin(token[:, 0], ends),
                    )

                shape = (tokens.shape[0], max_new_tokens)
                start = _Loop(
                    step=jnp.zeros((), jnp.int32),
                    logits=model.logits(hidden[:, -1:])[:, 0],
                    cache=cache,
                    tokens=jnp.full(shape, pad, jnp.int32),
                    log_probs=jnp.zeros(shape),
                    lengths=jnp.zeros(shape[:1], jnp.int32),
                    done=jnp.zeros(shape[:1], bool),
                )
                end = jax.lax.while_loop(lambda loop: (loop.step < max_new_tokens) & ~loop.done.all(), one, start)
                return end.tokens, end.log_probs, end.lengths, end.done

        self._program = Compiled('rollout', run, out_shardings=layout.replicated)

    def __call__(self, weights: Mapping[str, Array], prompts: Sequence[np.ndarray], key: Key[Array, '']) -> Written:
        """One response to each prompt, ids of at most `prompt_length` tokens. Rows must divide over the mesh."""
        tokens, segments = pad_left(prompts, rows=len(prompts), pad=self._pad, length=self._prompt_length)
        return Written(*map(np.asarray, self._program(weights, tokens, segments, key)))

    def lower(self, weights: Mapping[str, jax.ShapeDtypeStruct], rows: int) -> Any:
        """The program for so many prompts before it is compiled, of the weights' shapes and shardings alone."""
        ids = jax.ShapeDtypeStruct((rows, self._prompt_length), jnp.int32)
        return self._program.lower(weights, ids, ids, jax.eval_shape(lambda: jax.random.key(0)))
