"""What tasks ask of a model: how likely texts are to it, and what it writes."""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

from tpu_llm.evals.likelihood import Likelihood


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Ask:
    """How to continue prompts."""

    max_new_tokens: int
    stop: tuple[str, ...] = ()  # what is written ends before the first of them
    temperature: float = 0.0  # 0: the likeliest tokens
    times: int = 1  # continuations of each prompt


class Subject(Protocol):
    def likelihoods(self, requests: Sequence[tuple[str, str]]) -> list[Likelihood]:
        """Of each continuation behind its context."""
        ...

    def rolling(self, texts: Sequence[str]) -> list[Likelihood]:
        """Of whole texts, however long."""
        ...

    def write(self, prompts: Sequence[str], ask: Ask) -> list[list[str]]:
        """`ask.times` continuations of each prompt."""
        ...
