"""Ways to ask a question: at once, behind examples, with reasoning, or many times and by vote.

A strategy's `steps` is a generator: it yields what it wants to have written and is sent the texts. So a way of asking
reads from top to bottom, and many questions go side by side, what they want at the same time in one batch.
"""

import abc
import collections
import dataclasses
import re
import string
from collections.abc import Callable, Generator, Hashable, Sequence
from typing import Any, ClassVar, Literal

from tpu_llm.config import ConfigError
from tpu_llm.evals import answers
from tpu_llm.evals.subject import Ask
from tpu_llm.evals.task import fill

Texts = list[list[str]]
Write = Callable[[Sequence[str], Ask], Texts]  # `Subject.write`: `ask.times` continuations of each prompt
Reads = Literal['text', 'number', 'letter']


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """A question that is answered already; some strategies want to see how."""

    question: str
    answer: str
    reasoning: str = ''  # that leads to the answer
    parts: tuple[tuple[str, str], ...] = ()  # simpler questions, each with its answer, that lead there


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    text: str | None  # None where the model gave none that can be read
    said: str  # the text that it was read from
    details: dict[str, Any] = dataclasses.field(default_factory=dict)  # how it came to that, JSON-ready


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
    prompts: tuple[str, ...]
    ask: Ask


Steps = Generator[Request, Texts, Answer]


class Strategy(abc.ABC):
    examples: ClassVar[Literal['none', 'some', 'any']] = 'any'  # whether it shows them

    def check(self, examples: Sequence[Example]) -> None:
        """Raises ConfigError for examples that do not show what this strategy wants to see."""
        name = type(self).__name__
        if self.examples == 'none' and examples:
            raise ConfigError(f'{name} shows no example, and there are {len(examples)}; give none')
        if self.examples == 'some' and not examples:
            raise ConfigError(f'{name} shows examples, and there are none; give at least one')

    @abc.abstractmethod
    def steps(self, question: str, examples: Sequence[Example]) -> Steps: ...

    def ask(self, question: str, examples: Sequence[Example], write: Write) -> Answer:
        return ask_all(self, [question], examples, write)[0]


@dataclasses.dataclass(kw_only=True, slots=True)
class Prompted(Strategy):
    """What all but the vote share."""

    reads: Reads = 'text'  # what an answer is: a text, a number, or the letter of a choice
    max_new_tokens: int = 256  # of each text that is written
    temperature: float = 0.0
    question: str = 'Q: {question}\nA:'
    stop: tuple[str, ...] = ('\nQ:',)  # base models go on, and ask themselves

    def validate(self) -> None:
        if self.max_new_tokens < 1 or self.temperature < 0:
            raise ConfigError(
                f'max_new_tokens = {self.max_new_tokens} must be at least 1, temperature = {self.temperature} not '
                'negative'
            )
        self.places('question', 'question')

    def places(self, template: str, *names: str) -> None:
        """Raises ConfigError unless the template has these places and no others."""
        held = set(re.findall(r'\{(\w+)\}', getattr(self, template)))
        if held != set(names):
            wanted = ' and '.join(f'{{{name}}}' for name in names)
            raise ConfigError(f'{template} is {getattr(self, template)!r}; its places must be {wanted}')

    def request(self, *prompts: str, **changes: Any) -> Request:
        ask = Ask(max_new_tokens=self.max_new_tokens, stop=self.stop, temperature=self.temperature)
        return Request(prompts, dataclasses.replace(ask, **changes))

    def asked(self, question: str) -> str:
        return fill(self.question, {'question': question})


def ask_all(strategy: Strategy, questions: Sequence[str], examples: Sequence[Example], write: Write) -> list[Answer]:
    """The answer to each question, all asked side by side.

    Raises ConfigError for examples that do not fit, and for a `write` that returns anything but texts of each prompt.
    """
    strategy.check(examples)
    asking = together([strategy.steps(question, examples) for question in questions])
    texts = None
    while True:
        try:
            request = asking.send(texts)  # type: ignore[arg-type]  # the first is None, as generators want it
        except StopIteration as end:
            return end.value
        texts = write(request.prompts, request.ask)
        if [len(each) for each in texts if not isinstance(each, str)] != [request.ask.times] * len(request.prompts):
            raise ConfigError(
                f'write was given {len(request.prompts)} prompts; it returns a list for each, of {request.ask.times} '
                '(ask.times) texts'
            )


def together(each: Sequence[Steps]) -> Generator[Request, Texts, list[Answer]]:
    """All of them side by side: whatever they want to have written in the same way is one request."""
    answered: dict[int, Answer] = {}
    waiting: dict[int, Request] = {}

    def go_on(at: int, texts: Texts | None) -> None:
        try:
            waiting[at] = each[at].send(texts)  # type: ignore[arg-type]
        except StopIteration as end:
            answered[at] = end.value

    for at in range(len(each)):
        go_on(at, None)
    while waiting:
        ask = next(iter(waiting.values())).ask
        same = {at: request.prompts for at, request in waiting.items() if request.ask == ask}
        texts = iter((yield Request(tuple(prompt for prompts in same.values() for prompt in prompts), ask)))
        for at, prompts in same.items():
            del waiting[at]
            go_on(at, [next(texts) for _ in prompts])
    return [answered[at] for at in range(len(each))]


# -------------------------------------------------------------------------------------------------- ways of asking


@dataclasses.dataclass(kw_only=True, slots=True)
class ZeroShot(Prompted):
    """The question alone."""

    examples: ClassVar = 'none'

    def steps(self, question: str, examples: Sequence[Example]) -> Steps:
        shown = ''.join(f'{self.asked(each.question)} {each.answer}\n\n' for each in examples)
        ((said,),) = yield self.request(shown + self.asked(question))
        return Answer(text=read(said, self.reads, whole=True), said=said)


@dataclasses.dataclass(kw_only=True, slots=True)
class FewShot(ZeroShot):
    """Behind examples and their answers (Brown et al., 2020, arXiv 2005.14165)."""

    examples: ClassVar = 'some'


@dataclasses.dataclass(kw_only=True, slots=True)
class ChainOfThought(Prompted):
    """Behind examples that reason before they answer (Wei et al., 2022, arXiv 2201.11903)."""

    examples: ClassVar = 'some'

    def check(self, examples: Sequence[Example]) -> None:
        Strategy.check(self, examples)
        for each in examples:
            if not each.reasoning:
                raise ConfigError(
                    f'the example {each.question[:40]!r} has no reasoning, which this strategy shows; add it'
                )

    def steps(self, question: str, examples: Sequence[Example]) -> Steps:
        shown = ''.join(
            f'{self.asked(each.question)} {each.reasoning} The answer is {each.answer}.\n\n' for each in examples
        )
        ((said,),) = yield self.request(shown + self.asked(question))
        return Answer(text=read(said, self.reads), said=said)


@dataclasses.dataclass(kw_only=True, slots=True)
class ZeroShotChainOfThought(Prompted):
    """Asked to think step by step, and then for the answer (Kojima et al., 2022, arXiv 2205.11916)."""

    examples: ClassVar = 'none'

    think: str = " Let's think step by step."
    conclude: str = '\nTherefore, the answer is'

    def steps(self, question: str, examples: Sequence[Example]) -> Steps:
        thinking = self.asked(question) + self.think
        ((reasoning,),) = yield self.request(thinking)
        ((said,),) = yield self.request(thinking + reasoning.rstrip() + self.conclude, stop=(*self.stop, '\n'))
        return Answer(text=read(said, self.reads, whole=True), said=said, details={'reasoning': reasoning})


@dataclasses.dataclass(kw_only=True, slots=True)
class SelfConsistency(Strategy):
    """The same strategy many times, at a temperature, and the answer that most of them come to (Wang et al., 2022,
    arXiv 2203.11171). What has no answer has no vote; of equally many, the first that was given wins.
    """

    base: Prompted
    times: int = 10
    temperature: float = 0.7

    def validate(self) -> None:
        if self.times < 2 or not self.temperature > 0:
            raise ConfigError(
                f'times = {self.times} and temperature = {self.temperature}: a vote takes 2 or more, and above 0, so '
                'that they differ'
            )

    def check(self, examples: Sequence[Example]) -> None:
        self.base.check(examples)

    def steps(self, question: str, examples: Sequence[Example]) -> Steps:
        base = dataclasses.replace(self.base, temperature=self.temperature)
        given = yield from together([base.steps(question, examples) for _ in range(self.times)])
        return voted(given, base.reads)


def voted(given: Sequence[Answer], reads: Reads) -> Answer:
    """The answer with the most votes, and these."""
    votes: dict[Hashable, list[Answer]] = collections.defaultdict(list)
    for each in given:
        if each.text is not None:
            votes[key(each.text, reads)].append(each)
    details: dict[str, Any] = {
        'votes': {str(same[0].text): len(same) for same in votes.values()},
        'without': sum(each.text is None for each in given),
        'said': [each.said for each in given],
    }
    if not votes:
        return Answer(text=None, said=given[0].said, details=details)
    first = max(votes.values(), key=len)[0]
    return Answer(text=first.text, said=first.said, details=details)


# ------------------------------------------------------------------------------------------------ reading answers

_ANSWER_IS = re.compile(r'\banswer\s*(?:is|:)\s*:?', re.IGNORECASE)
_LETTER = re.compile(r'\(([A-Z])\)|^([A-Z])(?=[.):,]|$)')


def read(said: str, reads: Reads, *, whole: bool = False) -> str | None:
    """The answer in a text: what it marks (\\boxed{}, ####), or what stands behind its last `answer is`.

    A number is else the last one of the text; a letter stands in brackets or by itself. With `whole` a text that says
    neither is the answer itself, up to the end of its first line: it was asked for nothing else. None where there is no
    answer.
    """
    found = answers.marked(said)
    if found is None and (places := list(_ANSWER_IS.finditer(said))):
        found = _line(said[places[-1].end() :])
        found = re.split(r'[.;]\s', found)[0] if reads == 'number' else found  # what follows is no part of it
    if found is None and whole:
        found = _line(said)
    if reads == 'number':
        quantity = answers.last_quantity(said if found is None else found)
        if quantity is None:
            return None
        return f'{_decimal(quantity)} {quantity.unit}'.rstrip()
    if found and reads == 'letter':
        letter = _LETTER.search(found)
        return letter[1] or letter[2] if letter else None
    return found or None


def key(answer: str, reads: Reads) -> Hashable:
    """Equal for answers that say the same: numbers in any unit, texts but for case, space, punctuation at the ends."""
    if reads == 'number' and (quantity := answers.last_quantity(answer)):
        return quantity.value, quantity.dimension
    return ' '.join(answer.casefold().split()).strip(string.punctuation + ' ')


def _line(text: str) -> str:
    """The first line that says something, without quotes, stars and a full stop around it."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return re.sub(r'^["*\s]+|["*.\s]+$', '', lines[0]) if lines else ''


def _decimal(quantity: answers.Quantity) -> str:
    number = quantity.written
    rest = number.denominator
    for factor in (2, 5):
        while rest % factor == 0:
            rest //= factor
    if rest != 1:
        return str(number)  # no decimal is equal to it
    places = 0
    while (number * 10**places).denominator != 1:
        places += 1
    return f'{float(number):.{places}f}' if places else str(number)
