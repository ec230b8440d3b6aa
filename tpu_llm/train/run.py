"""A training run as one typed object: pretraining, and every objective that trains on batches."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from tpu_llm.arrays import Batch
from tpu_llm.checkpoint.resume import Origin
from tpu_llm.checkpoint.retention import Checkpoints
from tpu_llm.config import ConfigError, choose, machine, nearest, schedule
from tpu_llm.data.corrupted import UL2, Masks, Spans
from tpu_llm.data.forms import Tasks
from tpu_llm.data.loader import Data
from tpu_llm.models.decoder_config import DecoderConfig
from tpu_llm.models.encoder import EncoderConfig
from tpu_llm.models.encoder_decoder import EncoderDecoderConfig
from tpu_llm.objectives.ahead import Ahead
from tpu_llm.objectives.distill import Distill
from tpu_llm.objectives.masked import Masked
from tpu_llm.objectives.next_token import NextToken
from tpu_llm.optim.optimizer import Optimizer
from tpu_llm.parallel.mesh import Mesh
from tpu_llm.parallel.pipeline import Pipeline
from tpu_llm.parallel.rules import PRESETS
from tpu_llm.parallel.sharding import Layout
from tpu_llm.peft.wrapping import Kind
from tpu_llm.train.frozen import Reference


@dataclasses.dataclass(kw_only=True, slots=True)
class Run:
    """What `launch/run.py` runs. Length is one of steps, tokens and epochs."""

    model: Any  # of the type that the objective trains
    data: Data
    optimizer: Optimizer
    objective: Any = dataclasses.field(default_factory=NextToken)  # of tpu_llm/objectives
    peft: Kind | None = None  # of tpu_llm/peft: what is added to the model and trains, while the rest is frozen
    reference: Reference | None = None  # a frozen model for the objective
    steps: int = schedule(0)
    tokens: int = schedule(0)
    epochs: float = schedule(0.0)
    seed: int = 0
    accumulate: int = machine(1)  # microbatches a step
    ema: float = 0.0  # decay of the parameters' moving average; 0: none is kept
    spike: float = 0.0  # skip a step whose loss is this many standard deviations above its mean; 0: never
    bad_steps: int = schedule(10)  # skipped steps in a row that stop the run
    log_every: int = schedule(10)
    mesh: Mesh = machine(factory=Mesh)
    rules: str = machine('zero3')
    pipeline: Pipeline = machine(factory=Pipeline)
    compiler_options: dict[str, str] = machine(factory=dict)
    checkpoints: Checkpoints = schedule(factory=Checkpoints)
    origin: Origin = dataclasses.field(default_factory=Origin)
    hooks: tuple[Any, ...] = schedule(())
    wandb: str = machine('')  # project on Weights & Biases to log to as well
    report: bool = schedule(True)  # write report.html at the end

    def validate(self) -> None:
        choose('rules preset', self.rules, PRESETS)
        lengths = {name: value for name in ('steps', 'tokens', 'epochs') if (value := getattr(self, name))}
        if len(lengths) != 1 or min(lengths.values()) < 0:
            said = ' and '.join(f'{name} = {value}' for name, value in lengths.items()) or 'none'
            zeros = ' or '.join(f'--config.{name}=0' for name in lengths)
            mend = f'; switch off what you do not mean: {zeros}' if len(lengths) > 1 else ''
            raise ConfigError(f'the length of a run is one of steps, tokens and epochs, above 0; given: {said}{mend}')
        metrics = [name for hook in self.hooks for name in getattr(hook, 'metrics', ())]
        if self.checkpoints.best and self.checkpoints.best not in metrics:
            there = ', '.join(metrics) or 'none'
            raise ConfigError(
                f'checkpoints.best = {self.checkpoints.best!r} is not a metric of the hooks'
                f'{nearest(self.checkpoints.best, metrics)}; there are: {there}'
            )
        if self.accumulate < 1 or self.data.global_batch % self.accumulate:
            raise ConfigError(
                f'accumulate = {self.accumulate} does not divide data.global_batch = {self.data.global_batch}'
            )
        if not 0.0 <= self.ema < 1.0:
            raise ConfigError(f'ema = {self.ema}; write a decay from 0 (no average) to below 1')
        if self.log_every < 1 or self.bad_steps < 1:
            raise ConfigError(f'log_every = {self.log_every} and bad_steps = {self.bad_steps} must be at least 1')
        self._check_kinds()
        learned = isinstance(self.model, EncoderConfig) or self.model.position == 'learned'
        if learned and self.data.seq_len > self.model.max_length:
            raise ConfigError(
                f'data.seq_len = {self.data.seq_len} is longer than the {self.model.max_length} learned positions '
                '(model.max_length)'
            )

    def alarm(self, metrics: Mapping[str, Any]) -> str:
        """What is to be said of a logged step's metrics; '' where all is well."""
        return ''

    def _check_kinds(self) -> None:
        """Model, objective and batches must be made for each other."""
        objective, form = self.objective, self.data.form
        name = type(objective).__name__
        if self.reference is not None and not self.needs_frozen():
            raise ConfigError(f'objective {name} reads no frozen model; take reference out')
        if self.needs_frozen() and self.reference is None and self.peft is None:
            raise ConfigError(f'objective {name} needs a frozen model; set reference=Reference()')
        other = None if self.reference is None else self.reference.model
        if other is not None and other.vocab_size != self.model.vocab_size:
            raise ConfigError(
                f'reference.model.vocab_size = {other.vocab_size} is not model.vocab_size = {self.model.vocab_size}; '
                'the two models share a tokenizer and a vocabulary'
            )
        if not isinstance(self.model, objective.trains):
            raise ConfigError(
                f'objective {name} trains {objective.trains.__name__}, and model is {type(self.model).__name__}; '
                'change one of them'
            )
        if isinstance(objective, Distill):
            objective.check_models(self.model, self.model if other is None else other)
        tasks, sources = getattr(self.peft, 'tasks', 1), len(self.data.mixture.sources)
        if isinstance(form, Tasks) and tasks != sources:
            raise ConfigError(
                f'data.form = Tasks: each of the {sources} sources is a task, and there are prompts for {tasks}; set '
                f'peft = SoftPrompts(tasks={sources})'
            )
        given = self.gives()
        if given is not objective.reads:
            said = 'none' if form is None else type(form).__name__
            raise ConfigError(
                f'objective {name} reads {objective.reads.__name__}, and data.form = {said} gives '
                f'{given.__name__}; change one of them'
            )
        if isinstance(self.model, DecoderConfig):
            self._check_ahead(self.model.predict_ahead)
        if isinstance(objective, Masked) and isinstance(form, Masks):
            heads = isinstance(self.model, EncoderConfig) and self.model.next_sentence
            if objective.next_sentence and not (form.pairs and heads):
                raise ConfigError('objective.next_sentence needs data.form.pairs and model.next_sentence; set both')
        if isinstance(self.model, EncoderDecoderConfig) and isinstance(form, (Spans, UL2)):
            if form.start_token != self.model.start_token:
                raise ConfigError(
                    f'data.form.start_token = {form.start_token} is not model.start_token = '
                    f'{self.model.start_token}; make them equal'
                )
            if self.model.position == 'learned' and form.target_len > self.model.max_length:
                raise ConfigError(
                    f'data.form.target_len = {form.target_len} is longer than the {self.model.max_length} '
                    'learned positions (model.max_length)'
                )

    def _check_ahead(self, tokens: int) -> None:
        trains = isinstance(self.objective, Ahead)
        if trains and not tokens:
            raise ConfigError(
                'objective Ahead trains what predicts further tokens, and model.predict_ahead = 0; set it to 1 or '
                'more, or use NextToken'
            )
        if tokens and not trains and self.peft is None:
            raise ConfigError(
                f'model.predict_ahead = {tokens}, which objective {type(self.objective).__name__} does not train; use '
                'Ahead, or set it to 0'
            )

    def needs_frozen(self) -> bool:
        """Whether there is a model beside the one that trains."""
        return self.objective.needs_frozen

    def gives(self) -> type[Batch]:
        """What its batches are."""
        return Batch if self.data.form is None else self.data.form.gives

    def empty_batch(self) -> Batch:
        """One of zeros."""
        shape = (self.data.global_batch, self.data.seq_len)
        if self.data.form is not None:
            return self.data.form.empty(*shape)
        ids, numbers = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
        return Batch(tokens=ids, targets=ids, weights=numbers, segments=ids, positions=ids)

    def open_feed(self, layout: Layout, workdir: epath.Path) -> Any:
        """Where its batches come from."""
        from tpu_llm.train.setup import Feed

        return Feed(self, layout, workdir)

    def other_programs(self, graphs: Any, layout: Layout, state: Any, frozen: Any) -> dict[str, tuple[Any, int]]:
        """By name what a run has besides its step, lowered from shapes (of `TrainState` and `Frozen`), and how many
        tokens it draws one after another at most: none here.
        """
        del graphs, layout, state, frozen
        return {}

    def main(self, workdir: str) -> None:
        from tpu_llm.train.loop import fit

        fit(self, workdir)
