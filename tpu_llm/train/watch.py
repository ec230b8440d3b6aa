"""Reads a step's metrics once the next step is on its way, so that logging never stalls the device."""

import math
import time
from typing import Any

import jax

from tpu_llm.arrays import Array, Batch
from tpu_llm.config import RunError
from tpu_llm.data.corrupted import UL2, Spans
from tpu_llm.models.flops_encoder import train_flops
from tpu_llm.parallel.chips import peak_flops
from tpu_llm.train.diagnose import first_non_finite
from tpu_llm.train.experts import CollapseAlarm, worst_layer
from tpu_llm.train.metrics import Values, is_remote
from tpu_llm.train.progress import SHOWN
from tpu_llm.train.session import Session
from tpu_llm.train.state import TrainState

# A local workdir is up to date with each line. Objects on gs:// are uploaded whole, not more often than this.
_UPLOAD_SECONDS = 30.0


class Diverged(RunError):
    """Too many steps in a row were not finite; what the run had is in its last checkpoint."""


class Watch:
    """Keeps the metrics of the newest step until the next one is dispatched, then logs and checks them."""

    def __init__(self, session: Session):
        self.session = session
        data = session.run.data
        self.tokens_per_step = data.global_batch * data.seq_len
        device = session.layout.mesh.devices.flat[0]
        peak = peak_flops(device.device_kind)
        self.peak = peak * session.layout.mesh.size if peak else None
        targets = data.form.target_len if isinstance(data.form, (Spans, UL2)) else 0
        self.flops_per_token = train_flops(session.run.model, data.seq_len, targets)
        self.alarm = CollapseAlarm(session.run.model)
        self.latest: Values = {}
        self._told: Values = {}  # of batches since the last line
        self._pending: tuple[int, dict[str, Array], Batch, Values] | None = None
        self._mark: tuple[int, float] | None = None  # step and productive seconds at the last log line
        self._flushed = time.monotonic()

    def push(self, step: int, metrics: dict[str, Array], batch: Batch, state: TrainState, told: Values) -> None:
        """Reads the step before (which waits until it is done), then keeps this one, and what was told of its batch."""
        self.read(state)
        self._pending = (step, metrics, batch, told)

    def read(self, state: TrainState) -> None:
        """Reads what is pending. Raises Diverged after too many bad steps in a row."""
        if self._pending is None:
            return
        (step, arrays, batch, told), self._pending = self._pending, None
        metrics = {name: _plain(value) for name, value in jax.device_get(arrays).items()}
        self.session.ledger.finished(step)
        if metrics['bad_in_a_row'] >= self.session.run.bad_steps:
            raise Diverged(
                f'stopped at step {step}: {int(metrics["bad_in_a_row"])} steps in a row had '
                f'{self._fault(step, metrics, state, batch)}; lower the learning rate, or look at the data of these '
                'steps (python -m tpu_llm.data audit)'
            )
        due = step % self.session.run.log_every == 0 or step == self.session.steps
        if 'expert_load' in metrics:
            self.alarm.add(metrics['expert_load'])
        self._told |= told
        if due:
            self.log(step, {**self._line(step, metrics), **self._told})
            self._told = {}
            for warning in filter(None, (*self.alarm.due(step), self.session.run.alarm(metrics))):
                self.session.print(warning)
        also = {k: v for k, v in self.latest.items() if k in SHOWN}
        self.session.reporter.update(step, {'loss': metrics['loss'], **also})

    def _fault(self, step: int, metrics: dict[str, Any], state: TrainState, batch: Batch) -> str:
        if math.isfinite(metrics['loss']) and math.isfinite(metrics['grad_norm']):
            limit = f'spike = {self.session.run.spike}'
            return f'too high a loss and were skipped ({limit}; the last was {metrics["loss"]:.4g})'
        where = first_non_finite(self.session, state, batch, step)
        return f'a non-finite loss or gradient and were skipped; {where}'

    def log(self, step: int, values: Values) -> None:
        """Adds a line to every writer, unless a newer run has taken the workdir over (Superseded)."""
        self.latest |= values
        self.session.fence.check()
        self.session.writers.write(step, values)
        if not is_remote(self.session.workdir) or time.monotonic() - self._flushed > _UPLOAD_SECONDS:
            self.flush()

    def flush(self) -> None:
        self.session.fence.check()
        self.session.writers.flush()
        if self.session.is_main:
            self.session.ledger.flush()
        self._flushed = time.monotonic()

    def _line(self, step: int, metrics: dict[str, Any]) -> Values:
        line: Values = {
            'loss': metrics['loss'],
            'learning_rate': metrics['learning_rate'],
            'grad_norm': metrics['grad_norm'],
            'tokens': step * self.tokens_per_step,
        }
        # Of a policy what it writes counts as well: a step's own work may end while the next rollout waits for it.
        seconds = self.session.ledger.seconds('step', 'data_wait', 'rollout', 'reward')
        if self._mark is not None:
            since, before = self._mark
            speed = (step - since) * self.tokens_per_step / max(seconds - before, 1e-9)
            line['tokens_per_second'] = speed
            if self.peak:
                line['mfu'] = speed * self.flops_per_token / self.peak
        self._mark = (step, seconds)
        if metrics['skipped']:
            line['skipped'] = metrics['skipped']
        known = {'loss', 'learning_rate', 'grad_norm', 'weight', 'bad_in_a_row', 'skipped'}
        return line | worst_layer(metrics) | {name: value for name, value in metrics.items() if name not in known}


def _plain(value: Any) -> Any:
    """A float, or of an array lists of floats, rounded to four digits."""
    if value.ndim == 0:
        return float(value)
    return [float(f'{each:.4g}') if each.ndim == 0 else _plain(each) for each in value]
