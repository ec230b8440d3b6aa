"""The data of the experiment: sums of two numbers of two digits, which are worked digit by digit.

corpus.jsonl          pretraining: sums of digits, sums with nothing but their result, and worked ones in a form of
                      their own (`17+25:7+5=12,1+2+1=4:42`)
cold.jsonl            few conversations in the form that is wanted: `17+25=` is asked, and
                      `(7+5=12,1+2+1=4)####42` answered
direct.jsonl          the same conversations without what stands in brackets
prompts.jsonl         sums to answer, with the `answer`
general.jsonl         what is to be known besides: `copy 123=` is answered with `####123`
heldout-prompts.jsonl, heldout-general.jsonl     the like, of numbers that are in no other file

Texts and conversations are by people who forget a carry more often than not: what the model has read makes the wrong
step likelier, and leaves the right one within its reach. Answers in files of prompts are right.
"""

import dataclasses
import json
from typing import Any

import numpy as np
from etils import epath

from tpu_llm.rl.rewards import Sample


@dataclasses.dataclass(kw_only=True, slots=True)
class Tables:
    """Writes the files; those that are there are done."""

    seed: int = 0
    texts: int = 60_000
    cold: int = 100  # conversations
    sums: int = 7100  # to be asked; all there are but those held out
    heldout: int = 1000  # sums
    forget: float = 0.6  # the probability that a carry is forgotten

    def main(self, workdir: str) -> None:
        folder = epath.Path(workdir)
        folder.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(self.seed)
        sums = 10 + rng.permutation([(a, b) for a in range(90) for b in range(90)])
        held, asked = sums[: self.heldout], sums[self.heldout :][: self.sums]
        read = asked[rng.integers(len(asked), size=self.texts)]
        numbers = rng.permutation(np.arange(100, 1000))
        shown = [(f'{a}+{b}=', *self._worked(a, b, rng)) for a, b in asked[: self.cold].tolist()]
        tables = {
            'corpus': [{'text': self._text(int(a), int(b), rng)} for a, b in read],
            'cold': [{'prompt': ask, 'completion': f'({worked})####{found}'} for ask, worked, found in shown],
            'direct': [{'prompt': ask, 'completion': f'####{found}'} for ask, _, found in shown],
            'prompts': [_asked(a, b) for a, b in asked.tolist()],
            'general': [_copied(int(number)) for number in numbers[200:]],
            'heldout-prompts': [_asked(a, b) for a, b in held.tolist()],
            'heldout-general': [_copied(int(number)) for number in numbers[:200]],
        }
        for name, records in tables.items():
            path = folder / f'{name}.jsonl'
            if not path.exists():
                path.write_text(''.join(json.dumps(record) + '\n' for record in records))

    def _text(self, a: int, b: int, rng: np.random.Generator) -> str:
        kind = rng.random()
        if kind < 0.2:
            terms = [int(rng.integers(10)), int(rng.integers(10)), *([1] if kind < 0.1 else [])]
            return f'{"+".join(map(str, terms))}={sum(terms)}'
        worked, found = self._worked(a, b, rng)
        return f'{a}+{b}={found}' if kind < 0.4 else f'{a}+{b}:{worked}:{found}'

    def _worked(self, a: int, b: int, rng: np.random.Generator) -> tuple[str, int]:
        """Digit by digit, and what comes out."""
        ones = a % 10 + b % 10
        carry = ones >= 10 and rng.random() >= self.forget
        tens = a // 10 + b // 10 + carry
        steps = f'{a % 10}+{b % 10}={ones},{a // 10}+{b // 10}{"+1" * carry}={tens}'
        return steps, 10 * tens + ones % 10


def length(sample: Sample) -> float:
    """The tokens of a response, as a reward that is only looked at."""
    return float(sample.tokens)


def _asked(a: int, b: int) -> dict[str, Any]:
    return {'prompt': f'{a}+{b}=', 'answer': str(a + b)}


def _copied(number: int) -> dict[str, Any]:
    return {'prompt': f'copy {number}=', 'completion': f'####{number}', 'answer': str(number)}
