"""How far the runs of a sweep are, read from the ends of their files, and when all will be through."""

import dataclasses
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from tpu_llm.models.flops_encoder import train_flops
from tpu_llm.scaling import sweep
from tpu_llm.scaling.sweep import Job
from tpu_llm.train.metrics import NOT_FINITE

_TAIL = 1 << 14  # bytes: more than a line


@dataclasses.dataclass(frozen=True, slots=True)
class Look:
    """How far a run is."""

    step: int
    steps: int | None  # None where only its data can tell
    loss: float | None
    left: float | None  # seconds

    @property
    def share(self) -> float:
        return min(self.step / self.steps, 1.0) if self.steps else 0.0


class Progress:
    """Looks at runs; times are of this start of the sweep."""

    def __init__(self, jobs: Sequence[Job]):
        self._steps = {job.name: length(job) for job in jobs}
        self._work = {job.name: work(job) for job in jobs}
        self._first: dict[str, tuple[int, float]] = {}
        self._began = time.monotonic()

    def begin(self, job: Job) -> None:
        """It starts now, perhaps from a checkpoint."""
        self._first.pop(job.name, None)

    def look(self, job: Job) -> Look:
        line, steps, now = last_line(job), self._steps[job.name], time.monotonic()
        step = int(line.get('step', 0))
        first, since = self._first.setdefault(job.name, (step, now))
        left = (now - since) / (step - first) * (steps - step) if steps and step > first else None
        return Look(step, steps, line.get('loss'), left)

    def remaining(self, done: Mapping[str, float], todo: Mapping[str, float]) -> float | None:
        """Seconds, from how long this start took for `done` (shares of runs); None before anything is done."""
        before, after = (sum(self._work[name] * part for name, part in each.items()) for each in (done, todo))
        return (time.monotonic() - self._began) * after / before if before > 0 else None


def length(job: Job) -> int | None:
    """A run's steps; None where only its data can tell."""
    steps = 0
    for _, run, _ in sweep.trained(job.config, job.folder):
        if run.epochs:
            return None
        steps += run.steps or math.ceil(run.tokens / (run.data.global_batch * run.data.seq_len))
    return steps or None


def work(job: Job) -> float:
    """FLOPs of its training, 1 where they are not known: to weigh runs by."""
    total = 0.0
    for _, run, _ in sweep.trained(job.config, job.folder):
        steps = run.steps or run.tokens / (run.data.global_batch * run.data.seq_len)
        total += steps * run.data.global_batch * run.data.seq_len * train_flops(run.model, run.data.seq_len)
    return total or 1.0


def last_line(job: Job) -> dict[str, Any]:
    """The last values that a run on this machine has logged, of stages those of the one at work."""
    for _, _, folder in reversed(sweep.trained(job.config, job.folder)):
        path = os.path.join(folder, 'metrics.jsonl')
        if os.path.exists(path):
            return _tail(path)
    return {}


def _tail(path: str) -> dict[str, Any]:
    with open(path, 'rb') as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _TAIL))
        lines = file.read().split(b'\n')[1 if size > _TAIL else 0 : -1]
    values = {name: value for line in lines for name, value in json.loads(line).items()}
    return {name: float(value) if value in NOT_FINITE else value for name, value in values.items()}
