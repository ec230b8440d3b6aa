"""Tasks that are asked by a strategy of `prompting`: with reasoning, by parts, by vote, along a tree."""

import dataclasses
from typing import Any, ClassVar

from tpu_llm.config import ConfigError, nearest, validate
from tpu_llm.evals.generative import wanted
from tpu_llm.evals.least_to_most import LeastToMost
from tpu_llm.evals.measures import mean
from tpu_llm.evals.prompting import (
    ChainOfThought,
    Example,
    FewShot,
    Prompted,
    Reads,
    SelfConsistency,
    Strategy,
    ZeroShot,
    ZeroShotChainOfThought,
    ask_all,
    key,
)
from tpu_llm.evals.subject import Subject
from tpu_llm.evals.task import Fields, Form, Outcome, Row, Task, fill
from tpu_llm.evals.tree_of_thoughts import TreeOfThoughts

STRATEGIES: dict[str, type[Prompted]] = {
    'zero-shot': ZeroShot,
    'few-shot': FewShot,
    'chain-of-thought': ChainOfThought,
    'zero-shot-chain-of-thought': ZeroShotChainOfThought,
    'least-to-most': LeastToMost,
    'tree-of-thoughts': TreeOfThoughts,
}


@dataclasses.dataclass(kw_only=True, slots=True)
class Reasoned(Form):
    """Rows have `answer`, a text or a number, or a list of such of which any will do; examples have besides `reasoning`
    or `parts`, [[question, answer], …], where the strategy shows them.

    With `votes` the strategy is asked so often, at `temperature`, and the answers vote (self-consistency).
    """

    kind: ClassVar = 'reasoned'
    writes: ClassVar = True
    needs: ClassVar = ('answer',)
    given: ClassVar = ('answer',)

    prompt: str = '{question}'  # what the strategy is given to ask
    continuation: str = ' {answer}'
    strategy: str
    reads: Reads
    max_new_tokens: int
    options: dict[str, Any] = dataclasses.field(default_factory=dict)  # further fields of the strategy
    votes: int = 1
    temperature: float = 0.7  # of votes

    def validate(self) -> None:
        Form.validate(self)
        if self.strategy not in STRATEGIES:
            there = ', '.join(STRATEGIES)
            raise ConfigError(f'strategy is {self.strategy!r}{nearest(self.strategy, STRATEGIES)}; there are {there}')
        if self.votes < 1:
            raise ConfigError(f'votes is {self.votes}; it is at least 1')
        fields = {field.name for field in dataclasses.fields(STRATEGIES[self.strategy])} - {'reads', 'max_new_tokens'}
        for name in self.options:
            if name not in fields:
                raise ConfigError(f'options has {name!r}{nearest(name, fields)}; there are {", ".join(sorted(fields))}')
        validate(self.asking(), 'options')

    def names(self) -> tuple[str, ...]:
        return 'accuracy', 'answered'

    def asking(self) -> Strategy:
        kind = STRATEGIES[self.strategy]
        options: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in self.options.items()
        }
        base = kind(reads=self.reads, max_new_tokens=self.max_new_tokens, **options)
        return SelfConsistency(base=base, times=self.votes, temperature=self.temperature) if self.votes > 1 else base

    def check(self, fields: Fields) -> None:
        Form.check(self, fields)
        wanted(fields)
        if fields.get('example'):
            _example(self, fields)

    def answered(self, fields: Fields) -> str:
        return fill(self.continuation, {**fields, 'answer': wanted(fields)[0]})

    def outcome(self, subject: Subject, task: Task, shots: int) -> Outcome:
        examples = [_example(self, row.fields) for row in task.examples[:shots]]
        questions = [fill(self.prompt, row.fields) for row in task.rows]
        answers = ask_all(self.asking(), questions, examples, subject.write)
        right = [self._right(each.text, row) for each, row in zip(answers, task.rows, strict=True)]
        samples = [
            {'asked': question, 'answer': each.text, 'said': each.said, 'wanted': wanted(row.fields)} | each.details
            for question, each, row in zip(questions, answers, task.rows, strict=True)
        ]
        answered = [float(each.text is not None) for each in answers]
        return Outcome({'accuracy': mean(right), 'answered': mean(answered)}, samples)

    def _right(self, text: str | None, row: Row) -> float:
        any_of = {key(each, self.reads) for each in wanted(row.fields)}
        return float(text is not None and key(text, self.reads) in any_of)


def _example(form: Reasoned, fields: Fields) -> Example:
    """Raises ValueError for parts that are none."""
    parts = fields.get('parts', [])
    if not isinstance(parts, list) or not all(isinstance(each, list) and len(each) == 2 for each in parts):
        raise ValueError(f"field 'parts' is {parts!r}; write [[question, answer], …]")
    return Example(
        question=fill(form.prompt, fields),
        answer=wanted(fields)[0],
        reasoning=str(fields.get('reasoning', '')),
        parts=tuple((str(question), str(answer)) for question, answer in parts),
    )
