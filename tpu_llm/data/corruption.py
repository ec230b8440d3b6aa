"""What is hidden from a model that learns to restore text: tokens (BERT), spans (T5, UL2), or all that follows a cut.

Pure functions of ids and a NumPy generator; `corrupted` makes batches of what they give.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from tpu_llm.data.tokenizer import Tokenizer

NEVER = -1  # the word of a token that is never hidden

# ---------------------------------------------------------------------------------------------------------- tokens


def mask_tokens(
    tokens: np.ndarray, words: np.ndarray, generator: np.random.Generator, *, rate: float, mask: int, vocab_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """(tokens with some hidden, which were chosen), int32 and bool, both `[n]`.

    Words are chosen in random order, each unless it would make the chosen tokens more than `round(rate * n)`, n being
    those that may be (at least 1). Of the chosen tokens 80 % become `mask`, 10 % any of the vocabulary, and 10 % stay.
    `words` numbers the word to which each token belongs (Devlin et al., 2018, arXiv 1810.04805, sections 3.1 and A.1;
    whole words as in the code published with it).
    """
    chosen = np.zeros(len(tokens), bool)
    numbers, sizes = np.unique(words[words != NEVER], return_counts=True)
    free = max(1, round(rate * int(sizes.sum())))
    for i in generator.permutation(len(numbers)):
        if sizes[i] <= free:
            chosen |= words == numbers[i]
            free -= int(sizes[i])
        if not free:
            break
    lot = generator.random(len(tokens))
    drawn = generator.integers(0, vocab_size, len(tokens))
    hidden = np.where(lot < 0.8, mask, np.where(lot < 0.9, drawn, tokens))
    return np.where(chosen, hidden, tokens).astype(np.int32), chosen


class WordStarts:
    """Which ids begin a word: what follows white space, or holds it at its beginning.

    Raises ConfigError for a tokenizer that has no text.
    """

    def __init__(self, tokenizer: Tokenizer):
        # How a token is written may depend on there being one before it: a space is dropped, or put in.
        probe = tokenizer.encode('a')
        before = len(tokenizer.decode_bytes(probe))
        written = [tokenizer.decode_bytes([*probe, index])[before:] for index in range(tokenizer.vocab_size)]
        self._opens = np.array([text[:1].isspace() for text in written])
        self._closes = np.array([text[-1:].isspace() for text in written])

    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        """bool[n]; the first token begins one."""
        starts = self._opens[tokens]
        starts[:1] = True
        starts[1:] |= self._closes[tokens[:-1]]
        return starts


# ---------------------------------------------------------------------------------------------------------- spans


def span_lengths(length: int, rate: float, mean: float, generator: np.random.Generator) -> tuple[np.ndarray, ...]:
    """(lengths of the kept spans, of the hidden ones); a text is kept, hidden, kept … hidden. It has 2 tokens or more.

    `round(rate * length)` tokens are hidden, at least 1 and not all, in `round(hidden / mean)` spans, at least 1; all
    ways to cut the kept and the hidden tokens into so many spans are equally likely (Raffel et al., 2019, arXiv
    1910.10683, section 3.1.4, and the code published with it).
    """
    hidden = min(max(round(rate * length), 1), length - 1)
    kept = length - hidden
    spans = min(max(round(hidden / mean), 1), hidden, kept)
    return _cut(kept, spans, generator), _cut(hidden, spans, generator)


def most_spans(length: int, rate: float, mean: float) -> int:
    """No text of at most `length` tokens has more hidden spans than that."""
    return max(round(max(round(rate * length), 1) / mean), 1)


def _cut(items: int, parts: int, generator: np.random.Generator) -> np.ndarray:
    """Lengths of so many parts, none empty, that add up to `items`."""
    cuts = 1 + np.sort(generator.choice(items - 1, parts - 1, replace=False))
    return np.diff(np.concatenate([[0], cuts, [items]]))


def hide_spans(
    text: np.ndarray, lengths: tuple[np.ndarray, ...], sentinels: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """(source, target): in the source a sentinel stands for each hidden span, in the target before it."""
    edges = np.cumsum(np.stack(lengths, axis=1).reshape(-1))[:-1]
    pieces = np.split(text, edges)
    source, target = [], []
    for sentinel, kept, hidden in zip(sentinels, pieces[::2], pieces[1::2], strict=False):
        source += [kept, [sentinel]]
        target += [[sentinel], hidden]
    return np.concatenate(source).astype(np.int32), np.concatenate(target).astype(np.int32)


@dataclasses.dataclass(frozen=True, slots=True)
class Denoiser:
    """How much of a text is hidden, and in what spans."""

    rate: float
    mean: float  # tokens of a span; 0: there is one, at the end
    mode: int = 0  # index in MODES

    def hide(
        self, text: np.ndarray, sentinels: Sequence[int], generator: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """`hide_spans` of random ones; the text has 2 tokens or more."""
        mean = self.mean or len(text)
        return hide_spans(text, span_lengths(len(text), self.rate, mean, generator), sentinels)


MODES = ('[NLU]', '[S2S]', '[NLG]')  # as released: regular, sequential and extreme denoising

# Tay et al., 2022, arXiv 2205.05131, section 3.1.2 and table 1. The one span of the sequential one stands at the end.
UL2 = (
    Denoiser(0.15, 3.0, 0),
    Denoiser(0.15, 8.0, 0),
    Denoiser(0.25, 0.0, 1),
    Denoiser(0.5, 3.0, 2),
    Denoiser(0.5, 8.0, 2),
    Denoiser(0.15, 64.0, 2),
    Denoiser(0.5, 64.0, 2),
)

# --------------------------------------------------------------------------------------------------------- prefixes


def prefix_length(length: int, generator: np.random.Generator) -> int:
    """How many of the tokens are given, from none to all but one, equally likely (Raffel et al., section 3.2.1)."""
    return int(generator.integers(length))
