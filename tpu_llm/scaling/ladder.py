"""Which runs to make for a law: sizes and tokens, their FLOPs by the models' own count.

Models are given by name, since what a size means (width and depth together, heads, learning rate) is an experiment's
to say. A rung's tokens are whole batches, so its FLOPs are near the budget, not equal to it; both are kept.

    isoflop        approach 2 of Hoffmann et al. (2022): sizes of one budget each
    horizons       their approach 1: each size for several lengths, every run with a schedule of its own
    per_parameter  sizes, each for so many tokens a parameter
    crossed        Kaplan et al. (2020): each size with each amount of data

Their approach 3 fits a law to runs of any of these.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tpu_llm.config import ConfigError
from tpu_llm.models.flops_encoder import ModelConfig, train_flops
from tpu_llm.nn.param import count_parameters


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Rung:
    """One run to make: `tokens` are `steps` batches."""

    name: str
    model: Any
    parameters: int
    steps: int
    tokens: int
    flops: float
    budget: float  # FLOPs aimed at


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Ladder:
    """Sizes to choose from, and the batches that they are to be trained with."""

    models: Mapping[str, ModelConfig]
    batch_tokens: int
    seq_len: int

    def isoflop(self, budgets: Sequence[float]) -> Iterator[Rung]:
        """Each size for each budget of FLOPs."""
        for budget in _positive('budgets', budgets):
            for name, model in self.models.items():
                tokens = budget / train_flops(model, self.seq_len)
                yield self.rung(f'{_short(budget)}-{name}', name, tokens, budget)

    def horizons(self, tokens: float, factors: Sequence[float] = (1, 2, 4, 8, 16)) -> Iterator[Rung]:
        """Each size for `tokens` times each factor."""
        for factor in _positive('factors', factors):
            for name in self.models:
                yield self.rung(f'{name}-{_short(tokens * factor)}', name, tokens * factor)

    def per_parameter(self, ratio: float) -> Iterator[Rung]:
        """Each size for `ratio` tokens a parameter; 20 is about the optimum of Hoffmann et al."""
        _positive('ratio', [ratio])
        for name, model in self.models.items():
            yield self.rung(f'{name}-{ratio:g}x', name, ratio * count_parameters(model.make()))

    def crossed(self, tokens: Sequence[float]) -> Iterator[Rung]:
        """Each size with each number of tokens."""
        for each in _positive('tokens', tokens):
            for name in self.models:
                yield self.rung(f'{name}-{_short(each)}', name, each)

    def rung(self, called: str, name: str, tokens: float, budget: float = 0.0) -> Rung:
        """The run of a size for about so many tokens. Raises ConfigError where that is less than one batch."""
        model = self.models[name]
        steps = round(tokens / self.batch_tokens)
        if not steps:
            raise ConfigError(
                f'{called}: {tokens:.4g} tokens are no whole batch of {self.batch_tokens}; leave this size out, or '
                'raise its budget'
            )
        flops = steps * self.batch_tokens * train_flops(model, self.seq_len)
        return Rung(
            name=called,
            model=model,
            parameters=count_parameters(model.make()),
            steps=steps,
            tokens=steps * self.batch_tokens,
            flops=flops,
            budget=budget or flops,
        )


def _positive(field: str, values: Sequence[float]) -> Sequence[float]:
    if not values or min(values) <= 0:
        raise ConfigError(f'{field} = {list(values)}; write one or more numbers above 0')
    return values


def _short(number: float) -> str:
    """`1e12`, `2.5e12`: a number as a name has it."""
    digits, _, power = f'{number:.4e}'.partition('e')
    return f'{float(digits):g}e{int(power)}'
