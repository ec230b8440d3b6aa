"""What a model's answers to held-out prompts are worth, by the rewards of a run or others: a hook for any run."""

import dataclasses
import functools
import math
from typing import Any, ClassVar

import jax
import numpy as np

from tpu_llm.arrays import Array
from tpu_llm.checkpoint import agree
from tpu_llm.config import ConfigError, Periodic, machine, schedule
from tpu_llm.data.prompts import Asker
from tpu_llm.data.tokenizer import Tokenizer
from tpu_llm.infer.generate import check_new_tokens
from tpu_llm.parallel.rules import BATCH
from tpu_llm.rl.prompts import Prompt, of_prompts
from tpu_llm.rl.rewards import Panel, Sample, check
from tpu_llm.rl.sampler import Sampler


@dataclasses.dataclass(kw_only=True, slots=True)
class HeldOutAnswers(Periodic):
    """An answer to each of the first `prompts` of `source`; logs the mean of each reward as heldout_<name>.

    Beside them `heldout_finished`, the share of answers that ended themselves.
    """

    metrics: ClassVar = ('heldout_finished',)

    source: Any
    rewards: tuple[Any, ...]
    prompts: int = schedule(500)
    prompt_length: int = 64  # tokens that a prompt may have
    max_new_tokens: int = 32
    temperature: float = 0.0  # 0: the likeliest answer; else one that is drawn
    template: str = ''  # as `rollout.template`
    system: str = ''
    rows: int = machine(64)  # of a batch

    def validate(self) -> None:
        check_new_tokens(self.max_new_tokens)
        for name in ('prompts', 'prompt_length', 'rows'):
            if getattr(self, name) < 1:
                raise ConfigError(f'{name} is {getattr(self, name)}; it is at least 1')
        if self.temperature < 0:
            raise ConfigError(f'temperature is {self.temperature}; write 0 for the likeliest answer, or more')
        if not self.rewards:
            raise ConfigError('rewards is empty; give what the answers are judged by')

    def check(self, session: Any) -> None:
        self.asked(session.tokenizer)

    def asked(self, tokenizer: Tokenizer) -> list[Prompt]:
        """The prompts. Raises ConfigError for what is none, is too long, or cannot be judged."""
        documents = of_prompts('held out', self.source.open())
        check(self.rewards, [documents])
        asker, found = Asker(tokenizer, self.template, self.system), []
        for number in range(min(len(documents), self.prompts)):
            document = documents[number]
            if document is None:
                continue
            found.append(Prompt(document, asker(document), functools.partial(documents.name, number)))
            if len(found[-1].ids) > self.prompt_length:
                raise ConfigError(
                    f'{documents.name(number)}: a held-out prompt has {len(found[-1].ids)} tokens, more than '
                    f'prompt_length = {self.prompt_length}; raise that'
                )
        if not found:
            raise ConfigError('the held-out source holds no prompt that can be read; mend its records')
        return found

    def open(self, session: Any) -> 'OpenHeldOutAnswers':
        return OpenHeldOutAnswers(self, session)


class OpenHeldOutAnswers:
    """The hook at work."""

    def __init__(self, config: HeldOutAnswers, session: Any):
        tokenizer, layout = session.tokenizer, session.layout
        self.config, self.session = config, session
        self.asked = config.asked(tokenizer)
        parts = math.prod(layout.mesh.shape[axis] for axis in BATCH)
        self.rows = -(-min(config.rows, len(self.asked)) // parts) * parts
        self.sampler = Sampler(
            session.graph,
            layout,
            prompt_length=config.prompt_length,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            stops=sorted({tokenizer.eos, *tokenizer.stops}),
            pad=tokenizer.pad,
            vocab_size=tokenizer.vocab_size,
        )
        first = agree.first if jax.process_count() > 1 else None
        self.panel = Panel(config.rewards, session, on_error='stop', timeout=60.0, first=first)

    def __call__(self, step: int, weights: dict[str, Array]) -> dict[str, float]:
        with self.session.busy('eval', 'answering'):
            samples = self._samples(weights)
            judged = self.panel(samples)
        values = {f'heldout_{name}': float(np.mean(each)) for name, each in judged.each.items()}
        values['heldout_finished'] = float(np.mean([sample.finished for sample in samples]))
        shown = ', '.join(f'{name.removeprefix("heldout_")} {value:.3f}' for name, value in values.items())
        self.session.print(f'step {step}: {len(samples)} held-out answers: {shown}')
        return values

    def _samples(self, weights: dict[str, Array]) -> list[Sample]:
        samples = []
        for at in range(0, len(self.asked), self.rows):
            part = self.asked[at : at + self.rows]
            padded = [each.ids for each in part] + [part[0].ids] * (self.rows - len(part))
            written = self.sampler(weights, padded, jax.random.fold_in(jax.random.key(self.session.run.seed), at))
            for row, each in enumerate(part):
                samples.append(written.sample(row, each.document, each.ids, self.session.tokenizer, each.where))
        return samples
