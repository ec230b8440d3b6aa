"""A model answers each prompt twice, and a model says which answer follows a principle better: pairs to learn from.

Preferences by an AI (Constitutional AI: Bai et al., 2022, arXiv 2212.08073, section 4.1; RLAIF: Lee et al., 2023, arXiv
2309.00267). `Preferences` reads them: for a reward model and reinforcement learning, or for DPO and its kin.
"""

import dataclasses
from typing import Any, ClassVar

import numpy as np

from tpu_llm.config import ConfigError
from tpu_llm.data.documents import Documents
from tpu_llm.evals.judge import said
from tpu_llm.rl import principles
from tpu_llm.rl.judge import COMPARISON, PLACES, Comparison, Verdicts, preferences
from tpu_llm.rl.reader import open_beside
from tpu_llm.rl.reward_model import asked as messages
from tpu_llm.rl.rewards import Sample
from tpu_llm.rl.writing import Answerer, Part, Records, Write, asked, ended, left_out


@dataclasses.dataclass(kw_only=True, slots=True)
class Prefer(Write):
    """As `Write`, with the better and the worse of two answers: records of `prompt`, `chosen` and `rejected`, and
    beside them the `principle` and the `probability` that the judge gives the chosen one.

    Each pair is judged by one of the principles, in both orders. Left out and counted are answers that were cut or
    empty, prompts whose answers are the same, pairs of which the judge is not `sure`, and those where it said
    something else than a verdict.
    """

    unit: ClassVar = 'pairs'

    principles: str  # a text file, a principle a line
    judge: str = ''  # as `path`; '': the model that answers
    question: str = COMPARISON  # with {rubric}, the principle, and the places of prompt, answers and their names
    names: tuple[str, str] = ('A', 'B')  # what the judge calls the answers, a token each
    judge_template: str = ''  # as `template`
    answers: int = 2
    temperature: float = 1.0
    sure: float = 0.6  # the least probability of the better answer
    least: float = 0.5  # probability that the names must have together, for a verdict

    def validate(self) -> None:
        Write.validate(self)
        if self.answers != 2:
            raise ConfigError(f'answers is {self.answers}; two are compared, so leave it at 2')
        if not 0.5 <= self.sure < 1 or not 0 <= self.least <= 1:
            raise ConfigError(f'sure = {self.sure} must be from 0.5 to below 1, and least = {self.least} from 0 to 1')
        principles.check_form('question', self.question, PLACES)

    def open(self, documents: Documents) -> Part:
        known = principles.read(self.principles)
        answer = Answerer(self)
        verdicts = Verdicts(
            open_beside(self.judge, answer.place, self.dtype),
            self.names,
            template=self.judge_template,
            least=self.least,
        )

        def part(numbers: range) -> tuple[Records, str]:
            answered, long = answer(documents, numbers)
            whole = [samples for _, samples in answered if all(map(ended, samples))]
            pairs = [(a, b) for a, b in whole if a.response != b.response]
            drawn = principles.drawn(known, len(pairs), self.seed, numbers.start)
            compared = [_compared(a, b, principle) for (a, b), principle in zip(pairs, drawn, strict=True)]
            likes = preferences(verdicts, compared, self.question) if compared else np.zeros(0)
            records = [
                _record(a, b, principle, like)
                for (a, b), principle, like in zip(pairs, drawn, likes, strict=True)
                if max(like, 1 - like) >= self.sure
            ]
            unsaid = int(np.isnan(likes).sum())
            cut = sum(not ended(sample) for _, samples in answered for sample in samples)
            return records, (
                f'{left_out(cut, long)}, {len(whole) - len(pairs):,} prompts answered twice the same, '
                f'{len(pairs) - len(records) - unsaid:,} pairs that the judge is not sure of and {unsaid:,} that it '
                'does not answer in form'
            )

        return part


def _compared(a: Sample, b: Sample, principle: str) -> Comparison:
    return Comparison(prompt=said(messages(a)), a=a.response, b=b.response, rubric=principle)


def _record(a: Sample, b: Sample, principle: str, like: float) -> dict[str, Any]:
    better, worse = (a, b) if like >= 0.5 else (b, a)
    return {
        'prompt': asked(a),
        'chosen': better.response,
        'rejected': worse.response,
        'principle': principle,
        'probability': round(max(like, 1 - like), 4),
    }
