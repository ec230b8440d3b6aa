"""A language model as judge of what others wrote: a score by a rubric, or the better of two, and the reason for it.

The judge writes its reason and then its verdict, in a form. What is not in the form is no verdict: it is asked again, a
bounded number of times, and then counted, or stopped at; it is never guessed. (Zheng et al., 2023, arXiv 2306.05685.)
"""

import collections
import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from tpu_llm.config import ConfigError, RunError
from tpu_llm.evals.intervals import Estimate, mean, share
from tpu_llm.evals.prompting import Write
from tpu_llm.evals.subject import Ask
from tpu_llm.evals.task import fill

Winner = Literal['a', 'b', 'tie']

_SCORE = """\
{rubric}

[The prompt]
{prompt}

[The response]
{response}

{form}
"""
_COMPARISON = """\
{rubric}

[The prompt]
{prompt}

[Response A]
{first}

[Response B]
{second}

{form}
"""
_FORM = 'Answer in this form, and say nothing else:\nReason: why, in one or two sentences\nVerdict: {answers}'
_AGAIN = '\n\nMind the form: first a line that begins with "Reason:", then a line that is "Verdict:" and {answers}.'
_VERDICT = re.compile(r'^[\W_]*verdict[\W_]*:[\W_]*(.*?)[\W_]*$', re.IGNORECASE | re.MULTILINE)


@dataclasses.dataclass(kw_only=True, slots=True)
class Rubric:
    """What is good, by which criteria, and what each score means."""

    text: str
    criteria: tuple[str, ...] = ()
    lowest: int = 1
    highest: int = 5
    scale: tuple[str, ...] = ()  # what each score means, from the lowest on; () leaves it to the judge

    def validate(self) -> None:
        if not self.text.strip():
            raise ConfigError('text is empty; say what is good')
        if self.lowest >= self.highest:
            raise ConfigError(f'lowest is {self.lowest} and highest {self.highest}; a scale has two scores or more')
        if self.scale and len(self.scale) != self.highest - self.lowest + 1:
            raise ConfigError(
                f'scale says what {len(self.scale)} scores mean, and there are {self.highest - self.lowest + 1}: give '
                'each, from the lowest on, or none'
            )

    @property
    def scores(self) -> list[int]:
        return list(range(self.lowest, self.highest + 1))

    def written(self, *, scale: bool) -> str:
        """For the judge's eyes; the scale is of no use where two are compared."""
        lines = [self.text.strip()]
        if self.criteria:
            lines += ['', 'Criteria:', *(f'- {each}' for each in self.criteria)]
        if scale and self.scale:
            lines += ['', 'Scores:', *(f'{at}: {each}' for at, each in zip(self.scores, self.scale, strict=True))]
        return '\n'.join(lines)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """`value` is None where the judge was not in form in any try; `said` is what it wrote last."""

    value: str | None
    reason: str
    tries: int
    said: str


@dataclasses.dataclass(frozen=True, slots=True)
class Compared:
    """The verdict on two responses, from both orders.

    The same response must be the better one in both, else it is a tie: `consistent` is False. Where one of the two
    verdicts is missing there is no winner, and `consistent` is None.
    """

    winner: Winner | None
    consistent: bool | None
    given: Verdict  # A is a, B is b
    swapped: Verdict  # A is b, B is a


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    prompt: str
    a: str
    b: str


@dataclasses.dataclass(kw_only=True, slots=True)
class Judge:
    rubric: Rubric
    ties: bool = True  # whether it may say that two are equally good
    max_new_tokens: int = 256  # of a reason and a verdict
    retries: int = 2  # further tries where it was not in form, told to mind it
    retry_temperature: float = 0.7  # of these; the first is the likeliest text
    no_verdict: Literal['count', 'stop'] = 'count'  # what to do with it when all tries failed

    def validate(self) -> None:
        if self.max_new_tokens < 1 or self.retries < 0 or self.retry_temperature < 0:
            raise ConfigError(
                f'max_new_tokens = {self.max_new_tokens} must be at least 1, retries = {self.retries} and '
                f'retry_temperature = {self.retry_temperature} not negative'
            )

    def scores(
        self, items: Sequence[tuple[str, str]], write: Write, where: Callable[[int], str] = '{}'.format
    ) -> list[Verdict]:
        """Of each (prompt, response); a value is one of `rubric.scores`, as text.

        `where` names an item in errors. Raises RunError where one gets no verdict and no_verdict is 'stop'.
        """
        values = [str(score) for score in self.rubric.scores]
        answers = f'one whole number from {values[0]} to {values[-1]}'
        rubric = self.rubric.written(scale=True)
        questions = [
            fill(_SCORE, {'rubric': rubric, 'prompt': prompt, 'response': response, 'form': _form(answers)})
            for prompt, response in items
        ]
        return self._asked(questions, values, answers, write, where)

    def compare(self, pairs: Sequence[Pair], write: Write, where: Callable[[int], str] = '{}'.format) -> list[Compared]:
        """Each pair in both orders, since judges favour a place. Otherwise as `scores`."""
        values = ['A', 'B', 'tie'] if self.ties else ['A', 'B']
        answers = ' or '.join([', '.join(values[:-1]), values[-1]])
        rubric = self.rubric.written(scale=False)

        def ask(pair: Pair, first: str, second: str) -> str:
            fields = {'rubric': rubric, 'prompt': pair.prompt, 'first': first, 'second': second}
            return fill(_COMPARISON, {**fields, 'form': _form(answers)})

        count = len(pairs)
        questions = [ask(pair, pair.a, pair.b) for pair in pairs] + [ask(pair, pair.b, pair.a) for pair in pairs]
        verdicts = self._asked(questions, values, answers, write, lambda at: where(at % count))
        return [_compared(*both) for both in zip(verdicts[:count], verdicts[count:], strict=True)]

    def _asked(
        self, questions: Sequence[str], values: Sequence[str], answers: str, write: Write, where: Callable[[int], str]
    ) -> list[Verdict]:
        """A verdict on each question; those without one are asked again, together."""
        verdicts: dict[int, Verdict] = {}
        left = list(range(len(questions)))
        for tries in range(1, self.retries + 2):
            again = '' if tries == 1 else _AGAIN.replace('{answers}', answers)
            ask = Ask(max_new_tokens=self.max_new_tokens, temperature=self.retry_temperature if again else 0.0)
            texts = write([questions[at] + again for at in left], ask)
            for at, (text,) in zip(left, texts, strict=True):
                value, reason = read(text, values) or (None, '')
                verdicts[at] = Verdict(value=value, reason=reason, tries=tries, said=text)
            left = [at for at in left if verdicts[at].value is None]
            if not left:
                break
        if left and self.no_verdict == 'stop':
            last = ' '.join(verdicts[left[0]].said.split())[-120:]
            raise RunError(
                f'{where(left[0])}: the judge did not answer in form in {self.retries + 1} tries; its last words are '
                f'{last!r}. Raise max_new_tokens or retries, take another judge, or set no_verdict=count'
            )
        return [verdicts[at] for at in range(len(questions))]


def read(text: str, values: Sequence[str]) -> tuple[str, str] | None:
    """The verdict and the reason in front of it; None where there is not exactly one verdict, or no reason."""
    found = list(_VERDICT.finditer(text))
    known = {value.casefold(): value for value in values}
    given = {known.get(match[1].casefold()) for match in found}
    if len(given) != 1 or None in given:
        return None
    reason = re.sub(r'^[\W_]*reason[\W_]*:[*_\s]*', '', text[: found[0].start()], flags=re.IGNORECASE).strip()
    (value,) = given
    return (str(value), reason) if reason else None


def _form(answers: str) -> str:
    return _FORM.replace('{answers}', answers)


def _compared(given: Verdict, swapped: Verdict) -> Compared:
    names: dict[str | None, Winner] = {'A': 'a', 'B': 'b', 'tie': 'tie'}
    back: dict[str | None, Winner] = {'A': 'b', 'B': 'a', 'tie': 'tie'}
    one, other = names.get(given.value), back.get(swapped.value)
    if one is None or other is None:
        return Compared(None, None, given, swapped)
    return Compared(one if one == other else 'tie', one == other, given, swapped)


def said(messages: str | Sequence[Mapping[str, Any]]) -> str:
    """A prompt as text: of one message what it says; of several, each is told by whom."""
    if isinstance(messages, str):
        return messages
    if len(messages) == 1:
        return messages[0]['content']
    return '\n\n'.join(f'{message["role"]}: {message["content"] or ""}' for message in messages)


# ---------------------------------------------------------------------------------------------------------- summaries


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Comparisons:
    """What came of many pairs."""

    a: int
    b: int
    ties: int
    inconsistent: int  # of the ties: another response was better once the two were swapped
    without: int
    points: Estimate  # of a, of all pairs with a winner or a tie: a win is 1, a tie a half
    first: Estimate  # share of verdicts for the response that stands first, of those for one of them: 0.5 is fair


def summary(compared: Sequence[Compared]) -> Comparisons:
    wins = collections.Counter(each.winner for each in compared)
    worth = {'a': 1.0, 'b': 0.0, 'tie': 0.5}
    chosen = [verdict.value for each in compared for verdict in (each.given, each.swapped)]
    return Comparisons(
        a=wins['a'],
        b=wins['b'],
        ties=wins['tie'],
        inconsistent=sum(each.consistent is False for each in compared),
        without=wins[None],
        points=mean(np.array([worth[each.winner] for each in compared if each.winner])),
        first=share(chosen.count('A'), chosen.count('A') + chosen.count('B')),
    )


def mean_score(verdicts: Sequence[Verdict]) -> Estimate:
    """Of those with a value."""
    return mean([float(each.value) for each in verdicts if each.value is not None])
