"""Learning-rate schedules: warm up, hold or decay, arrive."""

import dataclasses
from typing import Literal

import optax

from tpu_llm.config import ConfigError, schedule


@dataclasses.dataclass(kw_only=True, slots=True)
class Schedule:
    """Linear warm-up over `warmup` steps (below 1: that share of all steps) to `peak`, then `decay` down to `peak *
    final` at the last step.

    cosine: half a cosine (Loshchilov and Hutter, 2016); linear: a line; wsd: flat, then a line over the last
    `cooldown` share of the steps (warm-up, stable, decay: Hu et al., 2024, arXiv 2404.06395); constant: flat.
    """

    peak: float
    warmup: float = schedule(0)
    decay: Literal['cosine', 'linear', 'wsd', 'constant'] = 'cosine'
    final: float = 0.1
    cooldown: float = 0.2

    def validate(self) -> None:
        if self.peak < 0 or self.warmup < 0:
            raise ConfigError(f'peak = {self.peak} and warmup = {self.warmup} must not be negative')
        if self.warmup > 1 and self.warmup != int(self.warmup):
            raise ConfigError(f'warmup = {self.warmup}; write whole steps, or a share of all steps below 1')
        if not 0.0 <= self.final <= 1.0 or not 0.0 < self.cooldown <= 1.0:
            raise ConfigError(f'final = {self.final} and cooldown = {self.cooldown} are shares from 0 to 1')

    def make(self, steps: int) -> optax.Schedule:
        """step → learning rate, as a share of the peak. Raises ConfigError where the warm-up leaves no steps to train.

        The peak itself is an argument of the training step: runs that differ in nothing else share a compiled one.
        """
        warmup = int(self.warmup if self.warmup >= 1 else self.warmup * steps)
        if warmup >= steps and warmup > 0:
            raise ConfigError(
                f'schedule: warmup = {warmup} does not end within the {steps} steps; lower one '
                '(--config.optimizer.schedule.warmup=0) or raise the other'
            )
        # The first step after the warm-up takes the peak, the last one the final rate.
        fall = max(1, steps - warmup - 1)
        if self.decay == 'cosine':
            tail = optax.cosine_decay_schedule(1.0, fall, alpha=self.final)
        elif self.decay == 'linear':
            tail = optax.linear_schedule(1.0, self.final, fall)
        elif self.decay == 'wsd':
            cooldown = min(fall, max(1, round(steps * self.cooldown)))
            tail = optax.linear_schedule(1.0, self.final, cooldown, fall - cooldown)
        else:
            tail = optax.constant_schedule(1.0)
        if not warmup:
            return tail
        # The first step already moves: with warm-up 10 it takes peak / 10.
        rising = optax.linear_schedule(1 / warmup, 1.0, warmup - 1)
        return optax.join_schedules([rising, tail], [warmup])
