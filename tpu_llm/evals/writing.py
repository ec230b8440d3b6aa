"""A model writes on from prompts, batched by length, up to what stops it."""

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from tpu_llm.arrays import Array, Key
from tpu_llm.config import ConfigError
from tpu_llm.data.chat import ChatTemplate
from tpu_llm.data.tokenizer import Tokenizer
from tpu_llm.evals.subject import Ask
from tpu_llm.infer.generate import bucket, check_new_tokens, decode, for_decoding, pad_left
from tpu_llm.infer.sampling import Greedy, Sample, Until
from tpu_llm.models.graph import ModelGraph
from tpu_llm.parallel import sharding
from tpu_llm.parallel.sharding import Layout

Program = Any  # compiled by jax, for prompts of one length


class Writing:
    """Holds the programs, one for each length and way to ask. `rows` prompts are continued at a time.

    Draws depend on (seed, the batch, the row in it, the position), and so on `rows`.
    """

    def __init__(
        self,
        graph: ModelGraph,
        tokenizer: Tokenizer,
        *,
        rows: int,
        layout: Layout | None = None,
        chat: bool = False,
        seed: int = 0,
    ):
        """With `chat` a prompt is what a user says. Raises ConfigError for a tokenizer without a chat template."""
        if chat and tokenizer.chat_template is None:
            raise ConfigError('the tokenizer has no chat template: this model continues text; take chat out')
        self._graph, self._tokenizer, self._rows, self._layout, self._seed = graph, tokenizer, rows, layout, seed
        self._template = ChatTemplate(tokenizer.chat_template) if chat and tokenizer.chat_template else None
        self._max_length: int = graph.bind(graph.shapes()).max_length
        self._programs: dict[Any, Program] = {}

    def __call__(
        self, weights: Mapping[str, Array], prompts: Sequence[str] | Sequence[np.ndarray], ask: Ask
    ) -> list[list[str]]:
        """`ask.times` continuations of each prompt, which may be given as ids.

        Raises ConfigError for one that is too long for the model.
        """
        check_new_tokens(ask.max_new_tokens)
        ids = [self._ids(prompt) for prompt in prompts]
        self._check_length(max(map(len, ids), default=0), ask)
        by_length: dict[int, list[int]] = collections.defaultdict(list)
        for number, each in enumerate(ids):
            by_length[bucket(len(each))] += [number] * ask.times
        written: list[list[str]] = [[] for _ in prompts]
        for length, numbers in sorted(by_length.items()):
            program = self._program(length, ask)
            for at in range(0, len(numbers), self._rows):
                part = numbers[at : at + self._rows]
                tokens, segments = pad_left(
                    [ids[number] for number in part], rows=self._rows, pad=self._tokenizer.pad, length=length
                )
                key = jax.random.fold_in(jax.random.fold_in(jax.random.key(self._seed), length), at)
                out = np.asarray(program(weights, tokens, segments, key))
                for number, row in zip(part, out, strict=False):
                    written[number].append(self._text(row, ask.stop))
        return written

    def _ids(self, prompt: str | np.ndarray) -> np.ndarray:
        if isinstance(prompt, np.ndarray):
            return prompt
        if self._template is None:
            ids = self._tokenizer.encode(prompt)
            begin = [self._tokenizer.bos] if self._tokenizer.add_bos or not len(ids) else []
            return np.concatenate([begin, ids]).astype(np.int32)
        messages = [{'role': 'user', 'content': prompt}]
        return self._template.encode(self._tokenizer, messages, add_generation_prompt=True)

    def _check_length(self, longest: int, ask: Ask) -> None:
        length = longest + ask.max_new_tokens
        if 0 < self._max_length < length:
            raise ConfigError(
                f'the longest prompt and max_new_tokens = {ask.max_new_tokens} are {length} tokens together but the '
                f'model has {self._max_length} learned positions; take fewer shots'
            )

    def _program(self, length: int, ask: Ask) -> Program:
        key = (length, ask.max_new_tokens, ask.temperature, ask.stop)
        if key not in self._programs:
            self._programs[key] = self._compiled(ask)
        return self._programs[key]

    def _compiled(self, ask: Ask) -> Program:
        tokenizer, layout, graph = self._tokenizer, self._layout, self._graph
        drawing = Sample(temperature=ask.temperature) if ask.temperature else Greedy()
        sampling = Until(drawing, ends=enders(tokenizer, ask.stop), end=tokenizer.eos)
        on_cpu = (layout.platform if layout else jax.default_backend()) == 'cpu'

        def run(weights: Mapping[str, Array], tokens: Array, segments: Array, key: Key[Array, '']) -> Array:
            with sharding.use(layout and layout.decoding):
                model = graph.bind(weights)
                return decode(
                    for_decoding(model) if on_cpu else model,
                    tokens,
                    segments,
                    key,
                    max_new=ask.max_new_tokens,
                    sampling=sampling,
                    eos=tokenizer.eos,
                    vocab_size=tokenizer.vocab_size,
                )

        return jax.jit(run, out_shardings=layout.replicated if layout else None)

    def _text(self, row: np.ndarray, stop: Sequence[str]) -> str:
        ends = np.flatnonzero(row == self._tokenizer.eos)
        text = self._tokenizer.decode(row[: ends[0] if len(ends) else len(row)].tolist())
        return cut(text, stop)


def cut(text: str, stop: Sequence[str]) -> str:
    """What stands before the first of the stops."""
    places = [at for each in stop if (at := text.find(each)) >= 0]
    return text[: min(places)] if places else text


def enders(tokenizer: Tokenizer, stop: Sequence[str]) -> tuple[int, ...]:
    """The tokens after which nothing that is written counts: marks that end a turn, and what begins with a stop.

    A stop in more tokens, or in the middle of one, is cut out of the text, and what follows it was written in vain.
    """
    stops = tuple(each.encode() for each in stop)
    begin = (index for index in range(tokenizer.vocab_size) if stops and _bytes(tokenizer, index).startswith(stops))
    return tuple(sorted({*tokenizer.stops, tokenizer.eos, *begin}))


def _bytes(tokenizer: Tokenizer, index: int) -> bytes:
    return tokenizer.decode_bytes([index])
