"""Conversations that every machine has: questions of addition, for tests, smoke runs and experiments."""

import copy
import dataclasses
from typing import Literal

from tpu_llm.config import ConfigError
from tpu_llm.data import documents
from tpu_llm.data.documents import Document, Documents
from tpu_llm.data.mixture import uniform
from tpu_llm.data.speech import Spoken, Writer
from tpu_llm.data.templates import PLAIN
from tpu_llm.data.tokenizer import Tokenizer

_HELD_OUT = 0.1


@dataclasses.dataclass(kw_only=True, slots=True)
class Sums:
    """All sums of two numbers of up to so many digits: `12 + 34 = ?` is asked, and answered `12 + 34 = 46.`

    A tenth of them is held out, drawn by their numbers.
    """

    split: Literal['train', 'heldout']
    digits: int = 2
    asked: bool = False  # the questions alone, for a policy to answer; rewards find the sum as `answer`

    def validate(self) -> None:
        if not 1 <= self.digits <= 3:
            raise ConfigError(f'digits is {self.digits}; write 1, 2 or 3')

    def open(self) -> Documents:
        return _Sums(self.split, self.digits, self.asked)


class _Sums(Documents):
    def __init__(self, split: str, digits: int, asked: bool):
        self.fingerprint = documents.fingerprint('sums', split, digits, asked)
        self.kind = 'prompt' if asked else 'conversation'
        self._sums = [
            (a, b)
            for a in range(10**digits)
            for b in range(10**digits)
            if (uniform('sums', a, b) < _HELD_OUT) == (split == 'heldout')
        ]
        self._write: Writer | None = None

    def __len__(self) -> int:
        return len(self._sums)

    def name(self, index: int) -> str:
        return '{} + {}'.format(*self._sums[index])

    def encoded(self, tokenizer: Tokenizer) -> Documents:
        made = copy.copy(self)
        made._write = Writer(tokenizer, PLAIN, PLAIN)
        return made

    def read(self, index: int) -> Document:
        a, b = self._sums[index]
        question, answer = f'{a} + {b} = ?\n', f'{a} + {b} = {a + b}.'
        if self.kind == 'prompt':
            return Document(text=question, record={'answer': a + b})
        if self._write is None:
            return Document(text=question + answer)
        messages = [{'role': 'user', 'content': question}, {'role': 'assistant', 'content': answer}]
        return Document(pairs=self._write([Spoken(messages=messages)]))
