"""Samples while training: what the model says now to the same prompts."""

import contextlib
import dataclasses
import json
from typing import Protocol

from etils import epath

from tpu_llm.arrays import Array
from tpu_llm.config import ConfigError, Periodic, schedule
from tpu_llm.data.tokenizer import Tokenizer
from tpu_llm.infer.generate import Generator
from tpu_llm.infer.sampling import Sample
from tpu_llm.models.graph import ModelGraph
from tpu_llm.parallel.sharding import Layout


class Surroundings(Protocol):
    """What a hook needs of the run it watches."""

    workdir: epath.Path
    graph: ModelGraph
    layout: Layout
    tokenizer: Tokenizer
    is_main: bool

    def busy(self, phase: str, text: str) -> contextlib.AbstractContextManager[None]: ...

    def print(self, text: str) -> None: ...


@dataclasses.dataclass(kw_only=True, slots=True)
class Samples(Periodic):
    """Continues `prompts` every so many steps and at the end; prints them and adds them to samples.jsonl."""

    prompts: tuple[str, ...]
    max_new_tokens: int = schedule(64)
    temperature: float = schedule(0.8)
    top_p: float = schedule(0.95)

    def validate(self) -> None:
        if not self.prompts:
            raise ConfigError('prompts is empty; give at least one')
        self.sampling()

    def sampling(self) -> Sample:
        return Sample(temperature=self.temperature, top_p=self.top_p)

    def open(self, session: Surroundings) -> 'OpenSamples':
        return OpenSamples(self, session)


class OpenSamples:
    """The hook at work. A continued run drops the samples of steps it will do again."""

    def __init__(self, config: Samples, session: Surroundings):
        self.config = config
        self.session = session
        self.generator = Generator(
            session.graph,
            session.tokenizer,
            max_new_tokens=config.max_new_tokens,
            sampling=config.sampling(),
            layout=session.layout,
        )

    def __call__(self, step: int, weights: dict[str, Array]) -> dict[str, float]:
        session, prompts = self.session, self.config.prompts
        with session.busy('sample', 'sampling'):
            texts = self.generator(weights, prompts, seed=step)
            if session.is_main:
                self._write(step, texts)
        for prompt, text in zip(prompts, texts, strict=True):
            session.print(f'step {step}: {prompt}⟶{text}\n')
        return {}

    def _write(self, step: int, texts: list[str]) -> None:
        path = self.session.workdir / 'samples.jsonl'
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [line for line in lines if json.loads(line)['step'] < step]
        new = [
            json.dumps({'step': step, 'prompt': prompt, 'text': text})
            for prompt, text in zip(self.config.prompts, texts, strict=True)
        ]
        path.write_text('\n'.join([*kept, *new]) + '\n')
