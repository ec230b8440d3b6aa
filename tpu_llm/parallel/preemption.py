"""Preemption: a SIGTERM on any host becomes one step at which all hosts stop."""

import signal
import types

import jax


class Preemption:
    """Asks, once a step, whether to save and stop. All hosts ask at the same steps and get the same answer.

    Several hosts agree through jax.distributed, whose own SIGTERM handler notifies the coordinator; a single host
    has its handler here. `close()` gives the signal back.
    """

    def __init__(self) -> None:
        self._requested = False
        self._before = None
        if jax.process_count() == 1:
            self._before = signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, number: int, frame: types.FrameType | None) -> None:
        self._requested = True

    def at(self, step: int) -> bool:
        """Whether all hosts stop after `step`."""
        if jax.process_count() == 1:
            return self._requested
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point(step)

    def close(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
