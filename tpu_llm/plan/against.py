"""A run on TPUs beside its plan: what a step was to take and takes, and a word where the two part.

The plan is `plan.json` in the workdir (`launch/plan.py --workdir=…` writes it). Without one the hook makes it on TPUs
from the very program that the run has compiled.
"""

import dataclasses
import json
from typing import Any

import jax

from tpu_llm.arrays import Array
from tpu_llm.config import ConfigError, Periodic, schedule
from tpu_llm.parallel.chips import CHIPS
from tpu_llm.plan.plan import Plan, choices, load, of_program

FILE = 'plan.json'
_GIB = 2**30


@dataclasses.dataclass(kw_only=True, slots=True)
class AgainstPlan(Periodic):
    """A hook that logs what a step took since it last did, beside what it was to take."""

    every: int = schedule(200)
    tolerance: float = schedule(0.15)  # a step may be so much slower or faster before it is said

    def validate(self) -> None:
        if self.tolerance <= 0:
            raise ConfigError(f'tolerance = {self.tolerance} must be above 0')

    def open(self, session: Any) -> 'OpenAgainstPlan':
        return OpenAgainstPlan(self, session)


class OpenAgainstPlan:
    """The hook at work."""

    def __init__(self, config: AgainstPlan, session: Any):
        self.session = session
        self.tolerance = config.tolerance
        self.plan = self._read()
        self._mark: tuple[int, float, float] | None = None  # step, and seconds of steps and of waiting for data
        self._said = False

    def __call__(self, step: int, weights: dict[str, Array]) -> dict[str, float]:
        self.plan = self.plan or self._own()
        if self.plan is None:
            return {}
        now = step, self.session.ledger.seconds('step'), self.session.ledger.seconds('data_wait')
        before, self._mark = self._mark, now
        if before is None or before[0] == step:
            return {}
        steps = step - before[0]
        took, waited = (now[1] - before[1]) / steps, (now[2] - before[2]) / steps
        ratio = (took + waited) / self.plan.seconds
        if abs(ratio - 1) > self.tolerance and not self._said:
            self._said = True
            self.session.print(f'step {step}: {said(self.plan, took, waited, _peak())}')
        return {'planned_step_seconds': self.plan.seconds, 'step_seconds': took + waited, 'step_over_plan': ratio}

    def _read(self) -> Plan | None:
        path = self.session.workdir / FILE
        if not path.exists():
            return None
        plan = load(json.loads(path.read_text()))
        mesh = {axis: size for axis, size in self.session.layout.mesh.shape.items() if size > 1}
        if mesh != dict(plan.mesh) or choices(self.session.run) != dict(plan.choices):
            self.session.print(f'{path} is of another mesh or other choices than this run; it is not compared')
            return None
        return plan if plan.cost is not None else None

    def _own(self) -> Plan | None:
        mesh = self.session.layout.mesh
        kind = mesh.devices.flat[0].device_kind
        if not any(kind in chip.kinds for chip in CHIPS.values()):
            return None
        return of_program(self.session.run, mesh, self.session.train_step.newest)


def said(plan: Plan, took: float, waited: float, peak: int | None) -> str:
    """One line on a step that takes `took` seconds and waits `waited` for data, beside its plan."""
    ratio = (took + waited) / plan.seconds
    way = 'over' if ratio > 1 else 'under'
    parts = [f'a step takes {took + waited:.3g} s, {abs(ratio - 1):.0%} {way} the {plan.seconds:.3g} s planned']
    parts.append(f'on the device {took:.3g} s, waiting for data {waited:.3g} s (planned: none)')
    if peak:
        parts.append(f'peak HBM {peak / _GIB:.1f} GiB (planned {plan.memory.allocated / _GIB:.1f})')
    return '; '.join(parts)


def _peak() -> int | None:
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get('peak_bytes_in_use')
