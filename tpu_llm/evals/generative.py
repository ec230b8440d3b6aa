"""Tasks that are answered in writing, and compared with what was wanted."""

import dataclasses
from typing import ClassVar

from tpu_llm.config import ConfigError, nearest
from tpu_llm.evals import text_metrics
from tpu_llm.evals.measures import Measured, mean
from tpu_llm.evals.subject import Ask, Subject
from tpu_llm.evals.task import Fields, Form, Outcome, Task, fill
from tpu_llm.evals.text_metrics import Ignore, Leniency


@dataclasses.dataclass(kw_only=True, slots=True)
class Generative(Form):
    """Rows have `answer`, a text or a number, or a list of such of which any will do; the best counts."""

    kind: ClassVar = 'generative'
    writes: ClassVar = True
    needs: ClassVar = ('answer',)
    given: ClassVar = ('answer',)

    continuation: str = ' {answer}'
    metrics: tuple[str, ...]  # of `text_metrics.METRICS`
    max_new_tokens: int
    stop: tuple[str, ...] = ('\n',)  # an answer ends before the first of them
    ignore: tuple[Ignore, ...] = ()  # by exact and f1
    relative: float = 0.0  # by numeric: max(absolute, relative * |answer|) may be between
    absolute: float = 0.0

    def validate(self) -> None:
        Form.validate(self)
        if not self.metrics:
            raise ConfigError(f'metrics is empty; give at least one of {", ".join(text_metrics.METRICS)}')
        for name in self.metrics:
            if name not in text_metrics.METRICS:
                there = ', '.join(text_metrics.METRICS)
                raise ConfigError(f'metrics has {name!r}{nearest(name, text_metrics.METRICS)}; there are {there}')
        if self.max_new_tokens < 1:
            raise ConfigError(f'max_new_tokens is {self.max_new_tokens}; it is at least 1')
        if '' in self.stop:
            raise ConfigError('stop has an empty text, which stands everywhere; take it out')
        if self.relative < 0 or self.absolute < 0:
            raise ConfigError(f'relative is {self.relative} and absolute {self.absolute}; write 0 or more')

    def names(self) -> tuple[str, ...]:
        return tuple(self.metrics)

    def check(self, fields: Fields) -> None:
        Form.check(self, fields)
        for answer in wanted(fields):
            if 'numeric' in self.metrics:
                text_metrics.quantity_of(answer)

    def answered(self, fields: Fields) -> str:
        return fill(self.continuation, {**fields, 'answer': wanted(fields)[0]})

    def outcome(self, subject: Subject, task: Task, shots: int) -> Outcome:
        text_metrics.check(self.metrics)
        prompts = task.prompts(shots)
        ask = Ask(max_new_tokens=self.max_new_tokens, stop=self.stop)
        said = [texts[0] for texts in subject.write(prompts, ask)]
        answers = [wanted(row.fields) for row in task.rows]
        samples = [
            {'asked': prompt, 'said': text, 'wanted': answer}
            for prompt, text, answer in zip(prompts, said, answers, strict=True)
        ]
        return Outcome({name: self._measured(name, said, answers) for name in self.metrics}, samples)

    def _measured(self, name: str, said: list[str], answers: list[list[str]]) -> Measured:
        if name in text_metrics.OF_CORPORA:
            return Measured(text_metrics.corpus_statistics(name, [text.strip() for text in said], answers), name)
        metric = text_metrics.OF_ROWS[name]
        leniency = Leniency(ignore=self.ignore, relative=self.relative, absolute=self.absolute)
        return mean(
            [
                max(metric(text, answer, leniency) for answer in any_of)
                for text, any_of in zip(said, answers, strict=True)
            ]
        )


def wanted(fields: Fields) -> list[str]:
    """The answers of which any will do. Raises ValueError where there is none."""
    given = fields['answer']
    answers = given if isinstance(given, list) else [given]
    if not answers or not all(isinstance(each, (str, int, float)) and not isinstance(each, bool) for each in answers):
        raise ValueError(f"field 'answer' is {given!r}; write a text or a number, or a list of such")
    return [str(each) for each in answers]
