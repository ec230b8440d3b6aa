"""A trace of a few steps, for XProf or TensorBoard: what the devices did, operation by operation."""

import dataclasses
from typing import Any

import jax

from tpu_llm.arrays import Array
from tpu_llm.config import ConfigError, schedule


@dataclasses.dataclass(kw_only=True, slots=True)
class Profile:
    """Traces `steps` steps after step `start` (late enough that nothing compiles any more) into WORKDIR/profile.

    Look at it with `tensorboard --logdir WORKDIR/profile` (pip install -e '.[profile]').
    """

    start: int = schedule(10)
    steps: int = schedule(3)

    def validate(self) -> None:
        if self.start < 1 or self.steps < 1:
            raise ConfigError(f'start = {self.start} and steps = {self.steps} must be at least 1')

    def due(self, step: int, steps: int) -> bool:
        return step in (self.start, self.start + self.steps, steps)

    def open(self, session: Any) -> 'OpenProfile':
        return OpenProfile(self, session)


class OpenProfile:
    """The hook at work. It is called between steps with nothing left to read, so a trace holds whole steps."""

    def __init__(self, config: Profile, session: Any):
        self.config, self.session = config, session
        self.tracing = False

    def __call__(self, step: int, weights: dict[str, Array]) -> dict[str, float]:
        if step == self.config.start:
            jax.profiler.start_trace(str(self.session.workdir / 'profile'))
            self.tracing = True
        elif self.tracing:
            jax.block_until_ready(weights)
            jax.profiler.stop_trace()
            self.tracing = False
            self.session.print(f'profile of {self.config.steps} steps: {self.session.workdir / "profile"}')
        return {}
