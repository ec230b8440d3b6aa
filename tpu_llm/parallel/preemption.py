"""Preemption: a SIGTERM on any host, or Ctrl-C on the only one, becomes one step at which all hosts stop."""

import signal
import threading
import types
from collections.abc import Callable
from typing import Any, Literal

import jax


class Preemption:
    """Asks, once a step, whether to save and stop. All hosts ask at the same steps and get the same answer.

    Several hosts agree through jax.distributed, whose own SIGTERM handler notifies the coordinator; a single host
    has its handlers here. Ctrl-C stops at once where it is pressed again, and before the first step is asked about,
    when there is nothing to save. `close()` gives the signals back.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.cause: Literal['', 'preempted', 'interrupted'] = ''  # of a stop that was asked for
        self._say = say
        self._asked: int | None = None  # the last step that was asked about
        self._before: dict[signal.Signals, Any] = {}
        if jax.process_count() > 1:
            return
        self._before[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._on_term)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored, or another's to hear
            self._before[signal.SIGINT] = signal.signal(signal.SIGINT, self._on_ctrl_c)

    def _on_term(self, number: int, frame: types.FrameType | None) -> None:
        self.cause = self.cause or 'preempted'

    def _on_ctrl_c(self, number: int, frame: types.FrameType | None) -> None:
        if self.cause or self._asked is None:
            signal.default_int_handler(number, frame)
        self.cause = 'interrupted'
        text = f'interrupted: saving at step {self._asked + 1:,}; press Ctrl-C again to stop at once'
        threading.Thread(target=self._say, args=(text,)).start()  # this thread may be in the middle of writing

    def at(self, step: int) -> bool:
        """Whether all hosts stop after `step`."""
        self._asked = step
        if jax.process_count() == 1:
            return bool(self.cause)
        from jax.experimental import multihost_utils

        if multihost_utils.reached_preemption_sync_point(step):
            self.cause = 'preempted'
        return bool(self.cause)

    def close(self) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
