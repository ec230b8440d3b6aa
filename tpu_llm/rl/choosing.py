"""A model answers prompts several times, rewards judge the answers, and what is worth learning from is kept.

The best answer of each prompt is rejection sampling (Llama 2: Touvron et al., 2023, arXiv 2307.09288, section 3.2.2;
DeepSeek-R1, arXiv 2501.12948, section 2.3.3), to be imitated. The best and the worst are a pair of iterative preference
training (Xu et al., 2023, arXiv 2312.16682; Dong et al., 2024, arXiv 2405.07863).
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import jax
import numpy as np

from tpu_llm.checkpoint import agree
from tpu_llm.config import ConfigError, schedule
from tpu_llm.data.documents import Documents, Head
from tpu_llm.rl.prompts import Prompt
from tpu_llm.rl.rewards import OnError, Panel, Sample, check
from tpu_llm.rl.writing import Answerer, Part, Records, Write, asked, ended, left_out

# Fields of a prompt's record that a source of answers would take for its own.
_READ = ('prompt', 'completion', 'completions', 'chosen', 'rejected', 'label', 'labels', 'score', 'margin')
_READ += ('messages', 'conversations', 'instruction', 'output')


@dataclasses.dataclass(kw_only=True, slots=True)
class Choose(Write):
    """As `Write`, of `answers` to each prompt only what the rewards choose; a judge without a path is the model itself.

    A record is the prompt's, with `completion`, or with `chosen` and `rejected`, which `Conversations` and
    `Preferences` read. Answers that are cut or empty are neither judged nor kept, equal ones judged once.
    """

    unit: ClassVar = 'prompts kept'

    rewards: tuple[Any, ...]
    keep: Literal['best', 'pairs'] = 'best'
    answers: int = 4
    temperature: float = 1.0
    least: float = -math.inf  # of 'best': what an answer must be worth
    margin: float = 0.0  # of 'pairs': they differ in worth by more
    prompts: int = 0  # the first so many; 0: all
    on_error: OnError = schedule('stop')
    timeout: float = schedule(30.0)  # seconds a sample that a reward may take

    def validate(self) -> None:
        Write.validate(self)
        if not self.rewards:
            raise ConfigError('rewards is empty; give what the answers are judged by')
        if self.keep == 'pairs' and self.answers < 2:
            raise ConfigError(f"answers is {self.answers}; a pair is of two: keep = 'pairs' takes 2 or more")
        if self.keep == 'pairs' and self.least > -math.inf:
            raise ConfigError(f"least = {self.least:g} is of keep = 'best'; for pairs set margin")
        if self.keep == 'best' and self.margin:
            raise ConfigError(f"margin = {self.margin:g} is of keep = 'pairs'; for the best set least")
        if self.margin < 0 or self.prompts < 0 or self.timeout <= 0:
            raise ConfigError('margin and prompts must not be negative, and timeout above 0')

    def documents(self) -> Documents:
        documents = Write.documents(self)
        documents = Head(documents, self.prompts) if self.prompts else documents
        check(self.rewards, [documents], self.on_error)
        return documents

    def open(self, documents: Documents) -> Part:
        answer = Answerer(self)
        first = agree.first if jax.process_count() > 1 else None
        panel = Panel(
            self.rewards, answer.place, on_error=self.on_error, timeout=self.timeout, first=first, skips='on_error=skip'
        )

        def part(numbers: range) -> tuple[Records, str]:
            answered, long = answer(documents, numbers)
            said = [(prompt, _distinct(samples)) for prompt, samples in answered]
            flat = [sample for _, samples in said for sample in samples]
            worth = panel(flat).total if flat else np.zeros(0)
            rest = iter(worth)
            found = [
                self._chosen(prompt, samples, np.array(list(itertools.islice(rest, len(samples)))))
                for prompt, samples in said
            ]
            records = [record for record in found if record]
            cut = sum(not ended(sample) for _, samples in answered for sample in samples)
            failed = int(np.isnan(worth).sum())
            missing = f'{len(found) - len(records):,} prompts without {self._wanted()}'
            return records, f'{left_out(cut, long)}, {missing}, {failed:,} answers that no reward could judge'

        return part

    def _chosen(self, prompt: Prompt, samples: Sequence[Sample], worth: np.ndarray) -> dict[str, Any]:
        """The record of a prompt; none, {}, where nothing is worth keeping. Of equals the first."""
        if np.isnan(worth).all():
            return {}
        best, worst = int(np.nanargmax(worth)), int(np.nanargmin(worth))
        others = {name: value for name, value in (prompt.document.record or {}).items() if name not in _READ}
        record = {'prompt': asked(samples[best]), **others}
        if self.keep == 'best':
            return record | {'completion': samples[best].response} if worth[best] >= self.least else {}
        if worth[best] - worth[worst] <= self.margin:
            return {}
        return record | {'chosen': samples[best].response, 'rejected': samples[worst].response}

    def _wanted(self) -> str:
        if self.keep == 'pairs':
            return f'two more than {self.margin:g} apart'
        return 'an answer' + (f' worth {self.least:g}' if self.least > -math.inf else '')


def _distinct(samples: Sequence[Sample]) -> list[Sample]:
    """Those that can be learned from; of equal answers the first."""
    found: dict[str, Sample] = {}
    for sample in samples:
        if ended(sample):
            found.setdefault(sample.response, sample)
    return list(found.values())
