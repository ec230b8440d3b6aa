"""Judged answers that every machine has: sums right and wrong, for tests, smoke runs and experiments."""

import copy
import dataclasses
from typing import Literal

from tpu_llm.config import ConfigError
from tpu_llm.data import documents
from tpu_llm.data.documents import Document, Documents
from tpu_llm.data.mixture import uniform
from tpu_llm.data.speech import Spoken, Writer
from tpu_llm.data.sums import Sums
from tpu_llm.data.templates import PLAIN
from tpu_llm.data.tokenizer import Tokenizer

Kind = Literal['preference', 'labelled', 'rated', 'ranked', 'steps']
Fault = Literal['wrong', 'terse']


@dataclasses.dataclass(kw_only=True, slots=True)
class JudgedSums:
    """The questions of `Sums`, answered well, `12 + 34 = 46.`, or with a fault: `12 + 34 = 45.` is wrong, `46.` terse.

    A 'preference' is the good answer and the faulty one; 'labelled' and 'rated' are one of them, as likely, of value 1
    or -1; 'ranked' are the good, the terse and the wrong one; 'steps' say the sum's last digit, then the others, and
    the value of each is 1 where it is right, else -1.
    """

    split: Literal['train', 'heldout']
    kind: Kind = 'preference'
    fault: Fault = 'wrong'
    digits: int = 2

    def validate(self) -> None:
        if not 1 <= self.digits <= 3:
            raise ConfigError(f'digits is {self.digits}; write 1, 2 or 3')

    def open(self) -> Documents:
        return _JudgedSums(self)


class _JudgedSums(Documents):
    def __init__(self, source: JudgedSums):
        self.fingerprint = documents.fingerprint('judged sums', *dataclasses.astuple(source))
        self.kind, self._fault = source.kind, source.fault
        self._sums = Sums(split=source.split, digits=source.digits).open()
        self._write: Writer | None = None

    def __len__(self) -> int:
        return len(self._sums)

    def name(self, index: int) -> str:
        return self._sums.name(index)

    def encoded(self, tokenizer: Tokenizer) -> Documents:
        made = copy.copy(self)
        made._write = Writer(tokenizer, PLAIN, PLAIN)
        return made

    def read(self, index: int) -> Document:
        a, b = map(int, self.name(index).split(' + '))
        texts = _steps(a, b) if self.kind == 'steps' else self._texts(a, b)
        if self._write is not None:
            return Document(pairs=self._write(texts))
        said = [message['content'] for text in texts for message in text.messages]
        return Document(text=''.join(dict.fromkeys(said)))

    def _texts(self, a: int, b: int) -> list[Spoken]:
        good, wrong, terse = f'{a} + {b} = {a + b}.', f'{a} + {b} = {_wrong(a, b)}.', f'{a + b}.'
        faulty = wrong if self._fault == 'wrong' else terse
        if self.kind == 'preference':
            return [_said(a, b, good), _said(a, b, faulty)]
        if self.kind == 'ranked':
            return [_said(a, b, answer) for answer in (good, terse, wrong)]
        chosen = uniform('judged', a, b) < 0.5
        return [_said(a, b, good if chosen else faulty, value=1.0 if chosen else -1.0)]


def _wrong(a: int, b: int) -> int:
    """A number near the sum."""
    away = 1 + int(9 * uniform('wrong', a, b))
    return a + b + (away if uniform('side', a, b) < 0.5 or a + b < away else -away)


def _steps(a: int, b: int) -> list[Spoken]:
    """Each step is wrong in a third of the answers."""
    last, rest = (a + b) % 10, (a + b) // 10
    right = [uniform('step', step, a, b) > 1 / 3 for step in (0, 1)]
    last, rest = last if right[0] else (last + 1) % 10, rest if right[1] else rest + 1
    steps = (f'It ends in {last}.', f' Before it is {rest}.')
    return [_said(a, b, ''.join(steps), steps=steps, judged=[1.0 if r else -1.0 for r in right])]


def _said(a: int, b: int, answer: str, **judged) -> Spoken:
    messages = [{'role': 'user', 'content': f'{a} + {b} = ?\n'}, {'role': 'assistant', 'content': answer}]
    return Spoken(messages=messages, since=1, **judged)
