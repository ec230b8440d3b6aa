"""A training run as one typed object: pretraining, and every objective that trains on batches."""

import dataclasses
from typing import Any

from tpu_llm.checkpoint.resume import Origin
from tpu_llm.checkpoint.retention import Checkpoints
from tpu_llm.config import ConfigError, choose, machine, schedule
from tpu_llm.data.loader import Data
from tpu_llm.models.decoder import DecoderConfig
from tpu_llm.objectives.next_token import NextToken
from tpu_llm.optim.optimizer import Optimizer
from tpu_llm.parallel.mesh import Mesh
from tpu_llm.parallel.rules import PRESETS


@dataclasses.dataclass(kw_only=True, slots=True)
class Run:
    """What `launch/run.py` runs. Length is one of steps, tokens and epochs."""

    model: DecoderConfig
    data: Data
    optimizer: Optimizer
    objective: NextToken = dataclasses.field(default_factory=NextToken)
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
    compiler_options: dict[str, str] = machine(factory=dict)
    checkpoints: Checkpoints = schedule(factory=Checkpoints)
    origin: Origin = dataclasses.field(default_factory=Origin)
    hooks: tuple[Any, ...] = schedule(())
    wandb: str = machine('')  # project on Weights & Biases to log to as well
    report: bool = schedule(True)  # write report.html at the end

    def validate(self) -> None:
        choose('rules preset', self.rules, PRESETS)
        lengths = [name for name in ('steps', 'tokens', 'epochs') if getattr(self, name)]
        if len(lengths) != 1:
            said = ' and '.join(lengths) if lengths else 'none'
            raise ConfigError(f'the length of a run is one of steps, tokens and epochs; {said} given')
        if self.accumulate < 1 or self.data.global_batch % self.accumulate:
            raise ConfigError(
                f'accumulate = {self.accumulate} does not divide data.global_batch = {self.data.global_batch}'
            )
        if not 0.0 <= self.ema < 1.0:
            raise ConfigError(f'ema = {self.ema}; write a decay from 0 (no average) to below 1')
        if self.log_every < 1 or self.bad_steps < 1:
            raise ConfigError(f'log_every = {self.log_every} and bad_steps = {self.bad_steps} must be at least 1')
        if self.model.position == 'learned' and self.data.seq_len > self.model.max_length:
            raise ConfigError(
                f'data.seq_len = {self.data.seq_len} is longer than the {self.model.max_length} learned positions '
                '(model.max_length)'
            )

    def main(self, workdir: str) -> None:
        from tpu_llm.train.loop import fit

        fit(self, workdir)
