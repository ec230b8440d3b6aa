"""Least-to-most prompting (Zhou et al., 2022, arXiv 2205.10625): simpler questions first, then the question."""

import dataclasses
import re
from collections.abc import Sequence

from tpu_llm.config import ConfigError
from tpu_llm.evals.prompting import Answer, Example, Prompted, Steps, read
from tpu_llm.evals.task import fill


@dataclasses.dataclass(kw_only=True, slots=True)
class LeastToMost(Prompted):
    """The model says what has to be answered first, one question a line, answers these in turn, and then the question.

    Where it names none (no line ends with a question mark), the question is asked at once; `details` show it.
    """

    most: int = 6  # simpler questions; further ones are left out
    split: str = (
        '{question}\nWhat must be answered first? Write the simpler questions that lead to the answer, one a line, and '
        'do not answer them.'
    )

    def validate(self) -> None:
        Prompted.validate(self)
        if self.most < 1:
            raise ConfigError(f'most is {self.most}; it is at least 1')
        self.places('split', 'question')

    def check(self, examples: Sequence[Example]) -> None:
        Prompted.check(self, examples)
        for each in examples:
            if not each.parts:
                raise ConfigError(
                    f'the example {each.question[:40]!r} has no parts, which this strategy shows; add them'
                )

    def steps(self, question: str, examples: Sequence[Example]) -> Steps:
        shown = ''.join(
            f'{self._splitting(each.question)}\n{_listed([part for part, _ in each.parts])}\n\n' for each in examples
        )
        ((listed,),) = yield self.request(f'{shown}{self._splitting(question)}\n', stop=(*self.stop, '\n\n'))
        parts = [part for part in questions_in(listed) if part != question][: self.most]
        solved = ''.join(
            f'{each.question}\n\n{self._solved([*each.parts, (each.question, each.answer)])}' for each in examples
        )
        text, said = f'{solved}{question}\n\n', ''
        answered: list[tuple[str, str]] = []
        for part in [*parts, question]:
            ((said,),) = yield self.request(f'{text}{self._solved(answered)}{self.asked(part)}')
            answered.append((part, said.strip()))
        return Answer(text=read(said, self.reads, whole=True), said=said, details={'parts': answered[:-1]})

    def _splitting(self, question: str) -> str:
        return fill(self.split, {'question': question})

    def _solved(self, parts: Sequence[tuple[str, str]]) -> str:
        return ''.join(f'{self.asked(part)} {answer}\n\n' for part, answer in parts)


def questions_in(text: str) -> list[str]:
    """The lines that end with a question mark, without numbers or bullets in front."""
    lines = [re.sub(r'^\s*(?:\d+[.):]|[-*•])?\s*', '', line).strip() for line in text.splitlines()]
    return list(dict.fromkeys(line for line in lines if len(line) > 1 and line.endswith('?')))


def _listed(parts: Sequence[str]) -> str:
    return '\n'.join(f'{number}. {part}' for number, part in enumerate(parts, 1))
