"""Texts of which every token is scored: perplexity of tokens, words and bytes, and bits per byte.

Words are what stands between white space, counted in the text as it is (as lm-eval does), so word perplexity and bits
per byte compare models of different tokenizers; the perplexity of tokens does not.
"""

import dataclasses
import re
from typing import ClassVar

import numpy as np

from tpu_llm.evals.measures import Measured
from tpu_llm.evals.subject import Subject
from tpu_llm.evals.task import Fields, Form, Outcome, Task, fill


@dataclasses.dataclass(kw_only=True, slots=True)
class Texts(Form):
    """Rows are written out by `prompt`, by default their field `text`, one document each."""

    kind: ClassVar = 'perplexity'
    takes_shots: ClassVar = False
    falling: ClassVar = ('bits_per_byte', 'byte_perplexity', 'word_perplexity', 'token_perplexity')

    prompt: str = '{text}'
    continuation: str = ''

    def names(self) -> tuple[str, ...]:
        return self.falling

    def check(self, fields: Fields) -> None:
        Form.check(self, fields)
        if not fill(self.prompt, fields):
            raise ValueError('the text is empty; there is nothing to score')

    def answered(self, fields: Fields) -> str:
        return ''

    def outcome(self, subject: Subject, task: Task, shots: int) -> Outcome:
        texts = task.prompts(0)
        found = subject.rolling(texts)
        nats = np.array([-each.log_prob for each in found])

        def per(counts: list[int], form: str) -> Measured:
            return Measured(np.stack([nats, np.array(counts, np.float64)], axis=1), form)

        bytes_of = [len(text.encode()) for text in texts]
        metrics = {
            'bits_per_byte': per(bytes_of, 'bits'),
            'byte_perplexity': per(bytes_of, 'perplexity'),
            'word_perplexity': per([words(text) for text in texts], 'perplexity'),
            'token_perplexity': per([each.tokens for each in found], 'perplexity'),
        }
        samples = [
            {'asked': text, 'log_prob': each.log_prob, 'tokens': each.tokens}
            for text, each in zip(texts, found, strict=True)
        ]
        return Outcome(metrics, samples)


def words(text: str) -> int:
    return len(re.split(r'\s+', text))
