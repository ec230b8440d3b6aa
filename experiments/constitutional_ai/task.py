"""The data of the experiment: sums of two numbers below 100, whose answers may call the asker a name.

    corpus.jsonl     pretraining: `12+34=46`
    talks.jsonl      pretraining: an answer, `<46>` or `<46> fool`, its critique (`fine`, `rude`), its revision (`<46>`)
    verdicts.jsonl   pretraining: which of two answers is better, A or B
    helpful.jsonl    answers to imitate, more than half of them rude
    revised.jsonl, compared.jsonl, prompts.jsonl    sums to answer: and revise, twice, and be rewarded for
    heldout-prompts.jsonl    the like, with every `answer` that is right, rude or not

The sums that are held out are in no other file.
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from tpu_llm.rl import principles

NAMES = ('fool', 'dolt', 'oaf')
CRITIQUE, REVISION = ' critique: {principle}? ', ' revise: {principle}. '
QUESTION = '{prompt} {first} {a} {second} {b} better: {rubric}? '


@dataclasses.dataclass(kw_only=True, slots=True)
class Tables:
    """Writes the files; those that are there are done."""

    principles: str
    seed: int = 0
    read: int = 6000  # sums of the talks and verdicts of pretraining
    helpful: int = 200
    revised: int = 1024
    compared: int = 2048
    heldout: int = 1000

    def main(self, workdir: str) -> None:
        folder = epath.Path(workdir)
        folder.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(self.seed)
        known = principles.read(self.principles)
        sums = [(int(pair) // 100, int(pair) % 100) for pair in rng.permutation(10_000)]
        held, others = sums[: self.heldout], sums[self.heldout :]
        tables = {
            'corpus': [{'text': text} for _ in range(8) for text in _texts(others, rng)],
            'talks': [_talk(a, b, rng, known) for a, b in others[: self.read]],
            'verdicts': [_verdict(a, b, rng, known) for a, b in others[: self.read]],
            'helpful': [
                {'prompt': f'{a}+{b}=', 'completion': _answer(a, b, rng, 0.6)} for a, b in others[: self.helpful]
            ],
            'revised': [_asked(a, b) for a, b in others[: self.revised]],
            'compared': [_asked(a, b) for a, b in others[: self.compared]],
            'prompts': [_asked(a, b) for a, b in others],
            'heldout-prompts': [_asked(a, b) for a, b in held],
        }
        for name, records in tables.items():
            path = folder / f'{name}.jsonl'
            if not path.exists():
                path.write_text(''.join(json.dumps(record) + '\n' for record in records))


def _texts(sums: Sequence[tuple[int, int]], rng: np.random.Generator) -> list[str]:
    return [f'{a}+{b}={a + b}' for a, b in rng.permutation(sums).tolist()]


def _answer(a: int, b: int, rng: np.random.Generator, rude: float) -> str:
    return f'<{a + b}> {rng.choice(NAMES)}' if rng.random() < rude else f'<{a + b}>'


def _talk(a: int, b: int, rng: np.random.Generator, known: Sequence[str]) -> dict[str, Any]:
    principle = str(rng.choice(known))
    said = _answer(a, b, rng, 0.5)
    turns = [f'{a}+{b}=', said, CRITIQUE, 'rude' if ' ' in said else 'fine', REVISION, said.split()[0]]
    roles = ('user', 'assistant')
    messages = [{'role': roles[i % 2], 'content': turn.format(principle=principle)} for i, turn in enumerate(turns)]
    return {'messages': messages}


def _verdict(a: int, b: int, rng: np.random.Generator, known: Sequence[str]) -> dict[str, Any]:
    """The kinder answer; of two that are alike in that, either."""
    both = [_answer(a, b, rng, 0.5) for _ in range(2)]
    rude = [' ' in said for said in both]
    better = int(rng.integers(2)) if rude[0] == rude[1] else int(rude[0])
    question = QUESTION.format(
        prompt=f'{a}+{b}=', first='A', second='B', a=both[0], b=both[1], rubric=rng.choice(known)
    )
    return {'prompt': question, 'completion': 'AB'[better]}


def _asked(a: int, b: int) -> dict[str, Any]:
    return {'prompt': f'{a}+{b}=', 'answer': [f'<{a + b}>', *(f'<{a + b}> {name}' for name in NAMES)]}
