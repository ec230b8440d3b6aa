"""Samples while training: what the model says now to the same prompts."""

import contextlib
import dataclasses
import json
from typing import Any, Protocol

from etils import epath

from tpu_llm.arrays import Array
from tpu_llm.config import ConfigError, Periodic, schedule
from tpu_llm.data.tokenizer import Tokenizer
from tpu_llm.infer.generate import Generator, check_new_tokens
from tpu_llm.infer.sampling import Greedy, Sample, Sampling
from tpu_llm.models.decoder_config import DecoderConfig
from tpu_llm.models.graph import ModelGraph
from tpu_llm.parallel.sharding import Layout


class Surroundings(Protocol):
    """What a hook needs of the run it watches."""

    run: Any
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
    temperature: float = schedule(0.8)  # 0: the likeliest token
    top_p: float = schedule(0.95)

    def validate(self) -> None:
        if not self.prompts:
            raise ConfigError('prompts is empty; give at least one')
        check_new_tokens(self.max_new_tokens)
        self.sampling()

    def sampling(self) -> Sampling:
        return Sample(temperature=self.temperature, top_p=self.top_p) if self.temperature else Greedy()

    def open(self, session: Surroundings) -> 'OpenSamples':
        return OpenSamples(self, session)


class OpenSamples:
    """The hook at work. A continued run drops the samples of steps it will do again."""

    def __init__(self, config: Samples, session: Surroundings):
        model = session.run.model
        if not isinstance(model, DecoderConfig):
            raise ConfigError(
                f'the Samples hook continues prompts, and model is {type(model).__name__}; take the hook out'
            )
        moe = model.moe
        if (config.every or config.last) and moe is not None and moe.router.choice == 'expert_choice':
            raise ConfigError(
                "the Samples hook draws token by token, and router.choice = 'expert_choice' looks at whole rows; take "
                'the hook out, switch it off (every=0, last=False) or choose another router'
            )
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
