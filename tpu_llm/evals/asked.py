"""A model at work as the subject of tasks."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from tpu_llm.arrays import Array
from tpu_llm.data.tokenizer import Tokenizer
from tpu_llm.evals.likelihood import Likelihood, Likelihoods
from tpu_llm.evals.subject import Ask
from tpu_llm.evals.writing import Writing
from tpu_llm.infer.generate import for_decoding
from tpu_llm.models.decoder import Decoder
from tpu_llm.models.graph import ModelGraph
from tpu_llm.nn.param import named_params

Weights = Mapping[str, Array]
Write = Callable[[Sequence[str], Ask], list[list[str]]]


class Asked:
    """A `Subject`. Programs for writing are made where something is to be written."""

    def __init__(self, likelihoods: Likelihoods, write: Callable[[], Write], weights: Weights | None = None):
        """`weights`, where they are not those that `likelihoods` holds."""
        self._likelihoods, self._weights = likelihoods, weights
        self._make_write = functools.cache(write)

    def likelihoods(self, requests: Sequence[tuple[str, str]]) -> list[Likelihood]:
        return self._likelihoods(requests, self._weights)

    def rolling(self, texts: Sequence[str]) -> list[Likelihood]:
        return self._likelihoods.rolling(texts, self._weights)

    def write(self, prompts: Sequence[str], ask: Ask) -> list[list[str]]:
        return self._make_write()(prompts, ask)


def of_model(model: Decoder, tokenizer: Tokenizer, *, rows: int, chat: bool, seed: int, max_length: int = 0) -> Asked:
    """A model with its weights, on the device where these lie."""

    def write() -> Write:
        # Laid out for decoding once, and not in each program.
        made: Any = for_decoding(model) if jax.default_backend() == 'cpu' else model
        writing = Writing(ModelGraph(made), tokenizer, rows=rows, chat=chat, seed=seed)
        return functools.partial(writing, {path: leaf.get_value() for path, leaf in named_params(made)})

    return Asked(Likelihoods(model, tokenizer, rows=rows, max_length=max_length), write)
