"""A language model as judge (RLAIF: Lee et al., 2023, arXiv 2309.00267): asked a question, and its next token weighed.

It writes nothing: of its distribution over the next token only the allowed answers count. Where these have too little
of the probability, the judge was about to say something else, and that is an error, not a verdict.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from tpu_llm.arrays import Array
from tpu_llm.config import ConfigError
from tpu_llm.data.documents import Document
from tpu_llm.data.prompts import Asker
from tpu_llm.evals.judge import said
from tpu_llm.rl.reader import Beside, Reader, Surroundings, open_beside
from tpu_llm.rl.reward_model import asked
from tpu_llm.rl.rewards import Sample, Scores

_QUESTION = """\
{rubric}

[The prompt]
{prompt}

[The response]
{response}

[Your verdict: one of {answers}, and nothing else]
"""
PLACES = ('rubric', 'prompt', 'first', 'second', 'a', 'b')  # in the question which of two is better
COMPARISON = """\
{rubric}

[The prompt]
{prompt}

[Response {first}]
{a}

[Response {second}]
{b}

[The better response: {first} or {second}, and nothing else]
"""


class Verdicts:
    """A judge at work: the probability of each allowed answer to a question."""

    def __init__(
        self, beside: Beside, answers: Sequence[str], *, template: str = '', system: str = '', least: float = 0.5
    ):
        """Raises ConfigError for an answer that is not one token of the judge's."""
        tokenizer = beside.tokenizer
        ids = [tokenizer.encode(answer).tolist() for answer in answers]
        for answer, each in zip(answers, ids, strict=True):
            if len(each) != 1:
                raise ConfigError(
                    f'the answer {answer!r} is {len(each)} tokens of the judge; take one that is one token'
                )
        if len({each[0] for each in ids}) < len(ids):
            raise ConfigError(f'the answers {", ".join(map(repr, answers))} are not all different tokens of the judge')
        self.answers, self._least = tuple(answers), least
        self._ask = Asker(tokenizer, template, system)
        chosen = np.asarray(ids, np.int32)[:, 0]

        def say(model: Any, hidden: Array) -> Array:
            return jnp.take(jax.nn.log_softmax(model.logits(hidden)[:, 0]), chosen, axis=1)

        self._read = Reader('judge', beside, say)

    def __call__(self, questions: Sequence[str]) -> np.ndarray:
        """float64[n, answers]: log-probs among the answers, which sum to 1 as probabilities.

        Raises ValueError where the judge gives all of them together less than `least`.
        """
        log_probs, mass = self._weighed(questions)
        if (mass < self._least).any():
            at = int(mass.argmin())
            raise ValueError(
                f'the judge does not answer in form: {", ".join(self.answers)} have together the probability '
                f'{mass[at]:.2g} of its next token, less than least = {self._least:g}'
            )
        return log_probs

    def in_form(self, questions: Sequence[str]) -> np.ndarray:
        """The same, NaN where the judge gives them less than `least`."""
        log_probs, mass = self._weighed(questions)
        return np.where(mass[:, None] < self._least, np.nan, log_probs)

    def _weighed(self, questions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The log-probs among the answers, and the probability that these have together."""
        log_probs = self._read([self._ask(Document(text=question)) for question in questions])
        mass = np.exp(log_probs).sum(axis=1)
        return log_probs - np.log(mass)[:, None], mass


@dataclasses.dataclass(kw_only=True, slots=True)
class Judge:
    """A model's verdict on each response, by a rubric.

    `score`: 'expected' is the mean of `values` under the probabilities of the answers; 'log_odds' is log p(first
    answer) - log p(second), of two.
    """

    on_mesh: ClassVar = True

    rubric: str  # what is good, and what each answer means
    path: str = ''  # of the judge; '': the run's reference
    name: str = 'judge'
    weight: float = 1.0
    answers: tuple[str, ...] = ('1', '2', '3', '4', '5')  # a token each
    values: tuple[float, ...] = (1.0, 2.0, 3.0, 4.0, 5.0)  # what they are worth
    score: Literal['expected', 'log_odds'] = 'expected'
    template: str = ''  # as in `data.conversations`, of the judge
    system: str = ''
    least: float = 0.5  # probability that the answers must have together
    dtype: Literal['float32', 'bfloat16'] = 'float32'  # in which its weights are held and used

    def validate(self) -> None:
        if len(self.answers) < 2 or (self.score == 'expected' and len(self.values) != len(self.answers)):
            raise ConfigError(f'there are {len(self.answers)} answers and {len(self.values)} values; give one for each')
        if self.score == 'log_odds' and len(self.answers) != 2:
            raise ConfigError(f"score = 'log_odds' is of two answers, not {len(self.answers)}")
        if not 0 <= self.least <= 1:
            raise ConfigError(f'least is {self.least}; write a probability')

    def open(self, surroundings: Surroundings) -> Scores:
        beside = open_beside(self.path, surroundings, self.dtype)
        verdicts = Verdicts(beside, self.answers, template=self.template, system=self.system, least=self.least)

        def judge(samples: Sequence[Sample]) -> np.ndarray:
            log_probs = verdicts([self._question(sample) for sample in samples])
            if self.score == 'log_odds':
                return log_probs[:, 0] - log_probs[:, 1]
            return np.exp(log_probs) @ np.asarray(self.values)

        return judge

    def _question(self, sample: Sample) -> str:
        answers = ', '.join(answer.strip() for answer in self.answers)
        prompt = said(asked(sample))
        return _QUESTION.format(rubric=self.rubric, prompt=prompt, response=sample.response, answers=answers)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Two responses to one prompt, and what makes one the better."""

    rubric: str
    prompt: str
    a: str
    b: str


def preferences(verdicts: Verdicts, comparisons: Sequence[Comparison], question: str = COMPARISON) -> np.ndarray:
    """float64[n]: the probability that `a` is the better one (Bai et al., 2022, arXiv 2212.08073, section 4.1); NaN
    where the judge does not answer in form.

    `verdicts` has two answers, the names of what stands first and second. Each pair is judged in both orders and the
    two are averaged, since judges favour a place (arXiv 2309.00267, section 2.1.1).
    """
    first, second = (answer.strip() for answer in verdicts.answers)

    def ask(c: Comparison, a: str, b: str) -> str:
        return question.format(rubric=c.rubric, prompt=c.prompt, first=first, second=second, a=a, b=b)

    given = [ask(c, c.a, c.b) for c in comparisons]
    swapped = [ask(c, c.b, c.a) for c in comparisons]
    chosen = np.exp(verdicts.in_form(given + swapped)[:, 0])
    return (chosen[: len(comparisons)] + 1 - chosen[len(comparisons) :]) / 2
