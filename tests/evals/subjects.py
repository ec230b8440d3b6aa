"""Models that are tables: what they hold likely and what they write is known."""

import dataclasses
from collections.abc import Callable, Sequence

from tpu_llm.evals.likelihood import Likelihood
from tpu_llm.evals.subject import Ask


@dataclasses.dataclass
class Table:
    """`log_prob(context, continuation)`, tokens of `width` characters; `says(prompt, number)` is what is written."""

    log_prob: Callable[[str, str], float] = lambda context, continuation: 0.0
    says: Callable[[str, int], str] = lambda prompt, number: ''
    width: int = 1
    asked: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    asks: list[Ask] = dataclasses.field(default_factory=list)

    def likelihoods(self, requests: Sequence[tuple[str, str]]) -> list[Likelihood]:
        self.asked += requests
        return [self._likelihood(context, continuation) for context, continuation in requests]

    def rolling(self, texts: Sequence[str]) -> list[Likelihood]:
        return [self._likelihood('', text) for text in texts]

    def write(self, prompts: Sequence[str], ask: Ask) -> list[list[str]]:
        self.asks.append(ask)
        return [[self.says(prompt, number) for number in range(ask.times)] for prompt in prompts]

    def _likelihood(self, context: str, text: str) -> Likelihood:
        tokens = -(-len(text) // self.width)
        return Likelihood(log_prob=self.log_prob(context, text), tokens=tokens, bytes=len(text.encode()), greedy=False)
