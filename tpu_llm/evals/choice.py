"""Multiple choice by likelihood: the model takes the continuation that is likeliest, however that is normalised.

One pass scores every choice behind the prompt, and behind nothing but `unconditional` for the fourth:

- accuracy          log p(choice | prompt)
- accuracy_tokens   the same a token: longer choices are less likely for no fault of theirs
- accuracy_bytes    the same a byte of the choice, which does not depend on the tokenizer
- accuracy_pmi      log p(choice | prompt) − log p(choice | unconditional), pointwise mutual information: what is likely
                    anyway gains nothing (Holtzman et al., 2021, arXiv 2104.08315)
- probability       of the right choice, among the choices; and
- answer_bits       −log2 p(right choice | prompt) a byte. Both move smoothly with scale where accuracies jump.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np

from tpu_llm.evals.likelihood import Likelihood
from tpu_llm.evals.measures import Measured, mean
from tpu_llm.evals.subject import Subject
from tpu_llm.evals.task import Fields, Form, Outcome, Task, fill


@dataclasses.dataclass(kw_only=True, slots=True)
class Choice(Form):
    """Rows have `choices`, a list of texts, and `answer`, the place of the right one, from 0."""

    kind: ClassVar = 'choice'
    needs: ClassVar = ('choices', 'answer')
    filled: ClassVar = ('prompt', 'continuation')
    falling: ClassVar = ('answer_bits',)
    given: ClassVar = ('choice',)

    continuation: str = ' {choice}'
    unconditional: str = ''  # the context of PMI; '': the beginning of a text

    def names(self) -> tuple[str, ...]:
        return (*_WAYS, 'probability', 'answer_bits')

    def check(self, fields: Fields) -> None:
        Form.check(self, fields)
        choices, answer = fields['choices'], fields['answer']
        if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(each, str) for each in choices):
            raise ValueError(f"field 'choices' is {choices!r}; write a list of at least two texts")
        if len(set(choices)) < len(choices) or '' in choices:
            raise ValueError(f"field 'choices' is {choices!r}; make them different, and none empty")
        if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
            raise ValueError(f"field 'answer' is {answer!r}; write the right choice's place, 0 to {len(choices) - 1}")

    def answered(self, fields: Fields) -> str:
        return self._continuations(fields)[fields['answer']]

    def outcome(self, subject: Subject, task: Task, shots: int) -> Outcome:
        prompts, each = task.prompts(shots), [self._continuations(row.fields) for row in task.rows]
        asked = [[(prompt, text) for text in texts] for prompt, texts in zip(prompts, each, strict=True)]
        anyway = [[(self.unconditional, text) for text in texts] for texts in each]
        unique = list(dict.fromkeys(itertools.chain(*asked, *anyway)))
        found = dict(zip(unique, subject.likelihoods(unique), strict=True))
        weighed = [
            Weighed(row.fields, [found[request] for request in ours], [found[request] for request in others])
            for row, ours, others in zip(task.rows, asked, anyway, strict=True)
        ]
        chosen = [one.chosen() for one in weighed]
        answers = [row.fields['answer'] for row in task.rows]
        metrics = {
            name: mean([float(one[name] == answer) for one, answer in zip(chosen, answers, strict=True)])
            for name in _WAYS
        }
        metrics['probability'] = mean([one.probability() for one in weighed])
        metrics['answer_bits'] = Measured(np.array([one.surprise() for one in weighed]), 'bits')
        samples = [
            {
                'asked': prompt,
                'choices': row.fields['choices'],
                'wanted': row.fields['answer'],
                'log_probs': one.log_probs.tolist(),
                'anyway': one.anyway.tolist(),
                'chosen': taken,
            }
            for prompt, row, one, taken in zip(prompts, task.rows, weighed, chosen, strict=True)
        ]
        return Outcome(metrics, samples)

    def _continuations(self, fields: Fields) -> list[str]:
        return [fill(self.continuation, {**fields, 'choice': choice}) for choice in fields['choices']]


class Weighed:
    """The choices of a row, as the model sees them."""

    def __init__(self, fields: Fields, behind: Sequence[Likelihood], anyway: Sequence[Likelihood]):
        self.answer: int = fields['answer']
        self.log_probs = np.array([each.log_prob for each in behind])
        self.anyway = np.array([each.log_prob for each in anyway])
        self.tokens = np.array([each.tokens for each in behind])
        self.bytes = np.array([len(choice.encode()) for choice in fields['choices']])

    def chosen(self) -> dict[str, int]:
        """By each way to normalise, the likeliest; of equals the first."""
        return {name: int(np.argmax(scores(self))) for name, scores in _WAYS.items()}

    def probability(self) -> float:
        """Of the right choice, where one of them must be."""
        return float(np.exp(self.log_probs[self.answer] - np.logaddexp.reduce(self.log_probs)))

    def surprise(self) -> tuple[float, float]:
        """Nats of the right choice, and its bytes."""
        return -float(self.log_probs[self.answer]), float(self.bytes[self.answer])


_WAYS: dict[str, Callable[[Weighed], np.ndarray]] = {
    'accuracy': lambda weighed: weighed.log_probs,
    'accuracy_tokens': lambda weighed: weighed.log_probs / weighed.tokens,
    'accuracy_bytes': lambda weighed: weighed.log_probs / weighed.bytes,
    'accuracy_pmi': lambda weighed: weighed.log_probs - weighed.anyway,
}
