"""What a person sees of a run: a live bar on a terminal, time-stamped lines everywhere else.

Lines serve log files, pipes and notebooks (whose cells, and Colab's `!python …`, do not move a cursor). Both
kinds have one interface, and `progress(...)` picks. Only process 0 shows anything.
"""

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

LINE_EVERY = 10.0  # seconds between two lines where there is no bar
SHOWN = ('tokens_per_second', 'accuracy', 'reward')  # beside the loss, where a run has them


@runtime_checkable
class Reporter(Protocol):
    """Tells a person how the run is doing; used as a context manager around the loop."""

    def __enter__(self) -> 'Reporter': ...

    def __exit__(self, *exception: object) -> None: ...

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """`step` is finished. Of `values`, `loss` and those of SHOWN are shown where present."""

    def status(self, text: str) -> contextlib.AbstractContextManager[None]:
        """Says what else is going on ('compiling', 'evaluating') while the block runs."""
        ...

    def print(self, *objects: Any) -> None:
        """Prints above the bar; text is shown as it is, square brackets included."""


class Output(Console):
    """Standard output, until whoever reads it leaves (`… | head`): the run goes on without a word."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python has still to write


def progress(total: int, start: int = 0, *, shown: bool = True, console: Console | None = None) -> Reporter:
    """The reporter that suits where the output goes; `total` and `start` in steps, `shown` on process 0
    only.
    """
    console = Console(quiet=True) if not shown else console or Output()
    in_notebook = console.is_jupyter or 'COLAB_RELEASE_TAG' in os.environ
    live = shown and console.is_terminal and not console.is_dumb_terminal and not in_notebook
    return Bar(total, start, console) if live else Lines(total, console)


class Pace:
    """Time left, from the mean pace since the first finished step (which leaves out the compilation)."""

    def __init__(self, total: int):
        self._total = total
        self._first: tuple[int, float] | None = None

    def remaining(self, step: int) -> float | None:
        """Seconds until `total`; None until two updates have been seen."""
        now = time.monotonic()
        if self._first is None:
            self._first = (step, now)
        first_step, first_time = self._first
        if step <= first_step:
            return None
        return (now - first_time) / (step - first_step) * max(self._total - step, 0)


class Bar:
    """One line at the bottom of a terminal, redrawn in place."""

    def __init__(self, total: int, start: int, console: Console):
        self._total, self._pace = total, Pace(total)
        self._progress = Progress(
            TextColumn('{task.description:<10}', style='bold', markup=False),
            BarColumn(bar_width=None),
            TextColumn('{task.fields[text]}', markup=False),
            console=console,
            expand=True,
        )
        self._task = self._progress.add_task('training', total=total, completed=start, text=f'{start:,}/{total:,}')

    def __enter__(self) -> 'Bar':
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def update(self, step: int, values: Mapping[str, float]) -> None:
        text = describe(step, self._total, values, self._pace.remaining(step))
        self._progress.update(self._task, completed=step, text=text)

    @contextlib.contextmanager
    def status(self, text: str) -> Iterator[None]:
        before = self._progress.tasks[0].description
        self._progress.update(self._task, description=text)
        try:
            yield
        finally:
            self._progress.update(self._task, description=before)

    def print(self, *objects: Any) -> None:
        self._progress.console.print(*objects, markup=False, highlight=False)


class Lines:
    """A line at the first and the last step, every ten seconds, and at each change of status."""

    def __init__(self, total: int, console: Console):
        self._total, self._console, self._pace = total, console, Pace(total)
        self._last = float('-inf')

    def __enter__(self) -> 'Lines':
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def update(self, step: int, values: Mapping[str, float]) -> None:
        remaining = self._pace.remaining(step)
        if time.monotonic() - self._last >= LINE_EVERY or step >= self._total:
            self._last = time.monotonic()
            self._line(f'step {describe(step, self._total, values, remaining)}')

    @contextlib.contextmanager
    def status(self, text: str) -> Iterator[None]:
        self._line(text)
        yield

    def print(self, *objects: Any) -> None:
        self._console.print(*objects, markup=False, highlight=False, soft_wrap=True)

    def _line(self, text: str) -> None:
        self.print(f'{time.strftime("%H:%M:%S")}  {text}')


def describe(step: int, total: int, values: Mapping[str, float], remaining: float | None) -> str:
    """`120/1,000  loss 5.412  11.2k tokens/s  ETA 3:21`"""
    parts = [f'{step:,}/{total:,}']
    parts += [f'{name} {values[name]:.3f}' for name in ('loss', 'accuracy', 'reward') if name in values]
    if 'tokens_per_second' in values:
        parts.append(f'{short(values["tokens_per_second"])} tokens/s')
    if remaining is not None:
        parts.append(f'ETA {clock(remaining)}')
    return '  '.join(parts)


def short(number: float) -> str:
    """Three digits and a letter: 812, 11.2k, 3.4M, 1.2B, 15T."""
    for size, letter in ((1e12, 'T'), (1e9, 'B'), (1e6, 'M'), (1e3, 'k')):
        if abs(number) >= 0.9995 * size:  # 999,999 is 1M, not 1e+03k
            return f'{number / size:.3g}{letter}'
    return f'{number:.3g}'


def clock(seconds: float) -> str:
    """`0:07`, `3:21`, `1:02:03`, `2d 3:00:00`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if not hours:
        return f'{minute}:{second:02}'
    text = f'{hour}:{minute:02}:{second:02}'
    return f'{days}d {text}' if days else text
