"""Reads a step's metrics once the next step is on its way, so that logging never stalls the device."""

import time

import jax
import numpy as np

from tpu_llm.arrays import Array, Batch
from tpu_llm.config import RunError
from tpu_llm.models.flops import train_flops
from tpu_llm.parallel.chips import peak_flops
from tpu_llm.train.diagnose import first_non_finite
from tpu_llm.train.session import Session
from tpu_llm.train.state import TrainState

# Objects on gs:// cannot be appended to; they are uploaded whole, not more often than this.
_FLUSH_SECONDS = 30.0


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
        self.flops_per_token = train_flops(session.run.model, data.seq_len)
        self.latest: dict[str, float] = {}
        self._pending: tuple[int, dict[str, Array], Batch] | None = None
        self._mark: tuple[int, float] | None = None  # step and productive seconds at the last log line
        self._flushed = time.monotonic()

    def push(self, step: int, metrics: dict[str, Array], batch: Batch, state: TrainState) -> None:
        """Reads the step before (which waits until it is done), then keeps this one."""
        self.read(state)
        self._pending = (step, metrics, batch)

    def read(self, state: TrainState) -> None:
        """Reads what is pending. Raises Diverged after too many bad steps in a row."""
        if self._pending is None:
            return
        (step, arrays, batch), self._pending = self._pending, None
        metrics = {name: float(value) for name, value in jax.device_get(arrays).items()}
        self.session.ledger.finished(step)
        if metrics['bad_in_a_row'] >= self.session.run.bad_steps:
            where = first_non_finite(self.session, state, batch)
            raise Diverged(
                f'stopped at step {step}: {int(metrics["bad_in_a_row"])} steps in a row had a non-finite loss or '
                f'gradient and were skipped; {where}; lower the learning rate, or look at the data of these steps '
                '(python -m tpu_llm.data audit)'
            )
        due = step % self.session.run.log_every == 0 or step == self.session.steps
        if due:
            self.log(step, self._line(step, metrics))
        speed = {k: v for k, v in self.latest.items() if k == 'tokens_per_second'}
        self.session.reporter.update(step, {'loss': metrics['loss'], **speed})

    def log(self, step: int, values: dict[str, float]) -> None:
        """Adds a line to every writer, unless a newer run has taken the workdir over (Superseded)."""
        self.latest |= values
        self.session.fence.check()
        self.session.writers.write(step, values)
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        self.session.fence.check()
        self.session.writers.flush()
        if self.session.is_main:
            self.session.ledger.flush()
        self._flushed = time.monotonic()

    def _line(self, step: int, metrics: dict[str, float]) -> dict[str, float]:
        rate = self.session.run.optimizer.schedule.make(self.session.steps)
        line = {
            'loss': metrics['loss'],
            # The step's own rate: optax counts from 0.
            'learning_rate': float(np.asarray(rate(step - 1))),
            'grad_norm': metrics['grad_norm'],
            'tokens': step * self.tokens_per_step,
        }
        seconds = self.session.ledger.seconds('step', 'data_wait')
        if self._mark is not None:
            since, before = self._mark
            speed = (step - since) * self.tokens_per_step / max(seconds - before, 1e-9)
            line['tokens_per_second'] = speed
            if self.peak:
                line['mfu'] = speed * self.flops_per_token / self.peak
        self._mark = (step, seconds)
        if metrics['skipped']:
            line['skipped'] = metrics['skipped']
        known = {'loss', 'weight', 'bad_in_a_row', 'skipped', 'grad_norm'}
        return line | {name: value for name, value in metrics.items() if name not in known}
