"""A model answers prompts, and its answers are kept: data for a student that is to say the same.

Sequence-level distillation (Kim and Rush, 2016, arXiv 1606.07947, section 3.2) is fine-tuning on them. They are JSONL
of `prompt` and `completion`, which the source `Conversations` reads.
"""

import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import jax
from etils import epath
from rich.console import Console

from tpu_llm.arrays import Array
from tpu_llm.checkpoint.pretrained import open_source
from tpu_llm.config import ConfigError, machine, validate
from tpu_llm.data.documents import Documents
from tpu_llm.data.prompts import Asker
from tpu_llm.infer.generate import check_new_tokens
from tpu_llm.models.decoder_config import DecoderConfig
from tpu_llm.models.graph import ModelGraph
from tpu_llm.parallel.mesh import Mesh
from tpu_llm.parallel.rules import BATCH, PRESETS
from tpu_llm.parallel.sharding import Layout
from tpu_llm.rl.prompts import Prompt, of_prompts
from tpu_llm.rl.reader import Beside, Place
from tpu_llm.rl.rewards import Sample
from tpu_llm.rl.sampler import Sampler
from tpu_llm.train import weights

_PROMPTS = 1024  # of a file

Records = list[dict[str, Any]]
Part = Callable[[range], tuple[Records, str]]  # the records of these prompts, and what was left out


@dataclasses.dataclass(kw_only=True, slots=True)
class Write:
    """Writes `answers-00000-of-….jsonl` in the workdir, each of 1,024 prompts; files that are there are done.

    Answers that were cut at `max_new_tokens` are left out, and prompts longer than `prompt_length`; both are counted.
    """

    unit: ClassVar = 'answers'

    path: str  # the model that answers: a Hugging Face folder, a GGUF file or a run's workdir
    source: Any  # of prompts
    answers: int = 1  # to each prompt
    temperature: float = 0.0  # 0: the likeliest answer, which more than one to a prompt would repeat
    prompt_length: int = 256
    max_new_tokens: int = 256
    template: str = ''  # as in `data.conversations`: '' is the tokenizer's own
    rows: int = 64  # answered at a time; draws depend on it
    seed: int = 0
    dtype: Literal['float32', 'bfloat16'] = machine('float32')
    mesh: Mesh = machine(factory=Mesh)
    rules: str = machine('zero3')

    def validate(self) -> None:
        check_new_tokens(self.max_new_tokens)
        for name in ('answers', 'prompt_length', 'rows'):
            if getattr(self, name) < 1:
                raise ConfigError(f'{name} is {getattr(self, name)}; it is at least 1')
        if self.temperature < 0:
            raise ConfigError(f'temperature is {self.temperature}; write 0 for the likeliest answer, or more')
        if self.answers > 1 and not self.temperature:
            raise ConfigError(f'answers = {self.answers} and temperature = 0: they would all be the same; raise it')
        if not self.path:
            raise ConfigError('path is empty; give the model that is to answer')

    def main(self, workdir: str) -> None:
        validate(self)
        folder = epath.Path(workdir)
        folder.mkdir(parents=True, exist_ok=True)
        documents = self.documents()
        part = self.open(documents)
        console = Console(stderr=True, highlight=False, soft_wrap=True)
        files = math.ceil(len(documents) / _PROMPTS)
        for file in range(files):
            path = folder / f'answers-{file:05}-of-{files:05}.jsonl'
            if not path.exists():
                begun = time.monotonic()
                records, said = part(range(file * _PROMPTS, min((file + 1) * _PROMPTS, len(documents))))
                if jax.process_index() == 0:
                    _write(path, records)
                console.print(f'{path}: {len(records):,} {self.unit} in {time.monotonic() - begun:.0f} s; {said}')

    def documents(self) -> Documents:
        """The prompts."""
        return of_prompts('prompts', self.source.open())

    def open(self, documents: Documents) -> Part:
        """What answers the prompts of some numbers, and keeps what ended."""
        answer = Answerer(self)

        def part(numbers: range) -> tuple[Records, str]:
            answered, long = answer(documents, numbers)
            samples = [sample for _, samples in answered for sample in samples]
            records = [{'prompt': asked(sample), 'completion': sample.response} for sample in samples if ended(sample)]
            return records, left_out(len(samples) - len(records), long)

        return part


class Answerer:
    """The model at work."""

    def __init__(self, config: Write):
        source = open_source(config.path)
        if not isinstance(source.config, DecoderConfig):
            raise ConfigError(f'{config.path} holds no decoder but a {type(source.config).__name__}')
        model, tokenizer = dataclasses.replace(source.config, dtype=config.dtype), source.tokenizer()
        layout = Layout(config.mesh.make(), PRESETS[config.rules])
        rows = math.prod(layout.mesh.shape[axis] for axis in BATCH)
        rows *= math.ceil(config.rows / rows)

        def graph(model: Any) -> ModelGraph:
            return ModelGraph(model.make(vocab_multiple=128 * layout.mesh.shape['tensor']))

        own = graph(model)
        read = weights.of_model(config.path, model, own, layout, tokenizer.fingerprint, config.seed, 'path')
        self.config = config
        self.model = Beside(graph=own, weights=read, tokenizer=tokenizer, layout=layout, rows=rows)
        self.place = Place(layout=layout, rows=rows, seed=config.seed, graph=graph, reference=self.model)
        self.ask = Asker(tokenizer, config.template)
        self.sampler = Sampler(
            own,
            layout,
            prompt_length=config.prompt_length,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            stops=sorted({tokenizer.eos, *tokenizer.stops}),
            pad=tokenizer.pad,
            vocab_size=tokenizer.vocab_size,
        )

    def __call__(self, documents: Documents, numbers: range) -> tuple[list[tuple[Prompt, list[Sample]]], int]:
        """The answers to each of these prompts, and how many prompts were too long."""
        prompts = [
            Prompt(document, self.ask(document), functools.partial(documents.name, number))
            for number in numbers
            if (document := documents[number]) is not None
        ]
        short = [prompt for prompt in prompts if len(prompt.ids) <= self.config.prompt_length]
        again = [prompt for prompt in short for _ in range(self.config.answers)]
        key = jax.random.fold_in(jax.random.key(self.config.seed), numbers.start)
        samples = []
        for at in range(0, len(again), self.model.rows):
            samples += self._answered(again[at : at + self.model.rows], jax.random.fold_in(key, at))
        count = self.config.answers
        answered = [(prompt, samples[at * count : (at + 1) * count]) for at, prompt in enumerate(short)]
        return answered, len(prompts) - len(short)

    def _answered(self, part: Sequence[Prompt], key: Array) -> list[Sample]:
        padded = [prompt.ids for prompt in part] + [part[0].ids] * (self.model.rows - len(part))
        written = self.sampler(self.model.weights, padded, key)
        return [
            written.sample(row, prompt.document, prompt.ids, self.model.tokenizer, prompt.where)
            for row, prompt in enumerate(part)
        ]


def asked(sample: Sample) -> Any:
    """The prompt as its record has it, text or messages."""
    return sample.record.get('prompt', sample.prompt)


def ended(sample: Sample) -> bool:
    """Whether it can be learned from: it says something, and has an end."""
    return sample.finished and bool(sample.response.strip())


def left_out(cut: int, long: int) -> str:
    return f'left out {cut:,} cut at max_new_tokens and {long:,} prompts over prompt_length'


def _write(path: epath.Path, records: Sequence[dict[str, Any]]) -> None:
    """Whole or not at all: what is there by its name is done."""
    part = path.with_name(f'.{path.name}.part')
    part.write_text(''.join(json.dumps(record, ensure_ascii=False) + '\n' for record in records))
    part.rename(path)
