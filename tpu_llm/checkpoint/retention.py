"""Which checkpoints stay: the newest few, every m-th step, the best by a metric."""

import dataclasses
import math
from collections.abc import Iterable

from tpu_llm.checkpoint import commit
from tpu_llm.checkpoint.commit import Checkpoint
from tpu_llm.config import ConfigError, schedule


@dataclasses.dataclass(kw_only=True, slots=True)
class Checkpoints:
    """How often to save and what to keep; zero or an empty name switches a rule off."""

    every: int = schedule(500)  # steps from one save to the next
    keep: int = schedule(3)  # the newest n stay
    keep_every: int = schedule(0)  # as do the steps that this divides
    best: str = schedule('')  # as does the one with the lowest value of this metric of a hook

    def validate(self) -> None:
        for name, least in (('every', 1), ('keep', 1), ('keep_every', 0)):
            if getattr(self, name) < least:
                raise ConfigError(f'{name} is {getattr(self, name)}; it is at least {least}')


def kept(checkpoints: Iterable[Checkpoint], config: Checkpoints) -> list[Checkpoint]:
    """Those that stay, newest first. Where two starts saved one step, the later start's counts."""
    by_step: dict[int, Checkpoint] = {}
    for checkpoint in sorted(checkpoints, key=lambda c: commit.newness(c.step, c.token), reverse=True):
        by_step.setdefault(checkpoint.step, checkpoint)
    newest_first = list(by_step.values())
    stays = {c.step for c in newest_first[: config.keep]}
    if config.keep_every:
        stays |= {c.step for c in newest_first if c.step % config.keep_every == 0}
    scored = [c for c in newest_first if math.isfinite(c.metrics.get(config.best, math.nan))]
    if scored:
        stays.add(min(scored, key=lambda c: c.metrics[config.best]).step)
    return [c for c in newest_first if c.step in stays]
