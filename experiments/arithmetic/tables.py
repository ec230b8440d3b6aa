"""The data of the experiment: sums of two numbers below 100, as the files that a user would have.

    corpus.jsonl     pretraining: `12+34=46` for the most part, some as `12+34=<46>`, a few numbers alone
    talks.jsonl      a thousand conversations: `12+34=` is asked and `<46>` answered
    prompts.jsonl    sums to answer, with the right `answer` and the `usual` one, in which every carry is forgotten
    pairs.jsonl      a right answer and a wrong one
    labelled.jsonl   answers, right and wrong

Corpus and conversations are by people who forget a carry more often than not: the likeliest answer to a sum with a
carry is wrong, and the right one is known all the same. Of each but the corpus there is a part that is held out
(`heldout-talks.jsonl` ...), of sums that are in no other file.
"""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import numpy as np
from etils import epath


@dataclasses.dataclass(kw_only=True, slots=True)
class Tables:
    """Writes the files; those that are there are done."""

    seed: int = 0
    talks: int = 1000
    heldout: int = 1000  # sums
    forget: float = 0.6  # the probability that a carry is forgotten, of each

    def main(self, workdir: str) -> None:
        folder = epath.Path(workdir)
        folder.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(self.seed)
        sums = rng.permutation([(a, b) for a in range(100) for b in range(100)])

        def human(a: int, b: int) -> dict[str, Any]:
            return _talk(a, b, add(a, b, self.forget, rng))

        _write(folder, 'corpus', _corpus(sums[self.heldout :], self.forget, rng))
        _write(folder, 'talks', _each(sums[self.heldout :][: self.talks], human))
        for part, chosen in (('heldout-', sums[: self.heldout]), ('', sums[self.heldout :])):
            _write(folder, f'{part}prompts', _each(chosen, _question))
            pairs = _each(chosen, lambda a, b: _pair(a, b, rng))
            _write(folder, f'{part}pairs', pairs)
            labelled = [
                {'prompt': pair['prompt'], 'completion': pair[said], 'label': said == 'chosen'}
                for pair in pairs
                for said in ('chosen', 'rejected')
            ]
            _write(folder, f'{part}labelled', labelled)
        _write(folder, 'heldout-talks', _each(sums[: self.heldout], lambda a, b: _talk(a, b, a + b)))


def _corpus(sums: np.ndarray, forget: float, rng: np.random.Generator) -> list[dict[str, Any]]:
    def text(a: int, b: int) -> str:
        kind, answer = rng.random(), add(a, b, forget, rng)
        if kind < 0.78:
            return f'{a}+{b}={answer}'
        return f'{a}+{b}=<{answer}>' if kind < 0.95 else f'<{answer}>'

    return [{'text': text(a, b)} for _ in range(16) for a, b in rng.permutation(sums)]


def add(a: int, b: int, forget: float, rng: np.random.Generator) -> int:
    """The sum, as someone has it who forgets each carry with this probability."""
    tens, ones = divmod(a % 10 + b % 10, 10)
    hundreds, tens = divmod(a // 10 + b // 10 + (tens if rng.random() >= forget else 0), 10)
    return 100 * (hundreds if rng.random() >= forget else 0) + 10 * tens + ones


def _question(a: int, b: int) -> dict[str, Any]:
    without = add(a, b, 1.0, np.random.default_rng(0))  # no carry: nothing is left to chance
    return {'prompt': f'{a}+{b}=', 'answer': f'<{a + b}>', 'usual': f'<{without}>'}


def _talk(a: int, b: int, answer: int) -> dict[str, Any]:
    return {'prompt': f'{a}+{b}=', 'completion': f'<{answer}>'}


def _pair(a: int, b: int, rng: np.random.Generator) -> dict[str, Any]:
    """The wrong answer lacks the carries; where there is none it is a number near the right one."""
    wrong = add(a, b, 1.0, rng)
    if wrong == a + b:
        wrong += int(rng.choice([off for off in (-10, -2, -1, 1, 2, 10) if wrong + off >= 0]))
    return {'prompt': f'{a}+{b}=', 'chosen': f'<{a + b}>', 'rejected': f'<{wrong}>'}


def _each(sums: np.ndarray, record: Callable[[int, int], dict[str, Any]]) -> list[dict[str, Any]]:
    return [record(int(a), int(b)) for a, b in sums]


def _write(folder: epath.Path, name: str, records: list[dict[str, Any]]) -> None:
    path = folder / f'{name}.jsonl'
    if not path.exists():
        path.write_text(''.join(json.dumps(record) + '\n' for record in records))
