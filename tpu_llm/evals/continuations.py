"""Requests as ids: a context, and what is to be scored behind it. As in lm-eval, so that scores can be compared."""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from tpu_llm.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, slots=True)
class Pair:
    """int32 `[n]` each, and neither empty."""

    context: np.ndarray
    continuation: np.ndarray


class Encoder:
    """Ids of texts. With `special`, marks that are written in them are marks."""

    def __init__(self, tokenizer: Tokenizer, special: bool):
        self._tokenizer, self._special = tokenizer, special
        self._begin = np.asarray([tokenizer.bos], np.int32)

    def ids(self, text: str) -> np.ndarray:
        """Of the text alone."""
        return self._tokenizer.encode(text, special=self._special)

    def framed(self, text: str) -> np.ndarray:
        """With the begin mark, where the tokenizer asks for one and the text has none."""
        ids = self.ids(text)
        if not self._tokenizer.add_bos or ids[:1].tolist() == self._begin.tolist():
            return ids
        return np.concatenate([self._begin, ids])

    def pairs(self, requests: Sequence[tuple[str, str]]) -> list[Pair]:
        """Raises ValueError for a continuation that adds no token to its context."""
        context_ids = functools.cache(self.framed)
        return [self._pair(context, continuation, context_ids) for context, continuation in requests]

    def _pair(self, context, continuation, context_ids) -> Pair:
        """The ids behind those that the context has alone; an empty context is the begin mark."""
        moved = context.rstrip()
        asked, context, continuation = (context, continuation), moved, context[len(moved) :] + continuation
        if asked[0]:
            before = context_ids(context)
            added = self.framed(context + continuation)[len(before) :]
        else:
            before, added = self._begin, self.ids(continuation)
            added = added[1:] if added[:1].tolist() == before.tolist() else added
        if not len(added):
            raise ValueError(
                f'the continuation {asked[1]!r} adds no token to its context {asked[0][-40:]!r}; begin it with a '
                'space, or write more of it'
            )
        return Pair(before if len(before) else self._begin, added)


def shorten(pair: Pair, most: int) -> Pair:
    """With the last ids of the context alone where all but the last id of both are more than `most`.

    Raises ValueError where the continuation alone is.
    """
    if len(pair.continuation) > most:
        raise ValueError(
            f'a continuation of {len(pair.continuation)} tokens is longer than max_length = {most}; score it by rolling'
        )
    return Pair(pair.context[max(0, len(pair.context) + len(pair.continuation) - most - 1) :], pair.continuation)


def windows(ids: np.ndarray, begin: int, most: int) -> list[Pair]:
    """Continuations that make up all of `ids`, of up to `most`; the last has as much context as there is room for."""
    framed = np.concatenate([[begin], ids]).astype(np.int32)
    starts = range(0, len(ids), most)
    return [
        Pair(framed[max(0, min(start + most, len(ids)) - most) : start + 1], ids[start : start + most])
        for start in starts
    ]
